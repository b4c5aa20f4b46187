"""Held-out items of a role: a conversation, the right answer, and how an answer is checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from quantize.core.jsonl import read_json, read_lines
from quantize.core.refusals import first_fault
from quantize.evaluate.schemas import is_valid, refuse_bad_schema

Suite = Literal["task", "long_context"]
BEGINNING = 16
"""Characters of an answer that are compared with the reference's own. A greedy answer that has once chosen
another word goes on otherwise, so whole answers tell little: of a model of 135 M parameters in 8 bits, which
loses 0.026 nats a token, 39 % begin otherwise within 16 characters and 90 % differ at last; in 4 bits, which
lose 0.21 and are visibly worse, 71 % and 98 %. The two are furthest apart where few tokens are compared."""

ASKED = {"messages", "chat_template_kwargs", "guided", "check", "expected", "facts"}
"""Items that are alike in these are one: what is asked, and what is right."""


class TaskError(ValueError):
    """A task file cannot be used. The text names the file, the line and the fix."""


class Item(BaseModel):
    """One item.

    ``exact`` compares the whole answer; ``contains`` asks for every string of ``facts``, or for ``expected``
    where there are none; ``json`` compares the values of two JSON texts, in which 1 is 1.0 and not true. With
    ``reference`` nobody has said what is right: ``expected`` is the reference's own answer, and another one
    is compared with its first :data:`BEGINNING` characters.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    messages: tuple[dict[str, str], ...] = Field(min_length=1)
    expected: str
    expected_tokens: tuple[int, ...] = Field(
        default=(), description="of the expected answer as the engine wrote it; default: by the tokenizer"
    )
    check: Literal["exact", "contains", "json", "reference"] = "exact"
    facts: tuple[str, ...] = ()
    max_tokens: int = Field(default=256, ge=1)
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="for the chat template, such as {'enable_thinking': false}"
    )
    grounds: tuple[str, ...] | None = Field(
        default=None, description="texts that hold everything that may be claimed; not checked without"
    )
    json_schema: dict[str, Any] | None = Field(
        default=None, description="what the answer has to match; not checked without"
    )
    guided: bool = Field(
        default=False,
        description="let the engine guide the answer by json_schema, which then is valid by construction",
    )
    suite: Suite = "task"

    @field_validator("json_schema")
    @classmethod
    def _is_a_schema(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        return refuse_bad_schema(schema)

    @model_validator(mode="after")
    def _can_be_checked(self) -> Item:
        if self.guided and self.json_schema is None:
            raise ValueError("guided needs json_schema; give one, or leave guided out")
        if self.check == "json":
            try:
                json.loads(self.expected)
            except ValueError:
                raise ValueError(f"expected: {self.expected[:60]!r} is not JSON; check is 'json'") from None
            except RecursionError:
                raise ValueError("expected: is nested too deeply to be compared; check is 'json'") from None
        if self.check == "contains" and not all(fact.strip() for fact in self.sought):
            raise ValueError(
                "facts: one is blank, which every answer contains; leave it out"
                if self.facts
                else "check is 'contains' and nothing is looked for; give facts, or expected"
            )
        return self

    @property
    def sought(self) -> tuple[str, ...]:
        """What ``contains`` looks for in an answer."""
        return self.facts or (self.expected.strip(),)

    def is_right(self, answer: str) -> bool:
        if self.check == "reference":
            return answer[:BEGINNING] == self.expected[:BEGINNING]
        if self.check == "exact":
            return answer.strip() == self.expected.strip()
        if self.check == "json":
            try:
                return _same_json(json.loads(answer), json.loads(self.expected))
            except (ValueError, RecursionError):  # no JSON, or deeper than Python's stack
                return False
        return all(fact in answer for fact in self.sought)

    def is_valid_json(self, answer: str) -> bool:
        """Whether the whole answer is JSON that matches ``json_schema``."""
        return is_valid(answer, self.json_schema or {})


def _same_json(one: object, other: object) -> bool:
    """Whether two JSON values are equal; a number is no truth value."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same_json(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same_json, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def by_first_role(tasks: Mapping[str, Sequence[Item]]) -> dict[str, str]:
    """Role to the first role with the same items, itself or another: what is asked of both is asked once."""
    return {
        role: next(first for first, others in tasks.items() if others == items)
        for role, items in tasks.items()
    }


def read_items(path: Path, role: str, suite: Suite = "task") -> list[Item]:
    """Read a role's items from JSON Lines. Raises TaskError, also for an item that is there twice: gates take
    items for independent of each other."""
    key = f"roles.{role}.{'tasks' if suite == 'task' else suite}"
    try:
        lines = read_lines(path)
    except FileNotFoundError:
        raise TaskError(f"tasks of role {role}: {path} does not exist; set {key}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"tasks of role {role}: {path} cannot be read ({error}); set {key}") from None
    items: list[Item] = []
    places: dict[str, int] = {}
    for number, line in lines:
        try:
            item = Item.model_validate(read_json(line))
        except ValidationError as error:
            raise TaskError(f"{path}:{number}: {first_fault(error, 'the line')}") from None
        except ValueError as error:
            raise TaskError(f"{path}:{number}: is not JSON ({error})") from None
        asked = item.model_dump_json(include=ASKED)
        if (first := places.setdefault(asked, number)) != number:
            raise TaskError(
                f"{path}:{number}: is the item of line {first} once more; keep one, a gate counts each as "
                "independent evidence"
            )
        items.append(item if item.suite == suite else item.model_copy(update={"suite": suite}))
    if not items:
        raise TaskError(f"tasks of role {role}: {path} is empty; a gate needs held-out items")
    return items
