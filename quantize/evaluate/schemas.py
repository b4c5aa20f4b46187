"""JSON schemas of answers: whether one is a schema, and whether an answer matches it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def refuse_bad_schema(schema: dict[str, Any] | None) -> dict[str, Any] | None:
    """The schema itself. Raises ValueError where it is none."""
    if schema is not None:
        from jsonschema import Draft202012Validator, SchemaError  # type: ignore[import-untyped]

        try:
            Draft202012Validator.check_schema(schema)
        except SchemaError as error:
            raise ValueError(f"is not a JSON schema: {error.message}") from None
    return schema


def is_valid(answer: str, schema: Mapping[str, Any]) -> bool:
    """Whether the whole answer is JSON that matches the schema."""
    from jsonschema import Draft202012Validator

    try:
        value = json.loads(answer)
    except ValueError:
        return False
    return bool(Draft202012Validator(schema).is_valid(value))
