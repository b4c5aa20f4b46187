"""Scales and norms are trained from values that are rounded to what is stored, each at another place."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from quantize.card import Calibration
from quantize.core.checkpoint import open_checkpoint
from quantize.core.modules import read_modules
from quantize.core.plan import uniform
from quantize.make.calibration import CalibrationSet
from quantize.make.parts import PartStore
from quantize.plan.simulated import SimulatedModel
from quantize.plan.tune import spread, tune
from tests.quantize.tiny import VOCABULARY, make_checkpoint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_stored_is_what_it_was(dtype: torch.dtype) -> None:
    stored = torch.cat([torch.randn(4096) * 10.0**power for power in (-3, 0, 3)]).to(dtype)
    stored = torch.cat([stored, torch.tensor([0.0, 1.0, 2.0, -4.0, torch.finfo(dtype).tiny], dtype=dtype)])
    assert torch.equal(spread(stored).to(dtype), stored)


def test_a_small_change_of_all_values_moves_the_share_of_them_that_it_should() -> None:
    """A quarter of the distance to the next one moves a quarter of them, where all or none would move of the
    stored values themselves."""
    stored = (1 + torch.rand(20_000)).to(torch.bfloat16)
    step = 2.0**-7
    inner = (stored > 1) & (stored < 2)
    for share in (0.25, 0.5):
        moved = (spread(stored) + share * step).to(torch.bfloat16) != stored
        assert moved[inner].float().mean().item() == pytest.approx(share, abs=0.02)
        assert not ((stored.float() + 0.49 * step).to(torch.bfloat16) != stored)[inner].any()


def test_values_in_32_bits_stay() -> None:
    stored = torch.randn(64)
    assert torch.equal(spread(stored), stored)


def test_tuning_takes_off_some_of_the_loss_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "model"))
    modules = read_modules(checkpoint)
    rng = random.Random(0)
    sequences = [[rng.randrange(3, VOCABULARY) for _ in range(16)] for _ in range(24)]
    described = Calibration(source="random", sha256="0" * 64, samples=24, tokens=24 * 16)
    parts = PartStore(tmp_path / "parts", checkpoint, modules, CalibrationSet(sequences, described))
    plan = uniform(modules, "w4a16-g128", method="rtn")
    parts.assemble(plan, tmp_path / "out")
    model = SimulatedModel(parts, [(sequence, 1) for sequence in sequences])
    tuned = tune(model, plan, tmp_path / "out", sequences, steps=12)
    assert tuned.after < 0.97 * tuned.before
    assert model.kl({}, model.log_probabilities()) == 0.0
