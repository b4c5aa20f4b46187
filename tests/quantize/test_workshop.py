"""What a workshop knows before it has done anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config import load_config
from quantize.calibration import read_calibration
from quantize.checkpoint import open_checkpoint
from quantize.plan import Plan
from quantize.planner import PlanError
from quantize.target import target
from quantize.workshop import Workshop

ROOT = Path(__file__).parents[2]


def test_the_least_budget(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(ROOT / "deploy/assistant/model")
    calibration = read_calibration(ROOT / "deploy/assistant/data/calibration.jsonl", checkpoint)
    workshop = Workshop(tmp_path, checkpoint, calibration, target("vllm-cpu-avx512"))
    smallest = Plan(groups={group.name: "w4a16-g128" for group in workshop.modules}, method="gptq")
    assert workshop.least_bytes() == smallest.weight_bytes(workshop.modules)
    more = workshop.least_bytes(1000, ["auto"]) - workshop.least_bytes()
    assert more == 1000 * 2 * 2 * 4 * 128, "keys and values of 1,000 tokens, 16 bits, 4 layers, 128 wide"


def test_a_budget_below_it_is_refused_before_any_engine(tmp_path: Path) -> None:
    from deploy.planning import plan

    config = load_config(ROOT / "tiercel.yaml")
    engine = config.engine.model_copy(update={"python": tmp_path / "no-such-python"})
    config = config.model_copy(update={"engine": engine, "run_dir": tmp_path, "variants_dir": tmp_path})
    with pytest.raises(PlanError, match=r"below the least possible, \d+ bytes \(4.126 bits per weight"):
        plan(config, "planned", print, target_name="vllm-cpu-avx512", bits=2.0)
