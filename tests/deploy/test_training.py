"""``tiercel train`` from the command line: what is trained on, what judges, and the steps to serving."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from deploy.cli import main
from quantize.core.checkpoint import open_checkpoint
from quantize.train.record import read_record
from tests.quantize.tiny import make_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(autouse=True)
def _one_core() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _item(number: int) -> dict[str, Any]:
    intent = ("translate", "transfer")[number % 2]
    return {
        "messages": [{"role": "user", "content": f"please {intent} {number}"}],
        "expected": intent,
    }


def _write(path: Path, numbers: range) -> Path:
    path.write_text("".join(f"{json.dumps(_item(number))}\n" for number in numbers), encoding="utf-8")
    return path


def _fleet(directory: Path, base: Path, **role: str) -> Path:
    path = directory / "tiercel.yaml"
    said = {
        "models": {"tiny": {"path": str(base), "serve": ["bf16"]}},
        "variants_dir": "variants",
        "roles": {"intents": role},
        "default_role": "intents",
    }
    path.write_text(yaml.safe_dump(said), encoding="utf-8")
    return path


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


SHORT = ("--steps", "2", "--batch", "4", "--rank", "2", "--length", "64", "--device", "cpu")


def test_a_role_is_trained_merged_and_not_trained_twice(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(tmp_path / "train.jsonl", range(12))
    _write(tmp_path / "tasks.jsonl", range(100, 109))
    config = _fleet(tmp_path, base, tasks="tasks.jsonl", training="train.jsonl")
    out = tmp_path / "run"
    command = ("train", "lora", "--config", str(config), "--role", "intents", "--out", str(out), *SHORT)
    main((*command, "--json"))
    shown = json.loads(capsys.readouterr().out)
    assert shown["data"]["examples"] == 12
    assert shown["held_out_data"] == read_record(out).held_out_data.model_dump()
    main(command)
    assert "finished before" in capsys.readouterr().err
    adapter, merged = out / "adapter", tmp_path / "merged"
    main(("train", "merge", str(adapter), "--config", str(config), "--out", str(merged)))
    assert open_checkpoint(merged).dtype == "BF16"


def test_what_judges_a_role_never_trains_it(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(tmp_path / "tasks.jsonl", range(20))
    config = _fleet(tmp_path, base, tasks="tasks.jsonl")
    command = ("train", "lora", "--config", str(config), "--role", "intents", "--out", str(tmp_path / "run"))
    assert "roles.intents has no training, what is trained on" in _refused(capsys, *command)
    config = _fleet(tmp_path, base, tasks="tasks.jsonl", training="tasks.jsonl")
    assert "which judges: a gate would see what was learned by heart" in _refused(capsys, *command)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "give --role, whose items are trained for, or --data"),
        (("--role", "intents", "--data", "x"), "give --role, whose items are trained for, or --data"),
        (("--role", "other"), "--role: 'other' is not a role; known: intents"),
        (("--data", "nothing.jsonl"), "nothing.jsonl does not exist"),
        (("--data", "/"), "/ cannot be read (Is a directory); give a file of JSON Lines"),
        (("--role", "intents", "--device", "meta"), "--device meta: "),
        (("--role", "intents", "--epochs", "1e300"), "give at most 10,000,000, or fewer epochs"),
        (("--role", "intents", "--rank", "0"), "rank: 0"),
        (("--role", "intents", "--rate", "-1"), "learning_rate: -1.0"),
        (("--role", "intents", "--length", "9999"), "--length 9999: the model takes 256 tokens"),
        (("--role", "intents", "--memory", "0.0001"), "--memory 0.0001: "),
        (("--role", "intents", "--targets", "c_attn"), "targets: 'c_attn' is no linear module"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence_before_work(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], said: str
) -> None:
    _write(tmp_path / "train.jsonl", range(12))
    _write(tmp_path / "tasks.jsonl", range(100, 109))
    config = _fleet(tmp_path, base, tasks="tasks.jsonl", training="train.jsonl")
    out = tmp_path / "run"
    assert said in _refused(capsys, "train", "qlora", "--config", str(config), "--out", str(out), *more)
    assert not out.exists()


def test_a_rate_that_explodes_ends_with_status_2_and_a_checkpoint(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = _write(tmp_path / "data.jsonl", range(120))
    out = tmp_path / "run"
    given = ("--model", str(base), "--data", str(data), "--out", str(out), *SHORT, "--rate", "1e30")
    error = _refused(capsys, "train", "full", *given)
    assert "lower learning_rate, which is 1e+30" in error
    assert "the last good checkpoint is kept in" in error
    assert (out / "run" / "checkpoint.safetensors").is_file()


def test_a_file_is_divided_by_what_its_lines_ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = _write(tmp_path / "intents.jsonl", range(100))
    main(("train", "split", str(data)))
    parts = [
        (tmp_path / f"intents.{kind}.jsonl").read_text(encoding="utf-8").splitlines()
        for kind in ("train", "held-out")
    ]
    assert sorted([*parts[0], *parts[1]]) == sorted(data.read_text(encoding="utf-8").splitlines())
    assert 10 <= len(parts[1]) <= 35
    assert "is there already" in _refused(capsys, "train", "split", str(data))


def test_a_student_is_trained_by_its_teacher_and_is_a_checkpoint(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, judged = (
        _write(tmp_path / "train.jsonl", range(24)),
        _write(tmp_path / "held.jsonl", range(100, 109)),
    )
    student, out = tmp_path / "student", tmp_path / "run"
    main(("quantize", "compact", str(base), str(student), "layers:1"))
    given = ("--data", str(data), "--held-out", str(judged), "--out", str(out), *SHORT)
    learned = ("--hidden", "1", "--attention", "1", "--temperature", "2")
    main(("train", "distill", str(base), "--model", str(student), *given, *learned))
    assert "a checkpoint as any other" in capsys.readouterr().out
    assert open_checkpoint(out / "model").config["num_hidden_layers"] == 1
    assert read_record(out).teaching == {
        "teacher": "tiny",
        "responses": 1.0,
        "hidden": 1.0,
        "attention": 1.0,
        "answers": 0.0,
        "temperature": 2.0,
    }
    again = ("train", "distill", str(base), "--model", str(base), *given)
    assert "is the teacher itself" in _refused(capsys, *again)
    still = ("train", "distill", str(base), "--model", str(student), *given, "--rate", "0")
    assert "learning_rate: 0" in _refused(capsys, *still)
    nothing = ("train", "distill", str(base), "--model", str(student), *given, "--responses", "0")
    assert "nothing is to be learned" in _refused(capsys, *nothing)
