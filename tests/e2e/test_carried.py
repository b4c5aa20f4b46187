"""A quantized variant that carries an adapter is served, and scored, with it on the real engine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from deploy.engine import WITHOUT_ADAPTER, EngineSpec, free_port, running
from deploy.engine_account import refuse_otherwise
from deploy.models import one_model
from gateway.config import load_config
from quantize.card import Card
from quantize.core.checkpoint import Checkpoint, open_checkpoint
from quantize.core.modules import read_modules
from quantize.core.plan import uniform
from quantize.evaluate.client import EngineClient
from quantize.evaluate.tasks import Item
from quantize.make.calibration import read_calibration
from quantize.make.variant import part_store
from quantize.register.carried import Carrying
from quantize.registry import Registry
from quantize.train.adapters import Lora
from quantize.train.data import Examples, encode, of_item
from quantize.train.loop import Settings
from quantize.train.merge import merge
from quantize.train.run import Job, run
from tests.deploy.test_supervisor import ROOT

pytestmark = pytest.mark.engine


def _examples(checkpoint: Checkpoint, first: int) -> Examples:
    """Answers that the demo model would never give by itself."""
    lines = []
    for number in range(first, first + 8):
        messages = (
            {"role": "system", "content": "Classify the intent of the message."},
            {"role": "user", "content": f"what is my balance of account {number}"},
        )
        lines.append(of_item(Item(messages=messages, expected="weather"), str(number)))
    return encode(lines, checkpoint, 96)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Checkpoint, Path, list[int]]:
    """The demo model, the same with an adapter merged into it, the adapter, and a conversation's tokens."""
    out = tmp_path_factory.mktemp("trained")
    base = open_checkpoint(one_model(load_config(ROOT / "tiercel.yaml")).path)
    held_out = _examples(base, 100)
    settings = Settings(steps=10, learning_rate=3e-3, batch=8)
    job = Job("lora", base, _examples(base, 0), held_out, settings, out / "run", Lora(rank=8, alpha=16))
    torch.set_num_threads(1)
    record = run(dataclasses.replace(job, device="cpu"), print)
    assert record.held_out.right.good == 8
    merge(base, out / "run" / "adapter", out / "merged")
    return base, open_checkpoint(out / "merged"), out / "run" / "adapter", list(held_out.examples[0].ids)


def _carried(
    base: Checkpoint, merged: Checkpoint, adapter: Path, scheme: str, method: str, out: Path
) -> tuple[Card, Path]:
    of_base, registry = Registry(out / "base", "base", "bf16"), Registry(out / "merged", "merged", "bf16")
    carrier, scales, modules = of_base.add_reference(base), None, read_modules(base)
    if scheme != "bf16":
        calibration = read_calibration(ROOT / "deploy/assistant/data/calibration.jsonl", base)
        carrier = of_base.add(base, "small", uniform(modules, scheme, method=method), calibration)
        if method != "rtn":
            store = part_store(of_base.directory, base, modules, calibration).smoothing
            scales = store.everything(modules.layers)
    registry.add_reference(merged)
    directory = of_base.path(carrier.variant, carrier.version)
    card = registry.carry("carried", Carrying(adapter, carrier, directory, base, merged, scales))
    return card, registry.path("carried", card.version)


def _by_torch(checkpoint: Checkpoint, tokens: list[int]) -> NDArray[np.float64]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    came = logits.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    return np.asarray(came.double().numpy())


@pytest.mark.parametrize(
    ("scheme", "method"),
    [("bf16", "none"), ("w8a8", "rtn"), ("w4a16-g64", "rtn"), ("w8a8", "smooth+rtn")],
)
async def test_a_variant_is_served_and_scored_with_the_adapter_that_it_carries(
    trained: tuple[Checkpoint, Checkpoint, Path, list[int]], scheme: str, method: str, tmp_path: Path
) -> None:
    base, merged, adapter, tokens = trained
    card, directory = _carried(base, merged, adapter, scheme, method, tmp_path)
    assert card.adapter is not None
    settings = one_model(load_config(ROOT / "tiercel.yaml")).engine
    spec = EngineSpec(card, directory, settings, free_port("127.0.0.1"), tmp_path / "engine.log")
    async with running(spec, print) as engine, EngineClient(spec.url, card.model) as client:
        account = await refuse_otherwise(engine)
        assert account is not None
        scored, _ = await client.score_and_keep(tokens, 1)
        body = {"prompt": tokens, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        said = {}
        for name in (card.model, f"{card.model}{WITHOUT_ADAPTER}"):
            rows = (await client._post("/v1/completions", {**body, "model": name}))["choices"][0]
            found = zip(rows["prompt_logprobs"][1:], tokens[1:], strict=True)
            said[name] = np.array([row[str(token)]["logprob"] for row, token in found])
    wanted = _by_torch(merged, tokens)
    with_adapter, without = (float(np.abs(one - wanted).mean()) for one in said.values())
    assert scored.came == pytest.approx(said[card.model], abs=1e-3)
    assert with_adapter < 0.3 * without
