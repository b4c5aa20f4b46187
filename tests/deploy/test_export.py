"""`tiercel export` and `quantize` with a classifier among the models: what nothing can judge is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from deploy.cli import main
from deploy.engine import need_of
from deploy.models import registry_of
from gateway.config import load_config
from quantize.core.checkpoint import open_checkpoint
from quantize.export.classifier import train_classifier
from quantize.export.encoder import FLOAT, open_encoder
from quantize.export.encoder_variant import add_classifier
from tests.deploy.test_cli import run
from tests.quantize.small_encoder import ROWS, TEXTS, make_encoder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("intents")
    train_classifier(open_encoder(make_encoder(place / "encoder")), ROWS, place / "model")
    return place / "model"


def config(tmp_path: Path, model: Path, **role: object) -> str:
    """A file with the classifier as its only model; without a role's settings, none names it."""
    path = tmp_path / "tiercel.yaml"
    content = {
        "models": {
            "other": {"path": "other", "serve": ["bf16"]},
            "intents": {"path": str(model), "reference": FLOAT, "serve": [FLOAT]},
        },
        "variants_dir": "variants",
        "roles": {"verb": {"models": ["intents"], **role} if role else {}},
        "default_role": "verb",
        "engine": {"kv_cache_gib": 1},
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return str(path)


def items(tmp_path: Path, answer: str) -> str:
    path = tmp_path / "items.jsonl"
    user = {"role": "user", "content": TEXTS[0]}
    path.write_text(json.dumps({"messages": [user], "expected": answer}) + "\n", encoding="utf-8")
    return str(path)


def test_a_classifier_that_nothing_judges_is_refused_before_it_is_exported(
    tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right, other = items(tmp_path, "open"), "sing"
    for role, said in (
        ({}, "models.intents: no role may be served by it"),
        ({"grounded": False}, "roles.verb.tasks: a classifier is judged by right answers"),
        ({"tasks": right, "long_context": right}, "roles.verb.long_context: a classifier reads the last"),
    ):
        path = config(tmp_path, trained, **role)
        assert said in run(capsys, "export", "encoder", "--config", path, "--model", "intents")
    path = config(tmp_path, trained, tasks=items(tmp_path, other))
    assert "item 1: 'sing' is none of the 4 labels" in run(
        capsys, "export", "encoder", "--config", path, "--model", "intents"
    )
    assert not (tmp_path / "variants").exists()


def test_a_classifier_is_no_model_that_is_quantized_as_others_are(
    tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(tmp_path, trained)
    said = run(capsys, "quantize", "int8", "--config", path, "--model", "intents")
    assert "intents is an encoder, whose variants `tiercel export encoder --model intents` makes" in said


def test_a_classifiers_engine_needs_its_weights_and_no_kv_cache(
    tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(tmp_path, trained, tasks=items(tmp_path, "open"))
    model = load_config(Path(path)).of("intents")
    card = add_classifier(registry_of(model), open_checkpoint(trained), FLOAT, FLOAT)
    need = need_of(card, registry_of(model).path(FLOAT), model.engine)
    assert (need.kv_bytes, need.on_cores) == (0, True)
    main(["variants", "list", "--config", path, "--model", "intents"])
    assert "fp32" in capsys.readouterr().out
