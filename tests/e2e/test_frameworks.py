"""Frameworks on a real engine: vLLM holds a model to a tool that is named, and to a schema."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio

from deploy.engine import EngineSpec, free_port, running
from gateway.config import Engine
from tests.e2e.conftest import ROOT
from tests.frameworks.environments import PAGES, frameworks
from tests.frameworks.harness import Recipes
from tests.gateway.gateway_stack import by_id, make_card, running_gateway

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

FLAGS = (
    "--enable-auto-tool-choice",
    *("--tool-call-parser", "hermes"),
    *("--tool-strict-level", "parameter"),
    *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
)


REAL = Path(os.environ.get("REAL_MODEL", ROOT / "var/real-model"))
IS_REAL = (REAL / "config.json").is_file()
MODEL = REAL if IS_REAL else ROOT / "deploy/assistant/model"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def url(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """A gateway over one engine."""
    card = make_card("bf16", max_model_len=1024)
    settings = Engine(
        python=ROOT / ".venv-engine/bin/python",
        env={"OMP_NUM_THREADS": "1"},
        max_num_seqs=8,
        extra_args=FLAGS,
    )
    log = tmp_path_factory.mktemp("engine") / "engine.log"
    spec = EngineSpec(card, MODEL, settings, free_port(settings.host), log)
    async with (
        running(spec, print),
        running_gateway(
            cards=by_id(card),
            serve=("bf16",),
            pools={"bf16": (spec.url,)},
            watch={"enabled": False},
            quality={"sample_rate": 0.0},
        ) as stack,
    ):
        yield stack.url


@pytest.mark.skipif(
    not IS_REAL,
    reason="the demo's model writes no call to its end; set REAL_MODEL to the checkpoint of a model that "
    "chats, or put one at var/real-model",
)
@pytest.mark.parametrize("name", ["openai", "langgraph", "google-adk"])
async def test_a_named_tool_is_used_and_a_schema_is_kept(name: str, url: str, tmp_path: Path) -> None:
    framework = frameworks()[name]
    if framework.python is None:
        pytest.skip(f"{framework.title} has no environment here; `make frameworks` makes it")
    recipes = Recipes(framework, url, tmp_path, page=PAGES / "real-engine.md")
    async with recipes.running():
        told = await recipes.run(framework.title)
    (call,) = told["calls"]
    assert call["name"] == "weather"
    assert call["arguments"]["city"] in ("Oslo", "Bonn")
    assert isinstance(told["text"], str)
    assert set(told["found"]) == {"city", "degrees"}
    assert told["found"]["city"] in ("Oslo", "Bonn")
    assert int(told["found"]["degrees"]) in (20, 21)


async def test_what_agents_send_wrongly_is_refused_with_a_sentence(url: str) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    nobody = {"type": "function", "function": {"name": "nobody"}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    odd: dict[str, tuple[dict[str, Any], str]] = {
        "an image": ({"messages": [{"role": "user", "content": [image]}]}, "multimodal|image"),
        "no tools": ({"tools": []}, "tools"),
        "a choice of nobody": ({"tools": [tool], "tool_choice": nobody}, "tool"),
        "a choice without tools": ({"tool_choice": "required"}, "tool"),
        "a choice that is a number": ({"tools": [tool], "tool_choice": 7}, "tool_choice"),
        "a tool that is none": ({"tools": [{"type": "function"}]}, "tools"),
        "a text that does not fit": ({"messages": [{"role": "user", "content": "word " * 9000}]}, "context"),
        "an answer that does not fit": ({"max_tokens": 100_000}, "max_tokens"),
    }
    plain = {"model": "assistant", "max_tokens": 1, "messages": [{"role": "user", "content": "hello"}]}
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="any", max_retries=0) as client:
        for why, (body, says) in odd.items():
            with pytest.raises(openai.BadRequestError) as refused:
                await client.post("/chat/completions", body=plain | body, cast_to=object)
            assert re.search(says, refused.value.message), f"{why}: {refused.value.message}"
        for body in ({}, {"x_new": {"a": 1}}, {"tools": [tool, tool]}):
            await client.post("/chat/completions", body=plain | body, cast_to=object)


DOUBLING = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(60)} | {"d60": {}}
DEEP: dict[str, Any] = {"type": "string"}
for _ in range(150):
    DEEP = {"type": "object", "properties": {"a": DEEP}, "required": ["a"]}


@pytest.mark.parametrize(
    "schema",
    [
        {"$defs": DOUBLING, "$ref": "#/$defs/d0"},
        DEEP,
        {"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1:1/schema"}}},
        {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(a{1,9999}){1,9999}$"}}},
        {"type": "object", "properties": {"a": {"allOf": [{"type": "array", "maxItems": 10**9}, {}]}}},
    ],
    ids=["that doubles", "that is deep", "that is elsewhere", "that repeats", "that has items"],
)
async def test_a_tool_schema_that_is_a_bomb_harms_nobody_else(url: str, schema: Any) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
    named = {"type": "function", "function": {"name": "weather"}}
    plain = {"model": "assistant", "max_tokens": 2, "messages": [{"role": "user", "content": "hello"}]}
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="any", max_retries=0, timeout=60) as client:
        # Refused with a sentence, or answered.
        with contextlib.suppress(openai.BadRequestError):
            await client.post(
                "/chat/completions", body=plain | {"tools": [tool], "tool_choice": named}, cast_to=object
            )
        await client.post("/chat/completions", body=plain, cast_to=object)
