"""The real engine's account of itself: of a variant as it is, and of one that is not what its card says."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest

from deploy.engine import EngineProcess, EngineSpec, free_port, running
from deploy.engine_account import ServedOtherwiseError, checked_account, refuse_otherwise
from deploy.models import one_model
from gateway.config import load_config
from quantize.core.checkpoint import open_checkpoint
from quantize.core.modules import read_modules
from quantize.registry import Registry
from tests.deploy.test_supervisor import ROOT
from tests.e2e.conftest import Stack
from tests.quantize.tiny import make_checkpoint


@pytest.mark.engine
async def test_whole_weights_under_a_4_bit_card_are_caught(tmp_path: Path) -> None:
    model = one_model(load_config(ROOT / "tiercel.yaml"))
    registry = Registry(tmp_path, model.name, model.reference)
    checkpoint = open_checkpoint(model.path)
    card = registry.add_reference(checkpoint)
    port = free_port(model.engine.host)
    spec = EngineSpec(card, registry.path("bf16"), model.engine, port, tmp_path / "engine.log")
    modules = read_modules(checkpoint)
    async with running(spec, print) as engine:
        account = await refuse_otherwise(engine)
        assert account is not None
        (kernel,) = account.kernels.values()
        assert kernel.count == len(modules.groups)
        assert kernel.bits == 16
        assert kernel.bytes == sum(2 * group.weights for group in modules)
        assert (account.quantization, account.kv_dtype) == ("none", "bfloat16")
        bits = {linear.name: 4 for linear in modules.linears}
        wrong = card.model_copy(
            update={"variant": "int4", "scheme": "w4a16-g64", "weight_bits": 4, "module_bits": bits}
        )
        with pytest.raises(ServedOtherwiseError, match=r"int4 .* no quantization config.* says w4a16-g64"):
            await checked_account(wrong, spec.url)
        with pytest.raises(ServedOtherwiseError, match="the KV cache is bfloat16, the card says fp8"):
            await checked_account(card.model_copy(update={"kv": "fp8"}), spec.url)
        await refuse_cutting(engine)


async def refuse_cutting(engine: EngineProcess) -> None:
    """An engine that is drained says so to who asks after its health, and finishes what it has begun."""
    body = {"model": "assistant", "prompt": "go on", "max_tokens": 60, "ignore_eos": True}
    async with aiohttp.ClientSession() as http:
        async with http.get(engine.spec.url + "/health") as healthy:
            assert healthy.status == 200
        begun = asyncio.create_task(http.post(engine.spec.url + "/v1/completions", json=body))
        async with asyncio.timeout(60):
            while await engine.until_idle(0.01):
                await asyncio.sleep(0.01)
        assert await engine.drain()
        async with http.get(engine.spec.url + "/health") as draining:
            assert draining.status == 503
        assert await engine.until_idle(60)
        async with await begun as answer:
            assert answer.status == 200
            assert (await answer.json())["usage"]["completion_tokens"] == 60


@pytest.mark.engine
async def test_an_engine_starts_whose_longest_prompt_would_just_fill_a_cache(tmp_path: Path) -> None:
    """131,072 tokens of 8 KiB are a GiB, of which vLLM keeps a block to itself."""
    shape = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
    directory = make_checkpoint(tmp_path / "wide", max_position_embeddings=131_072, **shape)
    checkpoint, registry = open_checkpoint(directory), Registry(tmp_path / "variants", "wide", "bf16")
    card = registry.add_reference(checkpoint)
    assert card.max_model_len * card.kv_bytes_per_token == 1 << 30
    settings = load_config(ROOT / "tiercel.yaml").engine.model_copy(update={"max_model_len": None})
    settings = settings.model_copy(update={"kv_cache_gib": None})
    port = free_port(settings.host)
    spec = EngineSpec(card, registry.path("bf16"), settings, port, tmp_path / "engine.log")
    async with (
        running(spec, print) as engine,
        aiohttp.ClientSession() as http,
        http.get(engine.spec.url + "/v1/models") as models,
    ):
        assert (await models.json())["data"][0]["max_model_len"] == 131_072


@pytest.mark.engine
def test_cards_hold_what_was_served(stack: Stack) -> None:
    accounts = {name: card.account for name, card in stack.cards.items()}
    bits = {}
    for name, account in accounts.items():
        assert account is not None, name
        assert account.source == "workers"
        bits[name] = {kernel.bits for kernel in account.kernels.values()}
    assert bits == {"bf16": {16}, "int8": {8}, "int4": {4}, "int4-kv8": {4}}
    served = accounts["int4-kv8"]
    assert served is not None
    assert served.kv_dtype.startswith("fp8")
