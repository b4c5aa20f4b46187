"""A planning run that is killed ends, when it is run again, in what an undisturbed one ends in."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.quantize.planning_process import POINTS
from tests.quantize.tiny import make_checkpoint

ROOT = Path(__file__).parents[2]


def plans(directory: Path, *points: str) -> dict[str, int]:
    """Exit statuses of processes that plan in ``directory``: those that die at the points, and the last."""
    command = [sys.executable, "-m", "tests.quantize.planning_process", str(directory), *points]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(directory / "tmp")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ended = (line.split() for line in done.stdout.splitlines())
    return {words[0]: int(words[1]) for words in ended if words[0] in (*points, "end")}


def set_up(directory: Path, model: Path) -> Path:
    (directory / "tmp").mkdir(parents=True)
    (directory / "tiercel.yaml").write_text(
        f"models: {{m: {{path: {model}, serve: [bf16], calibration: {model.parent}/calibration.jsonl}}}}\n"
        f"roles: {{core: {{}}}}\ndefault_role: core\nvariants_dir: {directory}/variants\n",
        encoding="utf-8",
    )
    return directory


def contents(directory: Path) -> dict[str, str]:
    """Every file that is kept, by its digest: parts, rows, what was measured, the variant's own files."""
    passing = (".locks", ".logs", ".lock")
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file() and not path.name.endswith("card.json") and not set(passing) & set(path.parts)
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_checkpoint(tmp_path_factory.mktemp("source") / "model")
    words = "when is the bill due please what can be said of the order and who has it now".split()
    lines = [
        {"messages": [{"role": "user", "content": " ".join(words[n % 5 : 6 + n % 11])}]}
        | {"messages": [{"role": "user", "content": " ".join(words[n % 7 : 8 + n % 9]) + f" {n}"}]}
        for n in range(40)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (made.parent / "calibration.jsonl").write_text(text, encoding="utf-8")
    return made


@pytest.mark.engine  # of none, but as long as those that need one
def test_a_plan_that_was_killed_at_every_stage_is_the_undisturbed_one(model: Path, tmp_path: Path) -> None:
    undisturbed, killed = set_up(tmp_path / "undisturbed", model), set_up(tmp_path / "killed", model)
    assert plans(undisturbed) == {"end": 0}
    assert plans(killed, *POINTS) == {**dict.fromkeys(POINTS, -signal.SIGKILL), "end": 0}
    assert not list((killed / "tmp").glob("tiercel-*"))
    wanted, found = contents(undisturbed / "variants"), contents(killed / "variants")
    assert wanted.keys() == found.keys()
    assert [name for name in wanted if wanted[name] != found[name]] == []
    (card,) = (killed / "variants").glob("**/planned/current/card.json")
    (other,) = (undisturbed / "variants").glob("**/planned/current/card.json")
    said, same = (json.loads(one.read_text(encoding="utf-8")) for one in (card, other))
    varying = ("created", "seal", "making")
    assert {k: v for k, v in said.items() if k not in varying} == {
        k: v for k, v in same.items() if k not in varying
    }
