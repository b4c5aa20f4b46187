"""The second-order estimate is the divergence that a group alone causes, and what was found is kept."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from quantize.card import Calibration
from quantize.core.checkpoint import open_checkpoint
from quantize.core.modules import HEAD, NO_LAYER, read_modules
from quantize.make.calibration import CalibrationSet
from quantize.make.parts import PartStore
from quantize.plan import backward
from quantize.plan.sensitivity import Row, analyse, calibrated
from quantize.plan.served import NotFiniteError, ServedKl
from quantize.plan.simulated import SimulatedModel
from tests.quantize.tiny import VOCABULARY, add_outliers, make_checkpoint

torch = pytest.importorskip("torch")


def test_estimates_agree_with_the_divergence_in_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "model"))
    modules = read_modules(checkpoint)
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(3, VOCABULARY, (24,), generator=generator).tolist() for _ in range(24)]
    described = Calibration(source="random", sha256="0" * 64, samples=24, tokens=24 * 24)
    parts = PartStore(tmp_path / "parts", checkpoint, modules, CalibrationSet(sequences, described))
    spans = [(sequence, 1) for sequence in sequences]
    choices = {group.name: [("w4a16-g64", "rtn"), ("w4a8-g64", "rtn")] for group in modules}
    monkeypatch.setattr(backward, "DRAWS", 8)
    rows = analyse(parts, choices, spans, tmp_path / "rows.jsonl")
    assert len(rows) == 2 * len(modules.groups)

    model = SimulatedModel(parts, spans)
    reference = model.log_probabilities()
    ratios = [
        math.log(row.fisher / model.kl({row.group: (row.scheme, row.method)}, reference)) for row in rows
    ]
    assert abs(sum(ratios) / len(ratios)) < 0.3
    assert max(map(abs, ratios)) < 1.2
    assert all(10 < row.sqnr_db < 40 for row in rows)

    written = (tmp_path / "rows.jsonl").read_text(encoding="utf-8")
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"group": "model.lay')  # a run that was killed while it wrote
    assert analyse(parts, choices, spans, tmp_path / "rows.jsonl") == rows
    assert (tmp_path / "rows.jsonl").read_text(encoding="utf-8").startswith(written)


def row(group: str, scheme: str, fisher: float) -> Row:
    return Row(
        group=group, kind=group, layer=0, scheme=scheme, method="rtn", bytes=1, sqnr_db=20, fisher=fisher
    )


def test_losses_are_scaled_to_what_the_engine_measures_of_uniform_variants() -> None:
    class Served:
        tokens = 7

        def __call__(self, choices: dict[str, tuple[str, str]]) -> float:
            return 0.6 if ("w4a16", "rtn") in choices.values() else 0.01

    rows = [row("a", "w4a16", 0.1), row("b", "w4a16", 0.2), row("a", "w8a8", 0.01)]
    found = calibrated(rows, Served())  # type: ignore[arg-type]
    assert [one.loss for one in found.rows] == pytest.approx([0.2, 0.4, 0.01])
    assert found.uniform == {"w4a16@rtn": 0.6, "w8a8@rtn": 0.01}


def test_schemes_that_the_engine_answers_with_no_numbers_are_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Served:
        tokens = 7

        def __call__(self, choices: dict[str, tuple[str, str]]) -> float:
            if ("fp8", "rtn") in choices.values():
                raise NotFiniteError("the engine answers fp8 with numbers that are not finite")
            return 0.3

    rows = [row("a", "w4a16", 0.1), row("b", "w4a16", math.nan), row("a", "fp8", 0.01), row("b", "fp8", 0.01)]
    found = calibrated(rows, Served())  # type: ignore[arg-type]
    assert [(one.group, one.scheme) for one in found.rows] == [("a", "w4a16")]
    assert found.rows[0].loss == pytest.approx(0.3)
    assert found.uniform == {"w4a16@rtn": 0.3}
    said = capsys.readouterr().err
    assert "w4a16 is left out of plans for b: its estimated loss is not finite" in said
    assert "fp8 is left out of plans: the engine answers fp8 with numbers that are not finite" in said


def test_what_the_engine_answers_with_no_numbers_is_refused_and_remembered(tmp_path: Path) -> None:
    class Parts:
        modules = ()
        checkpoint = SimpleNamespace(path=tmp_path)

        def link(self, plan: object, folder: Path) -> None:
            pass

    class Bench:
        identity, asked = "engine", 0

        def score(self, *_: object, save: Path | None = None, **__: object) -> SimpleNamespace:
            self.asked += save is None
            if save is not None:
                save.touch()
            return SimpleNamespace(kl=np.array([0.1, math.nan]))

    bench = Bench()
    for _ in range(2):
        served = ServedKl(Parts(), bench, [([1, 2, 3], 1)], tmp_path / "served")  # type: ignore[arg-type]
        with pytest.raises(NotFiniteError, match="answers the KV cache fp8 with numbers that are not finite"):
            served({}, "fp8")
    assert bench.asked == 1


def test_a_head_of_its_own_is_estimated_and_what_was_kept_of_it_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint(tmp_path / "model", initializer_range=0.1)
    add_outliers(source, "lm_head", factor=20.0)
    checkpoint = open_checkpoint(source)
    modules = read_modules(checkpoint).with_head()
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(3, VOCABULARY, (24,), generator=generator).tolist() for _ in range(24)]
    described = Calibration(source="random", sha256="0" * 64, samples=24, tokens=24 * 24)
    parts = PartStore(tmp_path / "parts", checkpoint, modules, CalibrationSet(sequences, described))
    spans = [(sequence, 1) for sequence in sequences]
    choices = {group.name: [("w8a8", "rtn")] for group in modules if group.layer in (1, NO_LAYER)}
    rows = analyse(parts, choices, spans, tmp_path / "rows.jsonl")
    (head,) = (row for row in rows if row.group == HEAD)
    model = SimulatedModel(parts, spans)
    measured = model.kl({HEAD: ("w8a8", "rtn")}, model.log_probabilities())
    assert head.fisher == pytest.approx(measured, rel=0.4)
    # Whatever else is missing, the draws are the same: so are the rows.
    for mine in ({HEAD: choices[HEAD]}, {name: some for name, some in choices.items() if name != HEAD}):
        alone = analyse(parts, mine, spans, tmp_path / f"{len(mine)}.jsonl")
        assert set(alone) <= set(rows)
