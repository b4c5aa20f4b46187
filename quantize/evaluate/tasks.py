"""Held-out items of a role: a conversation, the right answer, and how an answer is checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from quantize.core.jsonl import read_lines

Suite = Literal["task", "long_context"]


class TaskError(ValueError):
    """A task file cannot be used. The text names the file, the line and the fix."""


class Item(BaseModel):
    """One item.

    ``exact`` compares the whole answer; ``contains`` asks for every string of ``facts``; ``json`` compares
    the values of two JSON texts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    messages: tuple[dict[str, str], ...] = Field(min_length=1)
    expected: str
    check: Literal["exact", "contains", "json"] = "exact"
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
        if schema is not None:
            from jsonschema import Draft202012Validator, SchemaError  # type: ignore[import-untyped]

            try:
                Draft202012Validator.check_schema(schema)
            except SchemaError as error:
                raise ValueError(f"is not a JSON schema: {error.message}") from None
        return schema

    @model_validator(mode="after")
    def _can_be_checked(self) -> Item:
        if self.guided and self.json_schema is None:
            raise ValueError("guided needs json_schema; give one, or leave guided out")
        if self.check == "json":
            try:
                json.loads(self.expected)
            except ValueError:
                raise ValueError(f"expected: {self.expected[:60]!r} is not JSON; check is 'json'") from None
        return self

    def is_right(self, answer: str) -> bool:
        if self.check == "exact":
            return answer.strip() == self.expected.strip()
        if self.check == "json":
            try:
                given: object = json.loads(answer)
            except ValueError:
                return False
            return bool(given == json.loads(self.expected))
        return all(fact in answer for fact in self.facts)

    def is_valid_json(self, answer: str) -> bool:
        """Whether the whole answer is JSON that matches ``json_schema``."""
        from jsonschema import Draft202012Validator

        try:
            value = json.loads(answer)
        except ValueError:
            return False
        return bool(Draft202012Validator(self.json_schema or {}).is_valid(value))


def read_items(path: Path, role: str, suite: Suite = "task") -> list[Item]:
    """Read a role's items from JSON Lines. Raises TaskError."""
    key = f"roles.{role}.{'tasks' if suite == 'task' else suite}"
    try:
        lines = read_lines(path)
    except FileNotFoundError:
        raise TaskError(f"tasks of role {role}: {path} does not exist; set {key}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"tasks of role {role}: {path} cannot be read ({error}); set {key}") from None
    items = []
    for number, line in lines:
        try:
            item = Item.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the line"
            raise TaskError(f"{path}:{number}: {where}: {first['msg']}") from None
        items.append(item if item.suite == suite else item.model_copy(update={"suite": suite}))
    if not items:
        raise TaskError(f"tasks of role {role}: {path} is empty; a gate needs held-out items")
    return items
