"""Conversations that ship with the product, for whoever has no labelled items: what a model is calibrated and
judged with. They say what is asked; answers are the reference's own (:mod:`quantize.evaluate.answers`).

``conversations.jsonl`` holds some 500 in many domains, languages and lengths, written for this purpose;
nobody in them is a real person. Those that share a text or a system prompt share the number in their id
(``documents-03a``, ``documents-03b``) and with it their part, so that no text is in both.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from quantize.core.jsonl import read_lines
from quantize.core.refusals import first_fault
from quantize.evaluate.schemas import refuse_bad_schema

SHIPPED = Path(__file__).with_name("conversations.jsonl")
_ID = re.compile(r"([a-z]+)-(\d+)[a-z]?")

Part = Literal["calibration", "held_out"]


class ConversationError(ValueError):
    """A file of conversations cannot be used. The text names the file, the line and the fix."""


class Conversation(BaseModel):
    """What is asked, without an answer at its end."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(description="domain, number, and a letter where several share a text")
    domain: str
    messages: tuple[dict[str, str], ...] = Field(min_length=1)
    json_schema: dict[str, Any] | None = Field(
        default=None, description="of an answer, where JSON is asked for"
    )

    @field_validator("id")
    @classmethod
    def _has_a_number(cls, given: str) -> str:
        if _ID.fullmatch(given) is None:
            raise ValueError(f"{given!r} is not like 'support-07' or 'support-07b'")
        return given

    @field_validator("json_schema")
    @classmethod
    def _is_a_schema(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        return refuse_bad_schema(schema)

    @field_validator("messages")
    @classmethod
    def _asks_something(cls, messages: tuple[dict[str, str], ...]) -> tuple[dict[str, str], ...]:
        if messages[-1].get("role") != "user":
            raise ValueError("the last message must be the user's: the reference gives the answer")
        return messages

    @property
    def part(self) -> Part:
        """Even numbers calibrate, odd ones judge: of every domain half, and nothing moves when more come."""
        found = _ID.fullmatch(self.id)
        assert found is not None  # validated
        return "held_out" if int(found[2]) % 2 else "calibration"


def read_conversations(path: Path = SHIPPED) -> list[Conversation]:
    """All conversations of a file of JSON Lines. Raises ConversationError."""
    found: dict[str, Conversation] = {}
    for number, line in read_lines(path):
        try:
            one = Conversation.model_validate_json(line)
        except ValidationError as error:
            raise ConversationError(f"{path}:{number}: {first_fault(error, 'the line')}") from None
        if one.id in found:
            raise ConversationError(f"{path}:{number}: id: {one.id!r} is there twice; give each its own")
        found[one.id] = one
    return list(found.values())


def chosen(conversations: Iterable[Conversation], part: Part, count: int | None = None) -> list[Conversation]:
    """At most ``count`` conversations of a part, of all domains alike; all of it without ``count``.

    A smaller count gives the beginning of what a larger one gives.
    """
    domains: dict[str, list[Conversation]] = {}
    for one in conversations:
        if one.part == part:
            domains.setdefault(one.domain, []).append(one)
    ordered = [
        (place / len(members), domain, one)
        for domain, members in sorted(domains.items())
        for place, one in enumerate(sorted(members, key=_drawn))
    ]
    # By how much of its domain has come before: so all domains run out together.
    return [one for _, _, one in sorted(ordered, key=lambda entry: entry[:2])][:count]


def _drawn(conversation: Conversation) -> str:
    return hashlib.sha256(conversation.id.encode()).hexdigest()


def without_system(messages: Sequence[dict[str, str]]) -> tuple[dict[str, str], ...]:
    """The same for chat templates that know no system message: its text begins the first user's."""
    if messages[0]["role"] != "system":
        return tuple(messages)
    system, first, *others = messages
    joined = {**first, "content": f"{system['content']}\n\n{first['content']}"}
    return (joined, *others)


def template_kwargs(template: str) -> dict[str, Any]:
    """What a chat template is to be told so that a model that thinks answers at once, where it can be."""
    return {"enable_thinking": False} if "enable_thinking" in template else {}
