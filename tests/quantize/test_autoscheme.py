"""AutoScheme is offered the very schemes that a plan may mix, and what it takes becomes a plan of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantize.core.checkpoint import open_checkpoint
from quantize.core.schemes import scheme
from quantize.core.targets import target
from quantize.make.calibration import read_calibration
from quantize.plan import autoscheme, controls
from quantize.plan.session import PlanningSession, made_in_order
from tests.quantize.tiny import make_checkpoint

ROOT = Path(__file__).parents[2]
SCHEMES = ("w4a16-g64", "w4a16-g64-asym", "w4a16-g32-asym", "w8a8")


def test_every_scheme_of_integers_has_settings_of_its_own() -> None:
    settings = [autoscheme.layout(autoscheme.described(name)) for name in SCHEMES]
    assert settings == [(4, 64, True), (4, 64, False), (4, 32, False), (8, -1, True)]
    assert autoscheme.described("w4a16-g64")["act_bits"] == 16
    assert autoscheme.described("w8a8")["act_dynamic"] is True
    with pytest.raises(ValueError, match="integers alone"):
        autoscheme.described("fp8-dynamic")


def test_what_it_takes_is_a_plan_within_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoscheme, "SAMPLES", 2)
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "tiny"))
    calibration = read_calibration(ROOT / "deploy/assistant/data/calibration.jsonl", checkpoint)
    session = PlanningSession(tmp_path / "work", checkpoint, calibration, target("vllm-cpu-vnni"))
    weights = sum(group.weights for group in session.blocks)
    budget = session.blocks.other_bytes + int(5.0 * weights / 8)
    found = controls.plans(session, None, budget, ["autoscheme"], print, ordered=True)  # type: ignore[arg-type]
    ((label, kind, plan),) = found
    assert (label, kind) == ("AutoScheme at 4.999 bits", "autoscheme")
    assert 4.7 < plan.bits_per_weight(session.modules) <= 5.0
    assert plan.groups["lm_head"] == "bf16", "it takes the blocks alone"
    assert {plan.groups[group.name] for group in session.blocks} <= {*SCHEMES, "w4a16-g128", "w4a16-g16-asym"}
    for group in session.blocks:
        of_four = scheme(plan.groups[group.name]).weight_bits == 4
        assert plan.method_of(group.name) == ("smooth+imatrix+gptaq" if of_four else "smooth+rtn")
    # asked again, it is read from where it was kept
    again = list(controls.plans(session, None, budget, ["autoscheme"], print))  # type: ignore[arg-type]
    assert again[0][2] != plan == made_in_order(again[0][2])
    said: list[str] = []
    low = session.blocks.other_bytes + int(3.9 * weights / 8)
    assert not list(controls.plans(session, None, low, ["autoscheme"], said.append))  # type: ignore[arg-type]
    assert said[0].startswith("controls: autoscheme: no mixture of w4a16")
    assert said[0].endswith("has 3.899 bits")
