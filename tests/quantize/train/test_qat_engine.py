"""A trained variant of the demo model on the real engine: it loads, and loses less there than what it began
as."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.models import one_model, registry_of
from deploy.qat import train_qat
from deploy.qat_beginning import Wanted
from gateway.config import load_config
from quantize.core.checkpoint import open_checkpoint, weight_bytes
from quantize.evaluate.bench import Bench
from quantize.make.calibration import read_calibration
from quantize.plan.session import split
from quantize.train.qat import QatSettings

ROOT = Path(__file__).resolve().parents[3]
MODEL = ROOT / "deploy/assistant/model"
CALIBRATION = ROOT / "deploy/assistant/data/calibration.jsonl"

pytestmark = pytest.mark.engine


def test_what_was_trained_is_served_and_loses_less_than_what_it_was_begun_with(tmp_path: Path) -> None:
    """On conversations that neither has seen: a quarter of the calibration file, by the engine's own
    kernel."""
    (tmp_path / "tiercel.yaml").write_text(
        f"""
models: {{assistant: {{path: {MODEL}, serve: [bf16], calibration: {CALIBRATION}}}}}
variants_dir: variants
roles: {{core: {{}}}}
default_role: core
""",
        encoding="utf-8",
    )
    model = one_model(load_config(tmp_path / "tiercel.yaml"))
    settings = QatSettings(steps=40, block_steps=0)
    card, report = train_qat(model, Wanted("w4a16-g32-asym"), settings, print)
    assert card is not None
    assert report.after < report.before
    trained = registry_of(model).path(card.variant, card.version)
    (begun,) = (model.variants_dir / ".training").glob("begun-*")
    assert weight_bytes(trained) == weight_bytes(begun)
    _, spans = split(read_calibration(CALIBRATION, open_checkpoint(MODEL)))
    log = tmp_path / "bench.log"
    with Bench(ROOT / ".venv-engine/bin/python", log, site=ROOT / "deploy/engine_site") as bench:
        reference = tmp_path / "reference.npz"
        bench.score(MODEL, spans, save=reference)
        kl = {
            name: float(bench.score(place, spans, reference=reference).kl.mean())
            for name, place in (("begun", begun), ("trained", trained))
        }
    assert kl["trained"] < kl["begun"]
    assert kl["begun"] == pytest.approx(report.before, rel=0.2), "the engine computes what was trained"
    assert kl["trained"] == pytest.approx(report.after, rel=0.2)
