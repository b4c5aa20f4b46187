"""llama.cpp as ``tiercel up`` starts it, and the gate on what it measured beside vLLM's reference."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from deploy.engine import EngineSpec, free_port, running
from deploy.engine_account import checked_account
from gateway.config import Engine as EngineSettings
from quantize.core.checkpoint import open_checkpoint
from quantize.evaluate.client import EngineClient
from quantize.export.variant import add_gguf
from quantize.registry import Registry
from tests.quantize.tiny import MODEL, without_added_words

pytestmark = pytest.mark.engine


def test_tiercel_starts_llama_cpp_and_it_serves_what_the_card_says(tmp_path: Path) -> None:
    directory = without_added_words(shutil.copytree(MODEL, tmp_path / "model"))
    checkpoint = open_checkpoint(directory)
    registry = Registry(tmp_path / "variants", "demo", "bf16")
    registry.add_reference(checkpoint)
    card = add_gguf(registry, checkpoint, "gguf-q8_0", "q8_0")
    spec = EngineSpec(
        card=card,
        directory=registry.path("gguf-q8_0"),
        settings=EngineSettings(max_model_len=512, env={"OMP_NUM_THREADS": "1"}),
        port=free_port("127.0.0.1"),
        log=tmp_path / "engine.log",
    )
    asyncio.run(_serves(spec))


async def _serves(spec: EngineSpec) -> None:
    messages = [
        {"role": "system", "content": "Classify the intent of the message."},
        {"role": "user", "content": "when is my credit card bill due"},
    ]
    async with running(spec, print) as engine, EngineClient(spec.url, "demo") as client:
        account = await checked_account(spec.card, spec.url)
        assert account is not None
        assert (account.quantization, account.kernels.keys()) == ("gguf", {"Q8_0"})
        assert await client.answer(messages, 8) == "bill_due"
        assert (await client.version()).startswith("b")
        assert await engine.drain()
        assert await engine.until_idle(10)
        assert engine.exit_code is None
    assert engine.exit_code is not None
