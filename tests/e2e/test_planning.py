"""Sensitivity, planning and assembling on the demo model, measured on the real engine."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from quantize.card import Calibration
from quantize.check import check_report, format_check
from quantize.core.checkpoint import open_checkpoint, weight_bytes
from quantize.core.modules import HEAD
from quantize.core.plan import Plan
from quantize.core.targets import detect, target
from quantize.evaluate.bench import Bench, BenchError
from quantize.make.calibration import CalibrationSet, read_calibration
from quantize.plan.planner import Planner
from quantize.plan.served import ServedKl
from quantize.plan.session import PlanningSession
from quantize.plan.simulated import SimulatedModel, plan_choices
from quantize.plan.tune import tune, write_tuned
from tests.quantize.tiny import VOCABULARY, make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "deploy/assistant/model"

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    log = tmp_path_factory.mktemp("bench") / "bench.log"
    with Bench(ROOT / ".venv-engine/bin/python", log, site=ROOT / "deploy/engine_site") as opened:
        yield opened


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> PlanningSession:
    checkpoint = open_checkpoint(MODEL)
    calibration = read_calibration(ROOT / "deploy/assistant/data/calibration.jsonl", checkpoint)
    return PlanningSession(
        tmp_path_factory.mktemp("session"), checkpoint, calibration, target(detect()), methods=("imatrix",)
    )


def served_kl(session: PlanningSession, bench: Bench) -> ServedKl:
    return ServedKl(session.parts, bench, session.choosing, session.directory / "served")


def in_blocks(session: PlanningSession, scheme: str) -> dict[str, str]:
    """That scheme for all groups of the blocks; a head stays at 16 bits."""
    return {group.name: "bf16" if group.kind == HEAD else scheme for group in session.modules}


def test_a_planned_variant_beats_the_uniform_ones_at_its_bytes(
    session: PlanningSession, bench: Bench
) -> None:
    found = session.sensitivity(bench)
    assert len(found.rows) == sum(len(choices) for choices in session.choices().values())
    # Estimates add up to what the engine measures of uniform variants, within a factor of two.
    by_scheme: dict[str, float] = {}
    for row in found.rows:
        by_scheme[f"{row.scheme}@{row.method}"] = by_scheme.get(f"{row.scheme}@{row.method}", 0) + row.fisher
    for name, measured in found.uniform.items():
        if name.startswith("w4"):
            assert 0.5 < measured / by_scheme[name] < 2

    planner = Planner(session.modules, found)
    served = served_kl(session, bench)
    uniform = {name: (how, "imatrix") for name, how in in_blocks(session, "w4a16-g32").items()}
    budget = planner.weight_bytes(uniform)
    best = session.within(bench, budget, tries=4)[0]
    assert best.weight_bytes <= budget
    assert best.served_kl is not None
    assert best.served_kl < served(uniform)

    out = session.directory / "best"
    session.parts.assemble(best.plan, out)
    assert weight_bytes(out) == best.plan.weight_bytes(session.modules) == best.weight_bytes
    assert bench.load_error(out) is None
    linked = session.directory / "linked"
    session.parts.link(best.plan, linked)
    whole = bench.score(out, session.choosing[:3])
    assert (bench.score(linked, session.choosing[:3]).logp == whole.logp).all()


def test_tuning_lowers_the_loss_and_adds_no_byte(session: PlanningSession, bench: Bench) -> None:
    plan = Plan(groups=in_blocks(session, "w4a16-g128"), method="imatrix")
    out = session.directory / "tuned"
    session.parts.assemble(plan, out)
    served = served_kl(session, bench)
    before = served(plan_choices(plan, session.modules))
    tuned = tune(session.simulated, plan, out, session.calibration.sequences, steps=40)
    write_tuned(tuned, out)
    assert tuned.after < tuned.before
    assert weight_bytes(out) == plan.weight_bytes(session.modules)
    (reference,) = (session.directory / "served").glob("reference-*.npz")
    after = bench.score(out, session.choosing, reference=reference)
    assert float(after.kl.mean()) < before
    # the model in torch is the reference again
    assert session.simulated.kl({}, session.simulated.log_probabilities()) == 0.0


def test_what_was_measured_is_kept(session: PlanningSession, bench: Bench) -> None:
    again = PlanningSession(
        session.directory.parent,
        session.checkpoint,
        read_calibration(ROOT / "deploy/assistant/data/calibration.jsonl", session.checkpoint),
        session.target,
        methods=("imatrix",),
    )
    before = (session.directory / "rows.jsonl").read_text(encoding="utf-8")
    with (session.directory / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"group": "model.lay')  # a run that was killed while it wrote
    assert again.sensitivity(bench) == session.sensitivity(bench)
    assert (session.directory / "rows.jsonl").read_text(encoding="utf-8").startswith(before)


def test_torch_and_engine_agree_on_four_bit_weights(session: PlanningSession, bench: Bench) -> None:
    plan = Plan(groups=in_blocks(session, "w4a16-g64-asym"), method="imatrix")
    fake: SimulatedModel = session.simulated
    reference = fake.log_probabilities()
    with fake.swapped(plan_choices(plan, session.modules)):
        torch = fake.divergence(reference)
    served = served_kl(session, bench)
    engine = served(plan_choices(plan, session.modules))
    if session.target.name == "vllm-cpu-amx":
        pytest.skip("this processor computes W4A16 with 8-bit inputs")
    assert engine == pytest.approx(torch, rel=0.2)


def test_an_fp8_cache_is_assembled_with_its_scales(session: PlanningSession, bench: Bench) -> None:
    plan = Plan(groups={group.name: "bf16" for group in session.modules}, kv="fp8", method="rtn")
    out = session.directory / "kv"
    session.parts.assemble(plan, out)
    assert weight_bytes(out) == plan.weight_bytes(session.modules)
    assert bench.load_error(out, kv="fp8") is None


def test_the_reference_against_itself_is_exactly_the_same(session: PlanningSession, bench: Bench) -> None:
    saved = session.directory / "itself.npz"
    bench.score(MODEL, session.choosing[:5], save=saved)
    again = bench.score(MODEL, session.choosing[:5], reference=saved)
    assert again.kl.max() == 0.0


def test_an_engine_that_fails_says_so_and_the_next_one_runs(session: PlanningSession, bench: Bench) -> None:
    with pytest.raises(BenchError, match="nowhere"):
        bench.score(Path("/nowhere"), session.choosing[:1])
    assert bench.load_error(MODEL) is None


def test_a_head_of_its_own_has_eight_bits_where_a_plan_gives_them(bench: Bench, tmp_path: Path) -> None:
    """From the check to an answer, on the engine."""
    where = target(detect())
    checkpoint = open_checkpoint(
        make_checkpoint(tmp_path / "model", initializer_range=0.1, max_position_embeddings=1024)
    )
    told = format_check(check_report(checkpoint, where, calibration=[24] * 40))
    if "output head: 0.52 MB at 16 bits" not in told or "a plan may give it" not in told:
        pytest.skip(f"{where.name} serves no head in 8 bits")
    rng = random.Random(0)
    sequences = [[rng.randrange(8, VOCABULARY) for _ in range(24)] for _ in range(40)]
    described = Calibration(source="random", sha256="0" * 64, samples=40, tokens=40 * 24)
    session = PlanningSession(
        tmp_path / "planning",
        checkpoint,
        CalibrationSet(sequences, described),
        where,
        methods=("imatrix",),
        schemes=("w4a16-g128", "w8a8-r7", "w8a8"),
    )
    plain = sum(group.weights for group in session.blocks) // 2 + session.blocks.other_bytes
    assert session.least_bytes() < plain, "four bits in the blocks and 16 in the head take more"
    best = session.within(bench, session.least_bytes(), tries=1)[0]
    assert best.plan.groups[HEAD].startswith("w8a8")
    assert best.served_kl is not None
    assert 0 < best.served_kl < 1
    out = tmp_path / "planned"
    session.parts.assemble(best.plan, out)
    assert weight_bytes(out) == best.plan.weight_bytes(session.modules) == best.weight_bytes
    assert bench.load_error(out) is None
    same = best.plan.model_copy(update={"groups": {**best.plan.groups, HEAD: "bf16"}})
    with_whole_head = served_kl(session, bench)(plan_choices(same, session.modules))
    assert with_whole_head != best.served_kl, "its head is computed in 8 bits"


def test_the_best_plan_is_made_in_order_as_well_and_the_better_one_comes_first(
    bench: Bench, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(MODEL)
    session = PlanningSession(
        tmp_path / "planning",
        checkpoint,
        read_calibration(ROOT / "deploy/assistant/data/calibration.jsonl", checkpoint),
        target(detect()),
        methods=("imatrix+gptq",),
        schemes=("w4a16-g128", "w4a16-g64"),
    )
    weights = sum(group.weights for group in session.blocks)
    found = session.within(bench, session.blocks.other_bytes + int(4.2 * weights / 8), tries=2)
    ordered = [one for one in found if one.plan.method == "imatrix+gptaq"]
    assert len(ordered) == 1
    assert len(found) > 1
    if session.target.name != "vllm-cpu-amx":  # which computes W4A16 with 8-bit inputs
        assert found[0] is ordered[0], "this model loses a third less by it"
    same = [one for one in found if one.plan.groups == ordered[0].plan.groups]
    assert {one.weight_bytes for one in same} == {ordered[0].weight_bytes}
    out = tmp_path / "ordered"
    assert session.make(ordered[0].plan, out) is None
    assert weight_bytes(out) == ordered[0].weight_bytes
    (reference,) = (session.directory / "served").glob("reference-*.npz")
    again = bench.score(out, session.choosing, reference=reference)
    assert float(again.kl.mean()) == pytest.approx(ordered[0].served_kl, rel=1e-3)
    loss = found[0].served_kl
    assert loss is not None
    least = session.for_loss(bench, loss)
    assert least.served_kl is not None
    assert least.served_kl <= loss


ASKING = """
import sys
from pathlib import Path
from quantize.evaluate.bench import Bench
root, log = Path(sys.argv[1]), Path(sys.argv[2])
with Bench(root / ".venv-engine/bin/python", log, site=root / "deploy/engine_site") as bench:
    print("ready", flush=True)
    while True:
        bench.score(root / "deploy/assistant/model", [(list(range(5, 900)), 1)] * 200)
"""


def test_an_engine_ends_with_the_one_who_is_killed_while_it_works(tmp_path: Path) -> None:
    """And nothing stays in the temporary directory."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    command = [sys.executable, "-c", ASKING, str(ROOT), str(tmp_path / "bench.log")]
    asking = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert asking.stdout is not None
    with asking.stdout:
        assert asking.stdout.readline() == "ready\n"
        assert list(temporary.glob("tiercel-bench-*"))
        (server,) = psutil.Process(asking.pid).children()
        while not (engines := server.children()):
            assert asking.poll() is None
        asking.kill()
        asking.wait()
    _, left = psutil.wait_procs([server, *engines], timeout=30)
    assert not left
    assert not list(temporary.glob("tiercel-*"))
