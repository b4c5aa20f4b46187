"""Sensitivity, planning and assembling on the demo model, measured on the real engine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantize.calibration import read_calibration
from quantize.checkpoint import open_checkpoint, weight_bytes
from quantize.evaluate.bench import Bench, BenchError
from quantize.fake import FakeModel, mean_kl, plan_choices
from quantize.plan import Plan
from quantize.planner import Planner
from quantize.sensitivity import ServedKl
from quantize.target import detect, target
from quantize.tune import tune, write_tuned
from quantize.workshop import Workshop

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "deploy/assistant/model"

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    log = tmp_path_factory.mktemp("bench") / "bench.log"
    with Bench(ROOT / ".venv-engine/bin/python", log, site=ROOT / "deploy/engine_site") as opened:
        yield opened


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    checkpoint = open_checkpoint(MODEL)
    calibration = read_calibration(ROOT / "deploy/assistant/data/calibration.jsonl", checkpoint)
    return Workshop(
        tmp_path_factory.mktemp("workshop"), checkpoint, calibration, target(detect()), methods=("imatrix",)
    )


def test_a_planned_variant_beats_the_uniform_ones_at_its_bytes(workshop: Workshop, bench: Bench) -> None:
    found = workshop.sensitivity(bench)
    assert len(found.rows) == sum(len(choices) for choices in workshop.choices().values())
    # Two ways to the same number: the gradient estimate and the measured divergence.
    ratios = [math.log(row.fisher / row.kl) for row in found.rows if row.kl > 1e-5]
    assert abs(sum(ratios) / len(ratios)) < 0.5

    planner = Planner(workshop.modules, found)
    served = ServedKl(workshop.fake, bench, workshop.choosing, workshop.directory / "served")
    uniform = {group.name: ("w4a16-g32", "imatrix") for group in workshop.modules}
    budget = planner.weight_bytes(uniform)
    best = workshop.within(bench, budget, tries=30, finalists=2)[0]
    assert best.weight_bytes <= budget
    assert best.served_kl is not None
    assert best.served_kl < served(uniform)

    out = workshop.directory / "best"
    workshop.shelf.assemble(best.plan, out)
    assert weight_bytes(out) == best.plan.weight_bytes(workshop.modules) == best.weight_bytes
    assert bench.load_error(out) is None


def test_tuning_lowers_the_loss_and_adds_no_byte(workshop: Workshop, bench: Bench) -> None:
    plan = Plan(groups={group.name: "w4a16-g128" for group in workshop.modules}, method="imatrix")
    out = workshop.directory / "tuned"
    workshop.shelf.assemble(plan, out)
    served = ServedKl(workshop.fake, bench, workshop.choosing, workshop.directory / "served")
    before = served(plan_choices(plan, workshop.modules))
    tuned = tune(workshop.fake, plan, out, workshop.calibration.sequences, steps=40)
    write_tuned(tuned, out)
    assert tuned.after < tuned.before
    assert weight_bytes(out) == plan.weight_bytes(workshop.modules)
    reference = workshop.directory / "served" / "reference.npy"
    after = bench.score(out, workshop.choosing, reference=reference)
    assert float(after.kl.mean()) < before
    # the model in torch is the reference again
    assert workshop.fake.kl({}, workshop.fake.log_probabilities()) == 0.0


def test_what_was_measured_is_kept(workshop: Workshop, bench: Bench) -> None:
    again = Workshop(
        workshop.directory.parent,
        workshop.checkpoint,
        read_calibration(ROOT / "deploy/assistant/data/calibration.jsonl", workshop.checkpoint),
        workshop.target,
        methods=("imatrix",),
    )
    before = (workshop.directory / "rows.jsonl").read_text(encoding="utf-8")
    with (workshop.directory / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"group": "model.lay')  # a run that was killed while it wrote
    assert again.sensitivity(bench) == workshop.sensitivity(bench)
    assert (workshop.directory / "rows.jsonl").read_text(encoding="utf-8").startswith(before)


def test_torch_and_engine_agree_on_four_bit_weights(workshop: Workshop, bench: Bench) -> None:
    plan = Plan(groups={group.name: "w4a16-g64-asym" for group in workshop.modules}, method="imatrix")
    fake: FakeModel = workshop.fake
    reference = fake.log_probabilities()
    with fake.swapped(plan_choices(plan, workshop.modules)):
        torch = mean_kl(reference, fake.log_probabilities())
    served = ServedKl(fake, bench, workshop.choosing, workshop.directory / "served")
    engine = served(plan_choices(plan, workshop.modules))
    if workshop.target.name == "vllm-cpu-amx":
        pytest.skip("this processor computes W4A16 with 8-bit inputs")
    assert engine == pytest.approx(torch, rel=0.2)


def test_an_fp8_cache_is_assembled_with_its_scales(workshop: Workshop, bench: Bench) -> None:
    plan = Plan(groups={group.name: "bf16" for group in workshop.modules}, kv="fp8", method="rtn")
    out = workshop.directory / "kv"
    workshop.shelf.assemble(plan, out)
    assert weight_bytes(out) == plan.weight_bytes(workshop.modules)
    assert bench.load_error(out, kv="fp8") is None


def test_the_reference_against_itself_is_exactly_the_same(workshop: Workshop, bench: Bench) -> None:
    saved = workshop.directory / "itself.npy"
    bench.score(MODEL, workshop.choosing[:5], save=saved)
    again = bench.score(MODEL, workshop.choosing[:5], reference=saved)
    assert again.kl.max() == 0.0


def test_an_engine_that_fails_says_so_and_the_next_one_runs(workshop: Workshop, bench: Bench) -> None:
    with pytest.raises(BenchError, match="nowhere"):
        bench.score(Path("/nowhere"), workshop.choosing[:1])
    assert bench.load_error(MODEL) is None
