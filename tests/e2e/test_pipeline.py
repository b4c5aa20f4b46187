"""`tiercel train pipeline` and `train carry` with real engines: killed, gone on with, judged, served."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
import yaml

from deploy.engine import free_port
from gateway.config import ModelConfig, load_config
from quantize.card import Card, Outcome, read_card
from quantize.train.adapters import changes
from tests.e2e.conftest import ROOT
from tests.e2e.test_starting import ENVIRONMENT, TIERCEL, until, words

pytestmark = pytest.mark.engine

DATA = ROOT / "deploy/assistant/data"
JUDGED = 24
CALIBRATING = 48
"""Conversations; planning needs 32."""


def _fleet(directory: Path) -> dict[str, Any]:
    lines = (DATA / "intent_classifier.jsonl").read_text(encoding="utf-8").splitlines()[: 3 * JUDGED]
    for name, part in (("tasks", lines[:JUDGED]), ("training", lines[JUDGED:])):
        (directory / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
    lines = (DATA / "calibration.jsonl").read_text(encoding="utf-8").splitlines()[:CALIBRATING]
    (directory / "calibration.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    role = {
        "tasks": "tasks.jsonl",
        "training": "training.jsonl",
        "budget": {"max_accuracy_drop": 0.5, "max_kl": 1.0},
    }
    settings = yaml.safe_load((ROOT / "tiercel.yaml").read_text(encoding="utf-8"))
    model = {"path": str(ROOT / "deploy/assistant/model"), "serve": ["bf16"]}
    return {
        "models": {"base": {**model, "calibration": "calibration.jsonl"}},
        "variants_dir": "variants",
        "roles": {"intents": role},
        "default_role": "intents",
        "gateway": {"port": free_port("127.0.0.1")},
        "engine": {
            **settings["engine"],
            "python": str(ROOT / ".venv-engine/bin/python"),
            "base_port": free_port("127.0.0.1", together=4),
        },
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pipeline")
    (directory / "tiercel.yaml").write_text(yaml.safe_dump(_fleet(directory)), encoding="utf-8")
    return directory


PIPELINE = (
    *("train", "pipeline", "qlora", "--role", "intents", "--out", "run"),
    *("--steps", "6", "--rank", "4", "--rate", "0.001", "--keep-every", "1", "--length", "256"),
    *("--schemes", "w4a16-g32-asym", "w8a8", "--bits", "5", "--tries", "2", "--no-tune"),
    *("--qat", "--qat-steps", "3", "--qat-block-steps", "2"),
)
STEPS = ("train", "merge", "make", "plan", "qat", "gate")
AT = ("--config", "both.yaml")


def _started(directory: Path, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        command, environment = [*TIERCEL, *arguments], {**ENVIRONMENT, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=directory, env=environment, stdout=output, stderr=output)


def _ended(process: subprocess.Popen[bytes], log: Path, status: int = 0) -> str:
    assert process.wait(timeout=600) == status, words(log)
    return words(log)


def _trained(directory: Path) -> ModelConfig:
    return load_config(directory / "run/tiercel.yaml").of("intents-qlora")


def _cards(model: ModelConfig, *names: str) -> dict[str, Card]:
    return {name: read_card(model.variants_dir / name / "current") for name in names}


def _killed_when(directory: Path, log: str, is_so: Callable[[], object], of_step: bool = False) -> str:
    """What the pipeline said until it, or the step that runs, was killed outright as soon as ``is_so``."""
    process = _started(directory, directory / log, *PIPELINE, "--no-serve")
    deadline = time.monotonic() + 600
    while not is_so():
        assert process.poll() is None, words(directory / log)
        assert time.monotonic() < deadline
        time.sleep(0.1)
    itself = psutil.Process(process.pid)
    below = itself.children(recursive=True)
    (itself.children()[0] if of_step else itself).kill()
    _, alive = psutil.wait_procs(below, timeout=60)
    assert not alive, "steps and engines end with what started them"
    assert process.wait(timeout=60) == (2 if of_step else -signal.SIGKILL)
    return words(directory / log)


def _done_before(said: str) -> tuple[str, ...]:
    return tuple(line.partition(":")[0] for line in said.splitlines() if line.endswith(": done before"))


def _files(directory: Path, *places: str) -> dict[Path, int]:
    """When files were written."""
    found = (path for place in places for path in directory.glob(place) if path.is_file())
    return {path: path.stat().st_mtime_ns for path in found}


async def test_a_killed_pipeline_goes_on_and_ends_with_a_gateway_that_answers(directory: Path) -> None:
    """Killed while variants are made, while plans are measured, and in the gate of a trained plan."""
    variants = directory / "run/variants/intents-qlora"
    _killed_when(directory, "make.log", lambda: (variants / "int8/current").exists())
    adapter = _files(directory, "run/adapter/*", "run/merged/*")

    served = ".planning/*/served/served.jsonl"
    said = _killed_when(directory, "plan.log", lambda: list(variants.glob(served)), of_step=True)
    assert _done_before(said) == STEPS[:2]
    assert "plan was killed by SIGKILL" in said
    made = _files(
        variants, "int[48]/*/model.safetensors", ".planning/*/rows.jsonl", ".planning/*/served/*.npz"
    )

    measured = variants / ".measurements"
    said = _killed_when(directory, "qat.log", lambda: list(measured.glob("planned-qat-*")))
    assert _done_before(said) == STEPS[:3]
    trained = _files(variants, "planned*/current/model.safetensors")
    assert {path.parents[1].name for path in trained} == {"planned", "planned-qat"}

    log = directory / "end.log"
    said = _ended(_started(directory, log, *PIPELINE, "--no-serve"), log)
    assert _done_before(said) == STEPS[:4]
    assert "block 1/4" not in said, "what was trained is not trained again"
    assert _files(directory, "run/adapter/*", "run/merged/*") == adapter
    assert {path: path.stat().st_mtime_ns for path in (*made, *trained)} == {**made, **trained}
    assert _files(directory, "**/.partial*", "**/.partial*/*", "**/.training/*/[bw]*/*") == {}
    model = _trained(directory)
    cards = _cards(model, "bf16", "int8", "int4", "planned", "planned-qat")
    assert all(card.state == "ready" and "intents" in card.gate for card in cards.values())
    assert {"w4a16-g32-asym", "w8a8"} <= set(cards["planned"].schemes.values()), "a mixture was trained"
    assert cards["planned-qat"].training is not None
    assert cards["planned-qat"].training.base == f"planned@{cards['planned'].version}"
    assert set(model.serve) <= set(cards)
    assert all("intents" in cards[name].passed for name in model.serve)

    making = _making_a_smoothed_variant(directory)  # meanwhile
    log = directory / "served.log"
    up = _started(directory, log, *PIPELINE)
    try:
        until(up, log, "Tiercel is up at")
        assert _done_before(words(log)) == STEPS
        port = load_config(directory / "run/tiercel.yaml").gateway.port
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        item = json.loads((directory / "tasks.jsonl").read_text(encoding="utf-8").splitlines()[0])
        body = {"model": "intents", "messages": item["messages"], "max_tokens": 16, "temperature": 0}
        timeout = aiohttp.ClientTimeout(total=120)
        async with aiohttp.ClientSession(timeout=timeout) as http, http.post(url, json=body) as answer:
            assert answer.status == 200, await answer.text()
            assert answer.headers["x-tiercel-variant"].startswith("intents-qlora:")
    finally:
        up.send_signal(signal.SIGINT)
        up.wait(timeout=120)
        making.wait(timeout=600)
    _ended(making, directory / "making.log")
    _carried_by_a_smoothed_variant(directory)


def _making_a_smoothed_variant(directory: Path) -> subprocess.Popen[bytes]:
    """Of the base, in a configuration that has the merged model as well."""
    settings = yaml.safe_load((directory / "tiercel.yaml").read_text(encoding="utf-8"))
    settings["models"]["trained"] = {**settings["models"]["base"], "path": "run/merged"}
    settings["roles"]["intents"]["models"] = ["trained"]
    (directory / "both.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    making = ("quantize", "make", "base:int8", "--no-evaluate", *AT)
    return _started(directory, directory / "making.log", *making)


def _carried_by_a_smoothed_variant(directory: Path) -> None:
    """The pipeline's adapter on a smoothed variant of the base passes the whole gate of its merged model."""
    log, other = directory / "carry.log", directory / "other.log"
    carrying = ("train", "carry", "run/adapter", "base:int8", "int8-lora", "--model", "trained", *AT)
    process = _started(directory, log, *carrying)
    unscored = _ended(_started(directory, other, *carrying[:3], "base:bf17", *carrying[4:]), other, 2)
    said = _ended(process, log)
    model = load_config(directory / "both.yaml").of("trained")
    card = _cards(model, "int8-lora")["int8-lora"]
    assert card.method == "smooth+rtn"
    assert card.adapter is not None
    assert card.evaluation is not None
    assert card.evaluation.text.kl_exact
    assert card.evaluation.text.kl_mean < 0.02
    assert card.gate["intents"].outcome == Outcome.PASSED, said
    assert next(iter(changes(model.variants_dir / "int8-lora/current/adapter"))).a.any()
    assert "there is no variant 'bf17'" in unscored
