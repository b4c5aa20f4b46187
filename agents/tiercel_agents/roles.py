"""A library of roles: what such an agent is told, what its answers look like, and what it tolerates.

    role("intent_classifier").messages("where is my parcel", labels=["order_status", "refund"])

The same names stand in the gateway's file: ``roles: {triage: {like: intent_classifier}}`` takes the budget
and the checks from here, and whatever is written beside ``like`` counts instead. The data: ``roles.toml``.
"""

from __future__ import annotations

import copy
import string
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Role:
    """One of the library, or one's own."""

    name: str
    what: str
    prompt: str
    runs_on: str = ""
    schema: Mapping[str, Any] | None = None
    """JSON schema of an answer; None where it is text."""
    choices: Mapping[str, str] = field(default_factory=dict)
    """A property of the schema to the field of the prompt whose values it may have."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the role in the gateway's file."""

    @property
    def fields(self) -> tuple[str, ...]:
        """What has to be filled into the prompt."""
        found = (name for _, name, _, _ in string.Formatter().parse(self.prompt) if name)
        return tuple(dict.fromkeys(found))

    def system(self, **given: Any) -> str:
        """The system prompt. Lists are written with commas. Raises ValueError that names what is missing."""
        if missing := [name for name in self.fields if name not in given]:
            raise ValueError(f"{self.name}: its prompt needs {', '.join(missing)}; give {missing[0]}=…")
        if unknown := sorted(given.keys() - set(self.fields)):
            known = ", ".join(self.fields) or "none"
            raise ValueError(f"{self.name}: its prompt has no {', '.join(unknown)}; it has: {known}")
        return self.prompt.format(**{name: _written(value) for name, value in given.items()})

    def messages(self, text: str, **given: Any) -> list[dict[str, str]]:
        """A chat that asks for it: system prompt and user's text. Raises as ``system`` does."""
        return [{"role": "system", "content": self.system(**given)}, {"role": "user", "content": text}]

    def response_format(self, **given: Any) -> dict[str, Any] | None:
        """OpenAI's ``response_format`` for its schema, with the choices filled in; None where it has none."""
        if self.schema is None:
            return None
        schema = copy.deepcopy(dict(self.schema))
        for name, source in self.choices.items():
            if source in given:
                _restrict(schema, name, [str(value) for value in given[source]])
        return {"type": "json_schema", "json_schema": {"name": self.name, "schema": schema}}


def role(name: str) -> Role:
    """A role of the library. Raises ValueError that lists the known ones."""
    found = library().get(name)
    if found is None:
        raise ValueError(f"{name!r} is not a role of the library; known: {', '.join(library())}")
    return found


@cache
def library() -> Mapping[str, Role]:
    """All of it, by name."""
    text = (files("tiercel_agents") / "roles.toml").read_text(encoding="utf-8")
    return MappingProxyType({name: Role(name, **table) for name, table in tomllib.loads(text).items()})


def settings_like(name: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """A role's settings by those of the library's ``name``, with ``own`` in their place, key by key within
    sections. Raises ValueError."""
    return _merged(copy.deepcopy(dict(role(name).settings)), own)


def _merged(under: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in over.items():
        below = under.get(key)
        both = isinstance(below, dict) and isinstance(value, Mapping)
        under[key] = _merged(below, value) if both and isinstance(below, dict) else value
    return under


def _restrict(schema: Any, name: str, values: list[str]) -> None:
    """Let the property ``name``, wherever the schema has it, be one of ``values``."""
    if not isinstance(schema, dict):
        return
    properties = schema.get("properties")
    if isinstance(properties, dict) and name in properties:
        properties[name] = {**properties[name], "enum": values}
    for inner in (*(properties or {}).values(), schema.get("items")):
        _restrict(inner, name, values)


def _written(value: Any) -> str:
    many = isinstance(value, Iterable) and not isinstance(value, str)
    return ", ".join(map(str, value)) if many else str(value)
