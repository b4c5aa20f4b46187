"""The real engine's account of itself: of a variant as it is, and of one that is not what its card says."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.engine import EngineSpec, free_port, running
from deploy.engine_account import ServedOtherwiseError, checked_account, refuse_otherwise
from gateway.config import load_config
from quantize.core.checkpoint import open_checkpoint
from quantize.core.modules import read_modules
from quantize.registry import Registry
from tests.deploy.test_supervisor import ROOT
from tests.e2e.conftest import Stack


@pytest.mark.engine
async def test_whole_weights_under_a_4_bit_card_are_caught(tmp_path: Path) -> None:
    config = load_config(ROOT / "tiercel.yaml")
    registry = Registry(tmp_path, config.model.name, config.reference)
    checkpoint = open_checkpoint(config.model.path)
    card = registry.add_reference(checkpoint)
    spec = EngineSpec(
        card, registry.path("bf16"), "127.0.0.1", free_port("127.0.0.1"), tmp_path / "engine.log"
    )
    modules = read_modules(checkpoint)
    async with running(spec, config.engine, print) as engine:
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
