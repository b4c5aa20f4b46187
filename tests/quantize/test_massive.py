"""A block that writes a massive activation is found, and its down projection keeps 16 bits."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Any

import pytest

from quantize.card import Calibration
from quantize.core.checkpoint import open_checkpoint
from quantize.core.modules import read_modules
from quantize.core.plan import uniform
from quantize.make.calibration import CalibrationSet
from quantize.make.massive import massive_blocks, rounds_inputs, spared
from quantize.make.parts import PartStore
from tests.quantize.tiny import make_checkpoint

torch = pytest.importorskip("torch")

SPECIAL = 7
SEQUENCE = [SPECIAL, *range(20, 60)]


def with_massive(directory: Path, layer: int) -> Path:
    """A model whose block ``layer`` gives one token a residual that is thousands of times the others'."""
    from safetensors.torch import load_file, save_file

    make_checkpoint(directory, num_hidden_layers=3, tie_word_embeddings=False)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][:, 0] = 0.0
    tensors["model.embed_tokens.weight"][SPECIAL] = 0.0
    tensors["model.embed_tokens.weight"][SPECIAL, 0] = 0.2
    for number in range(3):
        tensors[f"model.layers.{number}.self_attn.o_proj.weight"].zero_()
    mlp = f"model.layers.{layer}.mlp"
    for name in ("gate_proj", "up_proj"):  # a neuron that channel 0 alone turns on
        tensors[f"{mlp}.{name}.weight"][9] = 0.0
        tensors[f"{mlp}.{name}.weight"][9, 0] = 4.0
    tensors[f"{mlp}.down_proj.weight"][3, 9] = 5.0
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("layer", [0, 1])
def test_the_block_that_writes_it_is_found_and_no_other(tmp_path: Path, layer: int) -> None:
    checkpoint = open_checkpoint(with_massive(tmp_path / "model", layer))
    modules = read_modules(checkpoint)
    assert list(massive_blocks(checkpoint, modules, SEQUENCE)) == [layer]
    assert not massive_blocks(checkpoint, modules, SEQUENCE[1:])


def test_an_ordinary_model_has_none(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "model"))
    assert not massive_blocks(checkpoint, read_modules(checkpoint), SEQUENCE)


def test_only_down_projections_with_rounded_inputs_are_spared(tmp_path: Path) -> None:
    modules = read_modules(open_checkpoint(make_checkpoint(tmp_path / "model", num_hidden_layers=3)))
    plan = uniform(modules, "w8a8")
    changed = spared(plan, modules, (1,))
    assert {name for name, one in changed.groups.items() if one == "bf16"} == {"model.layers.1.mlp.down_proj"}
    assert rounds_inputs(plan)
    for other in ("w4a16-g32", "fp8-dynamic"):
        assert not rounds_inputs(uniform(modules, other))
        assert spared(uniform(modules, other), modules, (1,)) == uniform(modules, other)


def test_it_is_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(with_massive(tmp_path / "model", 1))
    described = Calibration(source="made up", sha256="0" * 64, samples=1, tokens=len(SEQUENCE))

    def store() -> PartStore:
        calibration = CalibrationSet([SEQUENCE], described)
        return PartStore(tmp_path / "parts", checkpoint, read_modules(checkpoint), calibration)

    def alone(*given: Any) -> Any:
        with (tmp_path / "parts" / ".lock").open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return massive_blocks(*given)

    monkeypatch.setattr("quantize.make.parts.massive_blocks", alone)
    assert store().massive == (1,)
    monkeypatch.setattr("quantize.make.parts.massive_blocks", lambda *_: pytest.fail("looked for again"))
    assert store().massive == (1,)
