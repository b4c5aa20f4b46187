"""Merging, and the training of a planned variant, that are killed outright end as undisturbed ones do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from itertools import chain
from pathlib import Path

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


def _statuses(directory: Path) -> dict[str, int]:
    """What every process ended with."""
    command = [sys.executable, "-m", "tests.deploy.training_process", str(directory)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'agents'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    ended = [line.split() for line in done.stdout.splitlines() if line.startswith("ended ")]
    found = {name: int(status) for _, name, status in ended}
    assert found.keys() == {*COMMANDS, *chain(*POINTS.values())}, done.stderr[-3000:]
    assert not any(found[command] for command in COMMANDS), done.stderr[-3000:]
    return found


def test_killed_at_every_stage_it_ends_as_it_would_have(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "tiny", max_position_embeddings=512)
    place = _set_up(tmp_path / "place", model)
    points = list(chain(*POINTS.values()))
    found = _statuses(place)
    assert {point: found[point] for point in points} == dict.fromkeys(points, -signal.SIGKILL)

    merged, undisturbed = place / "run/merged", place / "run/undisturbed"
    assert (merged / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert sorted(one.name for one in merged.iterdir()) == sorted(one.name for one in undisturbed.iterdir())
    variants = place / "variants/merged"
    card, other = (read_card(variants / name / "current") for name in ("planned-qat", "undisturbed"))
    assert card.files == other.files
    assert len({*card.schemes.values()} - {"bf16"}) > 1, "a mixture was trained"
    assert card.training is not None
    assert card.training.base.startswith("planned@")
    left = [
        *place.rglob(".partial-*"),
        *variants.glob(".training/*/whole"),
        *variants.glob(".training/*/block-*"),
    ]
    assert left == []
