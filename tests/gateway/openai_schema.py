"""OpenAI's own description of its interface, to hold answers against."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

OPENAPI = Path(__file__).parents[3] / "shared/data/openai_openapi.json.gz"
WHOLE, CHUNK, EMBEDDINGS = (
    "CreateChatCompletionResponse",
    "CreateChatCompletionStreamResponse",
    "CreateEmbeddingResponse",
)


@cache
def _validator(name: str) -> Any:
    document = json.loads(gzip.decompress(OPENAPI.read_bytes()))
    schemas = _with_nulls(document["components"]["schemas"])
    choice = schemas[CHUNK]["properties"]["choices"]["items"]["properties"]
    choice["finish_reason"] = {"anyOf": [choice["finish_reason"], {"type": "null"}]}  # it forgot to say so
    whole = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas}}
    return jsonschema_rs.Draft202012Validator(whole)


def _with_nulls(schema: Any) -> Any:
    """``nullable`` is of an older draft, which the document mixes with its own."""
    if isinstance(schema, list):
        return [_with_nulls(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {name: _with_nulls(part) for name, part in schema.items()}
    return {"anyOf": [inner, {"type": "null"}]} if schema.get("nullable") is True else inner


def need_schema() -> None:
    """Skip the test where OpenAI's description is not at hand."""
    if not OPENAPI.is_file():
        pytest.skip(f"OpenAI's OpenAPI description is not at {OPENAPI}")


def check(answer: Any, name: str) -> None:
    """Fail where an answer is not as OpenAI describes it."""
    if OPENAPI.is_file():
        problems = [f"{list(e.instance_path)}: {e.message}" for e in _validator(name).iter_errors(answer)]
        assert not problems, (problems, answer)
