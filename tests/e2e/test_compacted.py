"""A model with less in it stands beside the one that it was made of: quantized, judged on the same items by
the real engine, and in the role's ladder as far as its answers allow."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from deploy.cli import main
from gateway.cards import load_cards
from gateway.config import load_config
from gateway.routing.ladders import Ladders
from quantize.card import Outcome
from tests.deploy.test_supervisor import ROOT

pytestmark = pytest.mark.engine

DATA = ROOT / "deploy/assistant/data"
ITEMS = 60


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of the demo model, the same without a quarter of its MLPs' channels, and the same
    without two of its four layers, which ruins it."""
    out = tmp_path_factory.mktemp("compacted")
    whole, calibration = ROOT / "deploy/assistant/model", DATA / "calibration.jsonl"
    for name, step in (("narrow", "neurons:0.25"), ("ruined", "layers:2")):
        main(["quantize", "compact", str(whole), str(out / name), step, "--calibration", str(calibration)])
    lines = (DATA / "core.jsonl").read_text(encoding="utf-8").splitlines()[:ITEMS]
    (out / "items.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    model = {"calibration": str(calibration)}
    models = {
        "whole": {"path": str(whole), "serve": ["bf16"], **model},
        "narrow": {"path": str(out / "narrow"), "serve": ["int8"], **model},
        "ruined": {"path": str(out / "ruined"), "serve": ["int8"], **model},
    }
    budget = {"max_accuracy_drop": 0.2, "max_kl": 0.2}
    role = {"tasks": "items.jsonl", "models": list(models), "budget": budget}
    shipped = yaml.safe_load((ROOT / "tiercel.yaml").read_text(encoding="utf-8"))
    engine = {**shipped["engine"], "python": str(ROOT / ".venv-engine/bin/python")}
    written = {
        "models": models,
        "variants_dir": "variants",
        "roles": {"specialist": role},
        "default_role": "specialist",
        "watch": {"reference": "none"},
        "engine": engine,
    }
    (out / "tiercel.yaml").write_text(yaml.safe_dump(written), encoding="utf-8")
    return out / "tiercel.yaml"


def test_a_compacted_model_serves_the_role_that_it_is_good_enough_for(path: Path) -> None:
    main(["quantize", "make", "whole:bf16", "narrow:int8", "ruined:int8", "--config", str(path)])
    config = load_config(path)
    cards = load_cards(config)
    assert cards["narrow:int8"].weight_bytes < 0.75 * cards["whole:bf16"].weight_bytes
    assert cards["narrow:int8"].base_sha256 != cards["whole:bf16"].base_sha256
    ladders = Ladders(config, cards)
    assert ladders.of_role("specialist") == ("narrow:int8", "whole:bf16")
    # It is no worse than its own reference, and has not a right answer that the first model's would have.
    ruined = ladders.verdict("ruined:int8", "specialist")
    assert ruined.outcome is not Outcome.PASSED
    assert any("whole" in reason for reason in ruined.reasons)
