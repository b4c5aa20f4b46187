"""Merging, and the training of a planned variant, that are killed outright end as undisturbed ones do."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from quantize.card import read_card
from tests.deploy.training_process import COMMANDS, POINTS
from tests.quantize.tiny import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
WORDS = "when is the bill due please what can be said of the order and who has it now".split()


def _set_up(directory: Path, model: Path) -> Path:
    directory.mkdir()
    lines = [{"role": "user", "content": " ".join(WORDS[n % 7 : 6 + n % 11]) + f" {n}"} for n in range(36)]
    _write(directory / "calibration.jsonl", [{"messages": [line]} for line in lines])
    for name, numbers in (("training", range(8)), ("tasks", range(100, 104))):
        items = [
            {"messages": [{"role": "user", "content": f"please {number}"}], "expected": "transfer"}
            for number in numbers
        ]
        _write(directory / f"{name}.jsonl", items)
    shared = {"serve": ["bf16"], "calibration": "calibration.jsonl"}
    role = {"tasks": "tasks.jsonl", "training": "training.jsonl", "models": ["base", "merged"]}
    said = {
        "models": {"base": {"path": str(model), **shared}, "merged": {"path": "run/merged", **shared}},
        "variants_dir": "variants",
        "roles": {"intents": role},
        "default_role": "intents",
    }
    (directory / "tiercel.yaml").write_text(yaml.safe_dump(said), encoding="utf-8")
    return directory


def _write(path: Path, lines: list[dict[str, object]]) -> None:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")


def _statuses(directory: Path, *points: str) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.deploy.training_process", str(directory), *points]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'agents'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ended = [line.split() for line in done.stdout.splitlines()]
    found = {words[0]: int(words[1]) for words in ended if words[0] in (*COMMANDS, *points)}
    assert not any(found[command] for command in COMMANDS), done.stderr[-3000:]
    return found


def _weights(directory: Path) -> dict[str, str]:
    """Everything but records and cards that is there at the end, by its digest."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file() and path.suffix == ".safetensors" and "checkpoint" not in path.name
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base") / "tiny", max_position_embeddings=512)


def test_killed_at_every_stage_it_ends_as_it_would_have(model: Path, tmp_path: Path) -> None:
    undisturbed, killed = _set_up(tmp_path / "undisturbed", model), _set_up(tmp_path / "killed", model)
    points = [point for own in POINTS.values() for point in own]
    _statuses(undisturbed)
    found = _statuses(killed, *points)
    assert {point: found[point] for point in points} == dict.fromkeys(points, -signal.SIGKILL)
    wanted = _weights(undisturbed)
    assert {"run/merged/model.safetensors", "variants/merged/planned-qat/current/model.safetensors"} <= {
        name.replace(read_card(killed / f"variants/merged/{one}/current").version, "current")
        for one in ("planned-qat",)
        for name in wanted
    }
    assert _weights(killed) == wanted
    left = [*killed.rglob(".partial-*"), *killed.glob("variants/merged/.training/*/whole")]
    assert left == []
    card = read_card(killed / "variants/merged/planned-qat/current")
    assert len(set(card.schemes.values())) > 1, "of a mixture"
    assert card.training is not None
    assert card.training.base.startswith("planned@")
