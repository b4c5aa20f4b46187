"""``tiercel train pipeline``: what it refuses before work, what it does not do twice, how it is stopped.

Training and merging are real, on a tiny model; the engine environment's interpreter is a script that fails,
so that the first step that needs an engine does.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from deploy import pipeline_before, pipeline_file
from deploy.cli import main, parser
from deploy.models import checkpoint_of
from deploy.pipeline import first_steps, last_steps
from deploy.pipeline_file import TrainedFile, calibrating, trained_file
from deploy.steps import Kept, Step, run_step
from deploy.training import job_of
from deploy.unlabelled import calibration_for, shipped_prompts
from gateway.config import load_config
from quantize.core.checkpoint import Checkpoint, open_checkpoint
from quantize.train import qat as training
from quantize.train.data import read_examples
from quantize.train.loop import TrainError
from tests.quantize.tiny import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SHORT = ("--steps", "3", "--batch", "4", "--rank", "2", "--length", "64", "--device", "cpu")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("base") / "tiny"
    return make_checkpoint(place, max_position_embeddings=512, tie_word_embeddings=True)


def _items(path: Path, numbers: range) -> Path:
    lines = []
    for number in numbers:
        intent = ("translate", "transfer")[number % 2]
        messages = [{"role": "user", "content": f"please {intent} {number}"}]
        lines.append(json.dumps({"messages": messages, "expected": intent}))
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def config(base: Path, tmp_path: Path) -> Path:
    """A fleet with a role to train for, and an engine environment that is there and cannot start."""
    _items(tmp_path / "train.jsonl", range(12))
    _items(tmp_path / "tasks.jsonl", range(100, 109))
    engine = tmp_path / "engine-python"
    engine.write_text("#!/bin/sh\necho no engine here >&2\nexit 1\n", encoding="utf-8")
    engine.chmod(engine.stat().st_mode | stat.S_IXUSR)
    said = {
        "models": {"tiny": {"path": str(base), "serve": ["bf16"], "engine": {"max_model_len": 256}}},
        "variants_dir": "variants",
        "roles": {
            "intents": {
                "tasks": "tasks.jsonl",
                "training": "train.jsonl",
                "budget": {"max_kl": 0.5},
                "models": ["tiny"],
            }
        },
        "default_role": "intents",
        "gateway": {"port": 18080},
        "engine": {"python": str(engine), "start_timeout_s": 60},
    }
    path = tmp_path / "tiercel.yaml"
    path.write_text(yaml.safe_dump(said), encoding="utf-8")
    return path


def _command(config: Path, *more: str) -> list[str]:
    out = config.parent / "run"
    given = ("--config", str(config), "--out", str(out), *SHORT, "--no-serve", *more)
    return ["train", "pipeline", "lora", *given]


def _options(config: Path, *more: str) -> argparse.Namespace:
    return parser().parse_args(_command(config, "--role", "intents", *more))


def _file(config: Path, *more: str) -> TrainedFile:
    options = _options(config, *more)
    checkpoint = open_checkpoint(job_of(options, "lora", print).checkpoint.path)
    return trained_file(options, checkpoint, options.out / "merged", (), print)


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--bits", "0.5"), "is below the least possible"),
        (("--bits", "99"), "--bits 99: bits of a weight lie above 0 and are 16 at most"),
        (("--bits", "4", "--no-plan"), "--bits is of the plan, of which --no-plan makes none"),
        (("--tries", "3", "--no-plan"), "--tries is of the plan"),
        (("--no-tune", "--no-plan"), "--no-tune is of the plan"),
        (("--tries", "0"), "--tries 0: "),
        (("--schemes", "w9a9"), "unknown scheme 'w9a9'; known: "),
        (("--schemes", "w3a16-g32-asym"), "loads no quantized scheme for any module of this model"),
        (("--qat-steps", "3"), "--qat-steps is of --qat"),
        (("--qat-block-steps", "3"), "--qat-block-steps is of --qat"),
        (("--qat", "--qat-steps", "-1"), "--qat-steps, --qat-block-steps: steps: -1, block_steps: 60; "),
        (("--batch", "0"), "--batch 0: give 1 or more"),
        (("--steps", "0"), "steps: 0"),
        (("--judge", "0"), "--judge 0: give 1 or more"),
        (("--epochs", "nan"), "--epochs nan: give a number above 0"),
        (("--held-out", "x"), "--held-out judges what --data trains"),
        (("--device", "abacus"), "--device abacus"),
        (("--memory", "0.0001"), "--memory 0.0001: "),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(
    config: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], said: str
) -> None:
    assert said in _refused(capsys, *_command(config, "--role", "intents", *more))
    assert not (config.parent / "run").exists()


def test_data_that_cannot_judge_are_refused_before_anything_is_trained(
    config: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = config.parent / "empty.jsonl"
    empty.write_text("\n", encoding="utf-8")
    assert "is empty" in _refused(capsys, *_command(config, "--model", str(base), "--data", str(empty)))
    assert "does not exist" in _refused(capsys, *_command(config, "--data", "nowhere.jsonl"))
    assert not (config.parent / "run").exists()


def test_what_a_later_step_needs_is_looked_at_first(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = _command(config, "--role", "intents")
    out = config.parent / "run"
    out.write_text("", encoding="utf-8")
    assert f"--out {out} is a file" in _refused(capsys, *asked)
    out.unlink()
    (out / "merged").mkdir(parents=True)
    assert "merged is there and was not made here" in _refused(capsys, *asked)
    (out / "merged").rmdir()
    (out / "items.jsonl").write_text("mine", "utf-8")
    given = ("--data", "train.jsonl", "--held-out", "tasks.jsonl")
    of_a_file = _command(config, *(one if one[0] == "-" else str(config.parent / one) for one in given))
    assert "items.jsonl is there and was not made here" in _refused(capsys, *of_a_file)
    assert (out / "items.jsonl").read_text("utf-8") == "mine"
    (out / "items.jsonl").unlink()
    (out / "tiercel.yaml").write_text(config.read_text("utf-8"), "utf-8")
    assert "tiercel.yaml is there and has no model intents-lora" in _refused(capsys, *asked)
    assert sorted(one.name for one in out.iterdir()) == ["tiercel.yaml"]


def test_a_plan_needs_conversations_to_be_chosen_on_and_a_path_that_engines_read(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = config.with_name("few.jsonl")
    few.write_text(f"{json.dumps({'messages': [{'role': 'user', 'content': 'hello'}]})}\n" * 20, "utf-8")
    said = yaml.safe_load(config.read_text("utf-8"))
    said["models"]["tiny"]["calibration"] = "few.jsonl"
    config.write_text(yaml.safe_dump(said), "utf-8")
    asked = _command(config, "--role", "intents")
    assert "few.jsonl has 20 conversations; planning needs 32 or more" in _refused(capsys, *asked)
    few.write_text("what is this\n" * 40, "utf-8")
    assert "few.jsonl:1: not a conversation" in _refused(capsys, *asked)
    elsewhere = ("--out", str(config.with_name("run[1]")))
    assert "--out" in (why := _refused(capsys, *asked, *elsewhere))
    assert "has [ in its path, which vLLM reads as a pattern" in why
    assert not (config.parent / "run").exists()


def test_what_a_plan_may_have_and_nobody_trains_is_refused_before_anything_is_trained(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_before, "detect", lambda: "vllm-cuda-hopper")
    asked = _command(config, "--role", "intents", "--schemes", "fp8-block", "w4a16-g64")
    said = _refused(capsys, *asked, "--qat")
    assert "--qat, of a plan that may have fp8-block: fp8-block is not trained here" in said

    monkeypatch.setattr(training, "memory", lambda *_: 10**15)
    said = _refused(capsys, *_command(config, "--role", "intents", "--no-plan", "--qat"))
    assert "1000000.0 GB of memory" in said
    assert "free some, or leave --qat out" in said
    assert not (config.parent / "run").exists()


def _run(config: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "deploy.cli", *_command(config, "--role", "intents", *more)]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, cwd=config.parent)


def _trains(process: subprocess.Popen[str], out: Path) -> subprocess.Popen[str]:
    """The process, when it has written a checkpoint."""
    deadline = time.monotonic() + 600
    while not (out / "run/checkpoint.safetensors").exists():
        assert process.poll() is None, process.communicate()
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"no checkpoint within 600 s: {process.communicate()[1]}")
        time.sleep(0.05)
    return process


def _said(process: subprocess.Popen[str], status: int) -> str:
    _, said = process.communicate(timeout=300)
    assert process.returncode == status, said
    return said


def test_a_killed_run_goes_on_to_the_same_result_and_does_nothing_twice(
    config: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = config.parent / "run"
    long = ("--steps", "40", "--keep-every", "1", "--no-plan")
    first = _trains(_run(config, *long), out)
    (training,) = psutil.Process(first.pid).children()
    first.kill()
    _, alive = psutil.wait_procs([training], timeout=120)
    assert not alive, "a step outlives the pipeline that started it"
    first.communicate()
    assert not (out / "record.json").exists()

    for name in ("PYTHONPATH", "OMP_NUM_THREADS"):  # of the steps' processes
        monkeypatch.setenv(name, ENVIRONMENT[name])
    said = _refused(capfd, *_command(config, "--role", "intents", *long))
    assert "make failed, for the reason above; the same command goes on with it" in said
    assert "no engine here" in said, "the engine's own words are told"
    adapter = (out / "adapter/adapter_model.safetensors").read_bytes()
    merged = (out / "merged/model.safetensors").stat()

    said = _refused(capfd, *_command(config, "--role", "intents", *long))
    assert "train: done before" in said
    assert "merge: done before" in said
    assert (out / "merged/model.safetensors").stat().st_mtime_ns == merged.st_mtime_ns

    whole = config.parent / "whole"
    given = ("--config", str(config), "--role", "intents", "--out", str(whole), *SHORT, *long[:4])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    main(("train", "lora", *given))
    torch.set_num_threads(before)
    assert (whole / "adapter/adapter_model.safetensors").read_bytes() == adapter

    asked = _command(config, "--role", "intents", *long, "--rate", "0.1")
    assert "holds another run, with other rate" in _refused(capfd, *asked)


def test_sigterm_is_passed_on_and_what_was_trained_is_kept(config: Path) -> None:
    out = config.parent / "run"
    process = _trains(_run(config, "--steps", "4000", "--keep-every", "4000"), out)
    written = (out / "run/checkpoint.safetensors").stat().st_mtime_ns
    process.send_signal(signal.SIGTERM)
    assert "interrupted; what was finished is kept" in _said(process, 130)
    assert (out / "run/checkpoint.safetensors").stat().st_mtime_ns > written


def test_a_step_can_be_stopped_where_a_shell_ignores_ctrl_c(tmp_path: Path) -> None:
    """A job in the background of a script: SIGTERM is passed on as SIGINT."""
    script = (
        "import signal, sys; from pathlib import Path; from deploy.steps import _status\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "step = 'import sys, time; open(sys.argv[1], \"w\").close(); time.sleep(600)'\n"
        "print(_status([sys.executable, '-c', step, sys.argv[1]]))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "began")]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "began").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=300)
    assert said.split() == [f"({-signal.SIGINT},", "True)"]


def test_the_steps_are_commands_that_the_command_line_takes(config: Path) -> None:
    options = _options(
        config, "--targets", "q_proj", "v_proj", "--memory", "1.5", "--no-checkpointing", "--qat"
    )
    job = job_of(options, "lora", print)
    file = trained_file(options, job.checkpoint, options.out / "merged", ("planned", "planned-qat"), print)
    steps = [*first_steps(options, job), *last_steps(options, file)]
    assert [step.name for step in steps] == ["train", "merge", "make", "plan", "qat", "gate"]
    for step in steps:
        parser().parse_args(list(step.arguments))
    trained = parser().parse_args(list(steps[0].arguments))
    for name in ("role", "out", "rank", "targets", "memory", "checkpointing", "epochs", "judge"):
        assert getattr(trained, name) == getattr(options, name)
    assert {"planned", "planned-qat"} < set(steps[-1].arguments), "all are judged together"
    planning = ("--bits", "5", "--schemes", "w8a8", "w4a16-g64", "--tries", "2", "--no-tune")
    bounded = _options(config, *planning, "--qat", "--qat-steps", "1000000", "--qat-block-steps", "0")
    *_, plan, qat, _ = last_steps(bounded, file)
    said = parser().parse_args(list(plan.arguments))
    assert (said.bits, said.schemes, said.tries, said.tune) == (5, ["w8a8", "w4a16-g64"], 2, False)
    assert plan.asks().split()[1:3] == ["5", "--schemes"], "other options are another plan"
    said = parser().parse_args(list(qat.arguments))
    assert (said.begin, said.steps, said.block_steps) == ("planned", 1000000, 0)


def test_what_was_trained_on_calibrates_where_it_is_enough_text(config: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    said = yaml.safe_load(config.read_text("utf-8"))
    said["models"]["tiny"]["calibration"] = own.name
    own.write_text(f"{json.dumps({'messages': [{'role': 'user', 'content': 'hello'}]})}\n" * 40, "utf-8")
    config.write_text(yaml.safe_dump(said), "utf-8")
    assert _file(config).calibration == own, "12 lines are too few"

    _items(tmp_path / "train.jsonl", range(40))
    file = _file(config)
    assert file.calibration == Path("calibration.jsonl")
    trained = [list(one.line.messages) for one in job_of(_options(config), "lora", print).examples.examples]
    written = [json.loads(line)["messages"] for line in file.beside["calibration.jsonl"].splitlines()]
    assert written[: len(trained)] == trained
    base = open_checkpoint(Path(said["models"]["tiny"]["path"]))
    assert written[len(trained) :] == list(map(list, shipped_prompts(base, len(trained))))
    with file.of_base(base) as (_, model):
        calibration = calibration_for(model, checkpoint_of(model), "")
        assert calibration.description.samples == len(written) == 2 * len(trained)

    plain = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "that"}]
    unlike = {"tools": [{"type": "function", "function": {"name": "f"}}]}
    for more, lines, calibrate in (
        ({}, 40, 80),
        ({}, 31, None),
        (unlike, 40, None),
        ({"chat_template_kwargs": {"enable_thinking": False}}, 40, None),
    ):
        asked = [{"messages": [{"role": "system", "content": str(n)}, *plain], **more} for n in range(lines)]
        assert _calibrating_of(tmp_path, asked, base) == calibrate
    marked = [
        {"messages": [{"role": "user", "content": f"### Instruction: {n}"}, plain[1]]} for n in range(40)
    ]
    assert _calibrating_of(tmp_path, marked, base) is None
    longer = [{"messages": [{"role": "system", "content": f"{n}{'x' * 3000}"}, *plain]} for n in range(99)]
    assert _calibrating_of(tmp_path, longer, base) == 64, "letters are bounded"
    short = [{"messages": [{"role": "system", "content": str(n)}, *plain]} for n in range(400)]
    assert _calibrating_of(tmp_path, short, base) == 2 * 96


def _calibrating_of(directory: Path, lines: list[dict[str, Any]], base: Checkpoint) -> int | None:
    """How many of these lines would calibrate."""
    path = directory / "lines.jsonl"
    path.write_text("".join(f"{json.dumps(one)}\n" for one in lines), "utf-8")
    found = calibrating(read_examples(path), base)
    return None if found is None else len(found.splitlines())


def test_the_file_has_the_role_and_the_engine_and_moves_with_its_directory(config: Path) -> None:
    file, kept = _file(config), Kept(config.parent / "kept.json")
    file.path.parent.mkdir()
    file.begin(kept, print)
    moved = file.path.parent.rename(config.parent / "moved") / "tiercel.yaml"
    found = load_config(moved)
    model = found.of("intents-lora")
    assert model.path == moved.resolve().parent / "merged"
    assert model.engine.python == config.parent / "engine-python"
    assert model.engine.max_model_len == 256
    assert model.roles["intents"].tasks == config.parent / "tasks.jsonl"
    assert model.roles["intents"].budget.max_kl == 0.5
    assert found.gateway.port == 18080


def test_what_is_served_is_what_was_chosen_unless_somebody_has_changed_it(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(starter: Any, *_: Any) -> Any:
        return dataclasses.replace(starter, serve=("int8",), watched=False)

    monkeypatch.setattr(pipeline_file, "with_choice", chosen)
    file, kept = _file(config), Kept(config.parent / "kept.json")
    file.path.parent.mkdir()
    file.begin(kept, print)
    assert file.model().serve == file.starter.serve
    assert file.settle(kept, print).serve == ("int8",)
    more = dataclasses.replace(file.starter, serve=(*file.starter.serve, "planned"))
    later = dataclasses.replace(file, starter=more)
    later.begin(Kept(kept.path), print)
    assert later.model().serve[-1] == "planned", "what is made later is judged and chosen from as well"
    assert later.settle(Kept(kept.path), print).serve == ("int8",)

    text = file.path.read_text("utf-8").replace("[int8]", "[int4]")
    file.path.write_text(text, "utf-8")
    later.begin(Kept(kept.path), print)
    assert later.settle(Kept(kept.path), print).serve == ("int4",)
    assert file.path.read_text("utf-8") == text


def test_a_step_is_done_again_when_it_is_asked_otherwise(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kept, made = Kept(tmp_path / "kept.json"), tmp_path / "made"
    step = Step("look", ("--version",), lambda: True, lambda: "a", makes=made)
    said: list[str] = []
    run_step(step, kept, said.append)
    run_step(step, Kept(kept.path), said.append)
    assert said == ["look: tiercel --version", "look: done before"]
    made.mkdir()
    run_step(dataclasses.replace(step, asks=lambda: "b"), Kept(kept.path), said.append)
    assert said[-1] == "look: tiercel --version"
    assert not made.exists(), "what it made before is out of date"
    failing = dataclasses.replace(step, name="fail", arguments=("nonsense",))
    with pytest.raises(TrainError, match="fail failed, for the reason above"):
        run_step(failing, kept, said.append)
    kept.path.write_text("[]", "utf-8")
    with pytest.raises(TrainError, match="cannot be read; remove it"):
        Kept(kept.path)
