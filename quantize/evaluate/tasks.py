"""Held-out items of a role: a conversation, the right answer, and how an answer is checked."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class TaskError(ValueError):
    """A task file cannot be used. The text names the file, the line and the fix."""


class Item(BaseModel):
    """One item. ``exact`` compares the whole answer; ``contains`` asks for every string of ``facts``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    messages: tuple[dict[str, str], ...] = Field(min_length=1)
    expected: str
    check: Literal["exact", "contains"] = "exact"
    facts: tuple[str, ...] = ()
    max_tokens: int = Field(default=64, ge=1)

    def is_right(self, answer: str) -> bool:
        if self.check == "exact":
            return answer.strip() == self.expected.strip()
        return all(fact in answer for fact in self.facts)


def read_items(path: Path, role: str) -> list[Item]:
    """Read a role's items from JSON Lines. Raises TaskError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise TaskError(f"tasks of role {role}: {path} does not exist; set roles.{role}.tasks") from None
    items = []
    for number, line in enumerate(lines, 1):
        try:
            items.append(Item.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the line"
            raise TaskError(f"{path}:{number}: {where}: {first['msg']}") from None
    if not items:
        raise TaskError(f"tasks of role {role}: {path} is empty; a gate needs held-out items")
    return items
