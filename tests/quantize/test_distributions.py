"""Figures of weights and activations come from the files and from a real pass through the model."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize.core.checkpoint import Checkpoint, open_checkpoint
from quantize.core.modules import read_modules
from quantize.report.distributions import (
    Inputs,
    compute_distributions,
    load_distributions,
    outliers,
    save_distributions,
)
from tests.quantize.tiny import make_checkpoint

SEQUENCES = [list(range(5, 45)), list(range(100, 130))]
CHANNEL, FACTOR = 3, 32.0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(make_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def folded(base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same function with one channel of the first norm scaled up, as a transform would scale it down."""
    path = tmp_path_factory.mktemp("folded") / "variant"
    shutil.copytree(base.path, path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][CHANNEL] *= FACTOR
    for name in ("q_proj", "k_proj", "v_proj"):
        tensors[f"model.layers.0.self_attn.{name}.weight"][:, CHANNEL] /= FACTOR
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_a_transform_in_the_norms_is_seen_in_the_activations(base: Checkpoint, folded: Path) -> None:
    modules = read_modules(base)
    figures = compute_distributions(base, modules, folded, {}, Inputs(base, modules, SEQUENCES))
    assert figures.tokens == 70
    groups = {(group.layer, group.kind): group for group in figures.groups}
    changed = groups[0, "self_attn.qkv_proj"]
    assert changed.activations is not None
    assert changed.activations.channels == 128
    assert (changed.activations.outliers_before, changed.activations.outliers_after) == ((), (CHANNEL,))
    assert changed.activations.after[0] > 8 * changed.activations.before[0]
    assert changed.weights.relative_error == pytest.approx((1 / 128) ** 0.5, rel=0.3)  # one column of 128
    other = groups[1, "mlp.down_proj"]
    assert other.activations is not None  # the function is the same, so what comes after is as well
    assert other.activations.before == pytest.approx(other.activations.after, rel=0.02)
    assert other.weights.relative_error == 0


def test_figures_are_kept_whole_or_computed_again(base: Checkpoint, folded: Path, tmp_path: Path) -> None:
    figures = compute_distributions(base, read_modules(base), folded, {}, variant="v", version="0" * 12)
    path = tmp_path / ".distributions" / "v.json"
    assert load_distributions(path) is None
    save_distributions(figures, path)
    assert load_distributions(path) == figures
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    assert load_distributions(path) is None


def test_outliers_are_far_beyond_the_median_channel() -> None:
    largest = torch.tensor([1.0, 1.2, 7.0, 0.8, 30.0, 1.0, 5.9])
    assert outliers(largest) == (4,)  # the median is 1.2, so that 7.0 is not beyond 7.2
    assert outliers(torch.ones(8)) == ()
