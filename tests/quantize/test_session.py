"""What a session knows before it has done anything."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from gateway.config import load_config
from quantize.card import Calibration
from quantize.core.checkpoint import open_checkpoint
from quantize.core.modules import HEAD
from quantize.core.plan import Plan
from quantize.core.targets import target
from quantize.make.calibration import CalibrationSet, read_calibration
from quantize.plan.planner import PlanError
from quantize.plan.session import PlanningSession, choosing_places, split
from quantize.plan.tune import LABEL_BYTES, SEQUENCES, labelled
from tests.quantize.tiny import make_checkpoint

ROOT = Path(__file__).parents[2]


def test_the_least_budget(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(ROOT / "deploy/assistant/model")
    calibration = read_calibration(ROOT / "deploy/assistant/data/calibration.jsonl", checkpoint)
    session = PlanningSession(tmp_path, checkpoint, calibration, target("vllm-cpu-avx512"))
    groups = {group.name: "w4a16-g128" for group in session.blocks} | {HEAD: "w8a8-r7"}
    smallest = Plan(groups=groups, method="gptq")
    assert session.least_bytes() == smallest.weight_bytes(session.modules)
    more = session.least_bytes(1000, ["auto"]) - session.least_bytes()
    assert more == 1000 * 2 * 2 * 4 * 128, "keys and values of 1,000 tokens, 16 bits, 4 layers, 128 wide"


def test_all_parts_are_of_the_smoothed_model_and_zero_points_go_where_they_are_served(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(ROOT / "deploy/assistant/model")
    calibration = read_calibration(ROOT / "deploy/assistant/data/calibration.jsonl", checkpoint)
    session = PlanningSession(tmp_path, checkpoint, calibration, target("vllm-cpu-vnni"))
    assert session.choices()[HEAD] == [("w8a8", "smooth+rtn")]
    for choices in (session.choices()[group.name] for group in session.blocks):
        assert {method for name, method in choices if name == "w8a8"} == {"smooth+rtn"}
        assert {method for name, method in choices if name != "w8a8"} == {"smooth+imatrix+gptq"}
        names = [name for name, _ in choices]
        four = ["w4a16-g128", "w4a16-g64", "w4a16-g64-asym", "w4a16-g32-asym", "w4a16-g16-asym"]
        assert names == [*four, "w8a8"]
    avx2 = PlanningSession(tmp_path, checkpoint, calibration, target("vllm-cpu-avx2"))
    assert not any("asym" in name for choices in avx2.choices().values() for name, _ in choices)


def test_a_budget_below_it_is_refused_before_any_engine(tmp_path: Path) -> None:
    from deploy.planning import plan

    config = load_config(ROOT / "tiercel.yaml")
    engine = config.engine.model_copy(update={"python": tmp_path / "no-such-python"})
    config = config.model_copy(update={"engine": engine, "run_dir": tmp_path, "variants_dir": tmp_path})
    with pytest.raises(PlanError, match=r"below the least possible, \d+ bytes \(--bits 2.803, with all"):
        plan(config.of("assistant"), "planned", print, target_name="vllm-cpu-avx512", bits=2.0)


def test_a_quarter_of_few_conversations_chooses_and_of_many_no_more_than_are_measured_in_time() -> None:
    found = {count: len(choosing_places(count)) for count in (32, 96, 160, 161, 192, 249, 5000)}
    assert found == {32: 8, 96: 24, 160: 40, 161: 33, 192: 39, 249: 36, 5000: 40}


def test_tuning_keeps_log_probabilities_of_as_many_conversations_as_there_is_room_for() -> None:
    conversations = [[1] * length for length in (100, 50, 200, 70, 80, 90, 30, 60, 400, 300)]
    vocabulary = LABEL_BYTES // 4 // 1100
    found = labelled(conversations, vocabulary, accelerator=False)
    assert found == conversations[:9]
    assert labelled(conversations, vocabulary, accelerator=True) == conversations
    assert labelled(conversations, 1 << 30, accelerator=False) == conversations[:SEQUENCES]
    assert labelled(conversations[:3], 1 << 30, accelerator=False) == conversations[:3]


def test_plans_are_chosen_on_what_the_engine_takes(tmp_path: Path) -> None:
    """vLLM refuses a prompt that fills its context. Parts are the same whatever that is; figures are not."""
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "model"))
    described = Calibration(source="random", sha256="0" * 64, samples=40, tokens=40 * 512)
    calibration = CalibrationSet([[number + 3] * 512 for number in range(40)], described)

    def session(context: int | None) -> PlanningSession:
        where = target("vllm-cpu-vnni")
        return PlanningSession(tmp_path / "plans", checkpoint, calibration, where, context=context)

    lengths = {context: {len(one) for one, _ in session(context).choosing} for context in (None, 128, 1024)}
    longest = checkpoint.max_model_len - 1
    assert longest == 255
    assert lengths == {None: {longest}, 128: {127}, 1024: {longest}}
    assert session(128).directory == session(None).directory
    kept = [session(context)._served(SimpleNamespace(identity="engine"))._file for context in (128, None)]  # type: ignore[arg-type]
    assert len(set(kept)) == 2
    short = CalibrationSet([one[:100] for one in calibration.sequences], described)
    uncut = PlanningSession(tmp_path / "plans", checkpoint, short, target("vllm-cpu-vnni"), context=128)
    assert uncut.choosing == split(short)[1]
    assert uncut._served(SimpleNamespace(identity="engine"))._file.parent.name == "served"  # type: ignore[arg-type]
