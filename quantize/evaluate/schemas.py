"""JSON schemas of answers: whether one is a schema, and whether an answer matches it. Nothing is fetched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

REFERENCES = ("$ref", "$dynamicRef")


def refuse_bad_schema(schema: dict[str, Any] | None) -> dict[str, Any] | None:
    """The schema itself. Raises ValueError where it is none, or refers to what it does not hold."""
    if schema is not None:
        from jsonschema import Draft202012Validator, SchemaError  # type: ignore[import-untyped]

        try:
            Draft202012Validator.check_schema(schema)
            _refuse_lost_references(schema)
        except SchemaError as error:
            raise ValueError(f"is not a JSON schema: {error.message}") from None
        except RecursionError:
            raise ValueError("is not a JSON schema that can be checked: it is nested too deeply") from None
    return schema


def is_valid(answer: str, schema: Mapping[str, Any]) -> bool:
    """Whether the whole answer is JSON that matches the schema. One that is deeper than Python's stack is
    not."""
    from jsonschema import Draft202012Validator
    from jsonschema_specifications import REGISTRY  # type: ignore[import-untyped]

    try:
        value = json.loads(answer)
        return bool(Draft202012Validator(schema, registry=REGISTRY).is_valid(value))
    except (ValueError, RecursionError):
        return False


def _refuse_lost_references(schema: dict[str, Any]) -> None:
    """Follow every reference, as judging an answer would."""
    from jsonschema import Draft202012Validator
    from jsonschema_specifications import REGISTRY
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    root = DRAFT202012.create_resource(schema)
    waiting = [(root, REGISTRY.resolver_with_root(root))]
    seen: set[int] = set()
    while waiting:
        resource, resolver = waiting.pop()
        if id(resource.contents) in seen:
            continue
        seen.add(id(resource.contents))
        waiting += [(one, resolver.in_subresource(one)) for one in resource.subresources()]
        if not isinstance(resource.contents, Mapping):
            continue
        for name in REFERENCES:
            if (reference := resource.contents.get(name)) is None:
                continue
            try:
                found = resolver.lookup(reference)
            except Unresolvable:
                raise ValueError(
                    f"{name} {reference!r} leads nowhere within the schema, and nothing is fetched; write "
                    "out what it stands for under $defs"
                ) from None
            Draft202012Validator.check_schema(found.contents)
            waiting.append((DRAFT202012.create_resource(found.contents), found.resolver))
