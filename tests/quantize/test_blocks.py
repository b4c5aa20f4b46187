"""The model in blocks is the one that engines serve, has not seen padding, and computes on one device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantize.check import refuse_short
from quantize.core.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from quantize.core.cost import Cost
from quantize.core.loading import load_model
from quantize.core.modules import read_modules
from quantize.make.blocks import Blocks, States
from quantize.make.kv_scales import kv_scales
from quantize.make.statistics import observe
from quantize.make.streaming import QuantizeError
from quantize.plan.cost import planning_cost
from tests.quantize.test_check import IDLE, rounded_cost, write_model
from tests.quantize.tiny import VOCABULARY, make_checkpoint

torch = pytest.importorskip("torch")


def sequences(lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def changed(directory: Path, **factors: Any) -> None:
    """Multiply the tensors with that in their names."""
    from safetensors.torch import load_file, save_file

    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        for part, factor in factors.items():
            if part in name:
                tensor.copy_(tensor.float() * factor)
    save_file(tensors, file, metadata={"format": "pt"})


def logits_of(checkpoint: Checkpoint, given: list[list[int]]) -> tuple[States, dict[int, Any]]:
    """By sequence, as blocks give them."""
    blocks = Blocks(checkpoint, read_modules(checkpoint), "cpu", torch.float32)
    states = blocks.start(given)
    for layer in range(len(blocks)):
        with blocks.loaded(layer):
            blocks.forward(layer, states)
    found = {}
    with torch.no_grad(), blocks.head_only() as head:
        for batch in states.batches:
            for line, (number, length) in enumerate(zip(batch.numbers, batch.lengths, strict=True)):
                found[number] = head(batch.hidden[line : line + 1, :length])
    return states, found


def test_a_cap_on_attention_is_kept_with_padding_and_sliding_windows(tmp_path: Path) -> None:
    """transformers' fast kernel leaves Gemma 2's out; engines apply it."""
    from transformers import AutoModelForCausalLM

    path = make_checkpoint(
        tmp_path / "model", "gemma2", sliding_window=16, attn_logit_softcapping=2.0, query_pre_attn_scalar=1
    )
    changed(path, q_proj=4.0, k_proj=4.0)
    given = sequences((5, 20, 40, 90))
    states, found = logits_of(open_checkpoint(path), given)
    assert any(len(batch.numbers) > 1 for batch in states.batches), "some are padded"

    def whole(how: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=how).eval()

    right, without = whole("eager"), whole("sdpa")
    loaded = load_model(open_checkpoint(path), torch.float32)
    with torch.no_grad():
        for number, tokens in enumerate(given):
            ids = torch.tensor([tokens])
            wanted = right(ids).logits
            torch.testing.assert_close(found[number], wanted, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(loaded(ids).logits, wanted, rtol=1e-3, atol=1e-4)
        assert (without(ids).logits - wanted).norm() > 0.01 * wanted.norm()


def test_other_models_keep_the_fast_kernel(tmp_path: Path) -> None:
    for name in ("llama", "gemma2"):
        checkpoint = open_checkpoint(make_checkpoint(tmp_path / name, name, attn_logit_softcapping=None))
        blocks = Blocks(checkpoint, read_modules(checkpoint), "cpu")
        for model in (blocks.model, load_model(checkpoint, torch.float32)):
            assert model.config._attn_implementation == "sdpa"


def test_the_largest_keys_and_values_are_not_those_of_padding(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = make_checkpoint(tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][0] = 0.0  # what padding is made of
    tensors["model.embed_tokens.weight"][0, 7] = 5.0
    for leaf in ("k_proj", "v_proj"):
        tensors[f"model.layers.0.self_attn.{leaf}.weight"][:, 7] *= 30
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(path)
    blocks = Blocks(checkpoint, read_modules(checkpoint), "cpu", torch.float32)
    found = []
    for alone in (False, True):
        states = blocks.start(sequences((20, 40)), alone=alone)
        assert len(states.batches) == 1 + alone
        with blocks.loaded(0):
            found.append(observe(blocks, 0, states, [], []))
    assert found[0].keys == pytest.approx(found[1].keys, rel=1e-5)
    torch.testing.assert_close(found[0].values, found[1].values)


def test_a_cache_whose_keys_or_values_are_not_finite_gets_no_scales(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model")
    changed(path, **{"layers.0.self_attn.k_proj": float("nan")})
    checkpoint = open_checkpoint(path)
    modules = read_modules(checkpoint)
    blocks = Blocks(checkpoint, modules, "cpu")
    with blocks.loaded(0):
        found = observe(blocks, 0, blocks.start(sequences((20, 40)), alone=True), [], [])
    with pytest.raises(QuantizeError, match=r"keys or values of model\.layers\.0\.self_attn are not finite"):
        kv_scales({0: (found.keys, found.values)}, modules, checkpoint, None)


def test_making_has_the_room_of_one_gpu_and_an_engine_that_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four of 24 GB: parts are made on the first of them, and a model is served on as many as it needs."""
    monkeypatch.setattr("quantize.make.blocks.best_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (24 * 10**9, 24 * 10**9))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    checkpoint = write_model(tmp_path / "model")
    modules = read_modules(checkpoint)
    made, choices = rounded_cost(checkpoint), {group.name: [("w4a16-g64", "mse")] for group in modules}
    plan = planning_cost(checkpoint, modules, choices, [64], [64], rates=IDLE)
    assert made.making_bytes == made.memory_bytes
    assert plan.making_bytes < plan.memory_bytes - 2 * 10**9

    def taking(cost: Cost, more: int, model: int = 0) -> Cost:
        memory, engine = cost.memory_bytes + more + model, cost.engine_bytes + model
        return cost.model_copy(update={"memory_bytes": memory, "engine_bytes": engine})

    refuse_short([taking(made, 20 * 10**9), taking(plan, 0, model=60 * 10**9)], tmp_path)
    for cost, free in (
        (taking(made, 30 * 10**9), 24),
        (taking(plan, 30 * 10**9), 24),
        (taking(plan, 0, model=95 * 10**9), 96),
    ):
        with pytest.raises(CheckpointError, match=rf"memory: calibration needs .*, free are {free}\.00 GB"):
            refuse_short(cost, tmp_path)
