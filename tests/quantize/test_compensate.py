"""Adapters that make up for what quantization lost: the best of their rank, put where they belong."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from quantize.compact import choose
from quantize.compact.compare import compare
from quantize.compact.compensate import Compensation, compensate, refuse_uncompensated
from quantize.compact.simulated import write_simulated
from quantize.compact.steps import CompactError
from quantize.core.checkpoint import open_checkpoint
from quantize.core.dequantize import linear_weight
from quantize.core.modules import Modules, read_modules
from quantize.core.plan import Plan, uniform
from quantize.core.schemes import scheme
from quantize.core.tensors import read_parts
from quantize.make.calibration import CalibrationSet, read_calibration
from quantize.make.smooth import ScaleStore
from quantize.make.variant import part_store
from quantize.train.adapters import changes
from tests.quantize.tiny import MODEL, make_checkpoint

CALIBRATION = MODEL.parent / "data/calibration.jsonl"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error_of_outputs(x: torch.Tensor, error: torch.Tensor) -> float:
    return float((x @ error.T).square().sum(1).mean())


@pytest.fixture
def lost() -> tuple[torch.Tensor, torch.Tensor]:
    """An error (48, 32), and inputs of it (tokens, 32) that go together and differ in size."""
    return normal(48, 32), normal(800, 32, seed=1) @ (normal(32, 32, seed=2) * torch.exp(normal(32, seed=3)))


def test_no_other_product_of_that_rank_leaves_less(lost: tuple[torch.Tensor, torch.Tensor]) -> None:
    error, x = lost
    moments = x.T @ x / len(x)
    found = choose.low_rank(error, 6, moments)
    least = error_of_outputs(x, error - found.product())
    # Eckart and Young: what is left is the energy of the singular values that are cut off.
    values = torch.linalg.svdvals(error @ choose.root(moments))
    assert least == pytest.approx(float(values[6:].square().sum()), rel=5e-3)
    generator = torch.Generator().manual_seed(4)
    for step in (1e-1, 1e-2):
        for _ in range(50):
            left, right = (
                one + step * one.std() * torch.randn(one.shape, generator=generator)
                for one in (found.left, found.right)
            )
            assert error_of_outputs(x, error - left @ right) > 0.999 * least
    for other in (choose.low_rank(error, 6), choose.low_rank(error, 6, moments.diagonal())):
        assert error_of_outputs(x, error - other.product()) > 1.02 * least


def test_a_higher_rank_never_leaves_more_and_the_full_one_nothing(
    lost: tuple[torch.Tensor, torch.Tensor],
) -> None:
    error, x = lost
    moments = x.T @ x / len(x)
    left = [
        error_of_outputs(x, error - choose.low_rank(error, rank, moments).product()) for rank in range(1, 33)
    ]
    assert all(more <= less * (1 + 1e-6) for less, more in itertools.pairwise(left))
    assert left[-1] < 1e-6 * left[0]


def test_errors_by_moments_are_those_of_outputs(lost: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, x = lost
    other = weight + 0.1 * normal(48, 32, seed=5)
    moments = x.T @ x / len(x)
    measured = float((x @ (other - weight).T).norm() / (x @ weight.T).norm())
    assert choose.relative_error(weight, other, moments) == pytest.approx(measured, rel=1e-3)


def test_inputs_of_no_full_rank_have_a_factor_still() -> None:
    x = normal(4, 32)
    found = choose.low_rank(normal(8, 32, seed=1), 4, x.T @ x / 4)
    assert bool(found.product().isfinite().all())


class Quantized:
    """The demo model by one plan, with its smoothing scales."""

    def __init__(self, directory: Path, scheme_name: str, method: str) -> None:
        self.checkpoint = open_checkpoint(MODEL)
        self.modules: Modules = read_modules(self.checkpoint)
        everything = read_calibration(CALIBRATION, self.checkpoint)
        self.calibration = CalibrationSet(everything.sequences[:48], everything.description)
        self.held_out = [(ids, 1) for ids in everything.sequences[48:64]]
        self.plan: Plan = uniform(self.modules, scheme_name, method=method)
        store = part_store(directory, self.checkpoint, self.modules, self.calibration)
        self.directory = directory / "variant"
        store.assemble(self.plan, self.directory)
        self.scales: ScaleStore | None = store.smoothing if "smooth" in method else None

    def compensated(self, rank: int, out: Path) -> Compensation:
        return compensate(
            self.checkpoint,
            self.modules,
            self.plan,
            self.directory,
            self.scales,
            self.calibration.sequences,
            rank,
            out,
        )

    def kl(self, out: Path, adapter: Path | None = None) -> float:
        write_simulated(self.checkpoint, self.modules, self.plan, self.directory, out, adapter)
        return compare(self.checkpoint, open_checkpoint(out), self.held_out).kl


@pytest.fixture(scope="module")
def smoothed(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """At 3 bits, in another basis than the checkpoint's own."""
    return Quantized(tmp_path_factory.mktemp("smoothed"), "w3a16-g32-asym", "smooth+imatrix")


def test_more_rank_brings_a_model_nearer_to_what_it_was(smoothed: Quantized, tmp_path: Path) -> None:
    lost, errors = [smoothed.kl(tmp_path / "none")], list[float]()
    for rank in (8, 32):
        adapter = tmp_path / str(rank)
        found = smoothed.compensated(rank, adapter)
        assert all(row.after < row.before for row in found.matrices)
        errors += [found.before, found.after]
        lost.append(smoothed.kl(tmp_path / "with", adapter))
    assert errors[0] == errors[2] > errors[1] > errors[3]
    assert lost[0] > lost[1] > lost[2]
    assert lost[2] < 0.7 * lost[0]


def test_an_adapter_is_one_of_pefts_and_says_what_it_is(smoothed: Quantized, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    found = smoothed.compensated(8, adapter)
    linears = {one.name: one for one in smoothed.modules.linears}
    stored = read_parts(smoothed.directory)
    for change in changes(adapter):
        linear = linears.pop(change.module)
        assert change.scale == 1
        assert change.a.shape == (8, linear.in_features)
        assert change.a.dtype == torch.bfloat16
        lost = linear_weight(stored, change.module, scheme("w3a16-g32-asym"))
        assert change.added().shape == lost.shape
    assert not linears
    assert (
        found.bytes
        == 2 * found.numbers
        == 2 * 8 * sum(one.in_features + one.out_features for one in smoothed.modules.linears)
    )
    assert Compensation.model_validate_json((adapter / "compensation.json").read_text()) == found
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 8


def test_a_simulated_variant_is_what_its_numbers_stand_for(tmp_path: Path) -> None:
    plain = Quantized(tmp_path / "plain", "w8a16-g32", "rtn")
    assert 0 < plain.kl(tmp_path / "out") < 1e-4
    made, stored = read_parts(tmp_path / "out"), read_parts(plain.directory)
    assert made.keys() == read_parts(MODEL).keys()
    name = plain.modules.linears[0].name
    weight = linear_weight(stored, name, scheme("w8a16-g32"))
    assert torch.equal(linear_weight(made, name, scheme("bf16")), weight.bfloat16().float())


@pytest.mark.parametrize(
    ("rank", "words"),
    [(0, "from 1 to 512"), (600, "from 1 to 512"), (64, "the whole matrix; take less")],
)
def test_ranks_that_are_none_are_said_before_work(tmp_path: Path, rank: int, words: str) -> None:
    modules = read_modules(open_checkpoint(make_checkpoint(tmp_path / "tiny")))
    with pytest.raises(CompactError, match=words):
        refuse_uncompensated(modules, rank)


def test_there_is_nothing_to_make_up_for_in_16_bits(tmp_path: Path) -> None:
    tiny = open_checkpoint(make_checkpoint(tmp_path / "tiny"))
    modules = read_modules(tiny)
    with pytest.raises(CompactError, match="nothing to make up for"):
        compensate(tiny, modules, uniform(modules, "bf16"), tiny.path, None, [[1, 2]], 4, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_experts_get_no_adapters(tmp_path: Path) -> None:
    modules = read_modules(open_checkpoint(make_checkpoint(tmp_path / "moe", "qwen3_moe")))
    with pytest.raises(CompactError, match="give a dense model"):
        refuse_uncompensated(modules, 4)
