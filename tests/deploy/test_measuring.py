"""Measuring: the reference first, on which engine, what is kept, and what is said of odd results.

Engines are scripted ones that run already; what they serve is told by an account of their own.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from aiohttp import web

import deploy.measuring as module
from deploy.commands.errors import chief
from deploy.engine import EngineSpec
from deploy.engine_failures import EngineLoadError, EngineRoomError
from deploy.identity import identity
from deploy.measuring import evaluate_variants, unless_broken
from deploy.models import one_model, registry_of
from deploy.placement import Machine
from gateway.config import ModelConfig, load_config
from quantize.card import Card, Outcome
from quantize.core.checkpoint import open_checkpoint
from quantize.core.modules import read_modules
from quantize.core.plan import uniform
from quantize.versions import stale
from tests.quantize.scripted_engine import ScriptedEngine
from tests.quantize.small import write_fleet
from tests.quantize.test_engine_account import module as told_module

MACHINE = Machine({0: (0, 1)}, 1 << 40)


class Engine(ScriptedEngine):
    """A scripted engine that writes what speed is measured by, and says what it serves."""

    def __init__(
        self,
        shift: float,
        bits: int,
        order: list[str],
        name: str,
        answer: Callable[[str], str] = lambda _: "$5",
    ) -> None:
        super().__init__(answer, shift, vocabulary=None)
        self.bits, self.order, self.name = bits, order, name

    async def _completions(self, request: web.Request) -> web.Response:
        body = await request.json()
        if "prompt_logprobs" not in body:
            return web.json_response({"usage": {"completion_tokens": body["max_tokens"]}, "choices": []})
        self.order.append(self.name)
        return await super()._completions(request)

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "0.32.0"})

    def account(self) -> dict[str, Any]:
        names = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
        modules = {
            f"model.layers.{layer}.{name}": told_module(self.bits) for layer in (0, 1) for name in names
        }
        rank = {
            "quantization": "compressed-tensors" if self.bits < 16 else None,
            "kv_dtypes": ["bfloat16"],
            "modules": modules,
            "weight_bytes": 1000,
            "device_bytes": None,
        }
        return {"version": "0.32.0", "torch": "2", "ranks": [rank]}


def differing(*found: str) -> Callable[..., Any]:
    """What comparing an engine's tokenizer with the model's comes to."""

    async def differences(*_: object) -> tuple[str, ...]:
        return found

    return differences


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    path = write_fleet(tmp_path)
    monkeypatch.setattr(module, "look", lambda: MACHINE)
    monkeypatch.setattr(module, "tokenizer_differences", differing())  # the small model has no tokenizer
    return one_model(load_config(path))


@pytest.fixture
def cards(model: ModelConfig) -> list[Card]:
    checkpoint = open_checkpoint(model.path)
    registry = registry_of(model)

    def make(out: Path) -> None:
        (out / "model.safetensors").write_bytes((model.path / "model.safetensors").read_bytes() + b"")
        (out / "config.json").write_text("{}", encoding="utf-8")

    plan = uniform(read_modules(checkpoint), "w4a16-g32")
    return [registry.add(checkpoint, "int4", plan, None, make=make), registry.add_reference(checkpoint)]


@asynccontextmanager
async def running(
    model: ModelConfig, cards: list[Card], monkeypatch: pytest.MonkeyPatch, shift: float = 0.1, bits: int = 4
) -> AsyncIterator[tuple[dict[str, EngineSpec], list[str]]]:
    order: list[str] = []
    engines = {"bf16": Engine(0.0, 16, order, "bf16"), "int4": Engine(shift, bits, order, "int4")}
    served = [(model, card, engines[card.variant]) for card in cards]
    async with serving(served, monkeypatch) as specs:
        yield specs, order


@asynccontextmanager
async def serving(
    served: Sequence[tuple[ModelConfig, Card, Engine]], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[dict[str, EngineSpec]]:
    """Engines that run already, by ``model:variant``."""
    monkeypatch.setattr(ScriptedEngine, "serve", _serve_with_account)
    async with AsyncExitStack() as stack:
        specs = {}
        for model, card, engine in served:
            parts = urlsplit(await stack.enter_async_context(engine.serve()))
            settings = model.engine.model_copy(update={"host": parts.hostname})
            directory = model.variants_dir / card.variant / card.version
            specs[card.id] = EngineSpec(card, directory, settings, parts.port or 0, model.run_dir / "log")
        yield specs


_serve = ScriptedEngine.serve


@asynccontextmanager
async def _serve_with_account(engine: Engine) -> AsyncIterator[str]:
    async def account(_: web.Request) -> web.Response:
        return web.json_response(engine.account())

    async with _serve(engine) as url:
        app = web.Application()
        app.router.add_get("/tiercel/account", account)
        app.router.add_route("*", "/{path:.*}", _forward_to(url))
        from aiohttp.test_utils import TestServer

        async with TestServer(app) as server:
            yield str(server.make_url("")).rstrip("/")


def _forward_to(url: str) -> Callable[[web.Request], Any]:
    async def forward(request: web.Request) -> web.Response:
        import aiohttp

        async with (
            aiohttp.ClientSession() as session,
            session.request(request.method, url + request.path, data=await request.read()) as answer,
        ):
            return web.Response(
                body=await answer.read(), status=answer.status, content_type="application/json"
            )

    return forward


async def test_the_reference_is_measured_first_and_accounts_are_kept(
    model: ModelConfig, cards: list[Card], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    async with running(model, cards, monkeypatch) as (engines, order):
        int4, bf16 = await evaluate_variants(model, cards, said.append, engines)
        assert order[0] == "bf16"
        assert order.index("int4") > 11  # its engine waits for the reference's first pass
        assert int4.account is not None
        assert list(int4.account.kernels) == ["CompressedTensorsWNA16/CPUWNA16LinearKernel"]
        assert not int4.doubts
        assert bf16.evaluation is not None
        assert bf16.evaluation.engine["cpu"]
        asked = len(order)
        await evaluate_variants(model, [bf16, int4], said.append, engines)
        assert len(order) == asked  # nothing is asked twice on the same engine
        changed = model.engine.model_copy(update={"env": {"VLLM_CPU_INT4_W4A8": "0"}})
        other = replace(model, engine=changed)
        now = identity(other, MACHINE)
        assert stale(int4, now) == ("env none, now VLLM_CPU_INT4_W4A8=0",)
        again = await evaluate_variants(other, [bf16, int4], said.append, engines)
        assert len(order) == 2 * asked
        assert not stale(again[1], now)


async def test_of_two_runs_at_once_the_second_waits_and_finds_what_the_first_measured(
    model: ModelConfig, cards: list[Card], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    async with running(model, cards, monkeypatch) as (engines, order):
        runs = [evaluate_variants(model, cards, said.append, engines) for _ in range(2)]
        first, second = await asyncio.gather(*runs)
        assert first == second
        assert len(order) == len(set(order)) * 12 + 12, "the reference answers twice"
    assert f"waiting for process {os.getpid()}, which is busy with measuring variants of assistant" in said


async def test_an_engine_that_reads_text_otherwise_measures_nothing(
    model: ModelConfig, cards: list[Card], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = differing("'The quick' is 3 tokens to the engine and 4 to model", "another")
    monkeypatch.setattr(module, "tokenizer_differences", found)
    async with running(model, cards, monkeypatch) as (engines, order):
        with pytest.raises(ExceptionGroup) as error:
            await evaluate_variants(model, cards, lambda _: None, engines)
        assert order == []
    said = str(chief(error.value))
    assert said.startswith("the engine reads text otherwise than it was calibrated: 'The quick' is 3 tokens")
    assert "(and 1 texts more); let it take the model's own tokenizer" in said


async def test_a_variant_that_is_served_whole_is_caught(
    model: ModelConfig, cards: list[Card], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    async with running(model, cards, monkeypatch, bits=16) as (engines, _):
        int4, bf16 = await evaluate_variants(model, cards, said.append, engines)
    assert (int4.state, bf16.state) == ("broken", "ready")
    assert "found no quantization config, the card says w4a16-g32" in int4.engine_words
    assert any("is broken, it is not what its card says: " in line for line in said)


async def test_equal_bits_pass_no_gate(
    model: ModelConfig, cards: list[Card], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    async with running(model, cards, monkeypatch, shift=0.0) as (engines, _):
        int4, _bf16 = await evaluate_variants(model, cards, said.append, engines)
    assert "equal the reference's in every bit" in int4.doubts[0]
    assert int4.gate["core"].outcome == Outcome.NOT_ENOUGH_EVIDENCE
    assert any(line.startswith("int4: suspicious: ") for line in said)


async def fails(error: Exception) -> str:
    raise error


async def test_want_of_room_leaves_a_card_as_it_was(model: ModelConfig, cards: list[Card]) -> None:
    registry = registry_of(model)
    said: list[str] = []
    short = EngineRoomError("ValueError: Free memory on device cuda:0 is less than desired")
    assert await unless_broken(registry, cards[0], fails(short), said.append) is None
    assert registry.card("int4").state == "ready"
    assert "was not measured, its card stays as it was: ValueError: Free memory" in said[-1]
    with pytest.raises(EngineRoomError):
        await unless_broken(registry, cards[1], fails(short), said.append)
    assert await unless_broken(registry, cards[0], fails(EngineLoadError("x", "no")), said.append) is None
    assert registry.card("int4").state == "broken"


def test_secrets_do_not_reach_a_card(model: ModelConfig) -> None:
    env = {"OMP_NUM_THREADS": "1", "HF_TOKEN": "hf_verysecret"}
    engine = model.engine.model_copy(update={"env": env, "extra_args": ("--api-key", "verysecret")})
    found = identity(replace(model, engine=engine), MACHINE)
    assert "verysecret" not in str(found)
    assert "OMP_NUM_THREADS=1" in found["env"]
