"""Students: what they learn of a teacher, and which of them cannot."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from quantize.compact.make import take
from quantize.compact.steps import parse_step
from quantize.core.checkpoint import Checkpoint, open_checkpoint
from quantize.core.modules import read_modules
from quantize.core.plan import uniform
from quantize.make.variant import part_store
from quantize.train import distill, loop
from quantize.train.base import load_base
from quantize.train.data import encode
from quantize.train.distill import Lessons, Teaching, Weights, pairs
from quantize.train.loop import Settings, TrainError
from quantize.train.run import Job, fitting, run
from tests.quantize.tiny import change_config, make_checkpoint
from tests.quantize.train.test_run import _items, _say

EVERYTHING = Weights(responses=1, hidden=1, attention=1, answers=1, temperature=2)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model of four layers that gives most of the right answers."""
    base = tmp_path_factory.mktemp("teacher")
    made = open_checkpoint(make_checkpoint(base / "tiny", num_hidden_layers=4))
    examples = encode(_items(0, 24), made, 64)
    settings = Settings(steps=30, learning_rate=2e-3, batch=6)
    record = run(Job("full", made, examples, examples, settings, base / "run", device="cpu"), _say)
    assert record.held_out.right.good >= 16
    return open_checkpoint(base / "run" / "model")


@pytest.fixture(scope="module")
def student(teacher: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The teacher without two of its layers and a half of its heads."""
    out = tmp_path_factory.mktemp("student")
    ids = [list(one.ids) for one in encode(_items(0, 8), teacher, 64).examples]
    take(teacher, parse_step("layers:2"), ids, out / "shallow")
    take(open_checkpoint(out / "shallow"), parse_step("heads:1"), ids, out / "student")
    return open_checkpoint(out / "student")


def _job(student: Checkpoint, teacher: Checkpoint, out: Path, weights: Weights, **more: Any) -> Job:
    settings = Settings(steps=20, learning_rate=2e-3, batch=6, together=3, keep_every=4)
    examples, judged = encode(_items(0, 24), student, 64), encode(_items(24, 9), student, 64)
    given: dict[str, Any] = {"device": "cpu", **more}
    return Job("full", student, examples, judged, settings, out, teaching=Teaching(teacher, weights), **given)


def _losses(student: Checkpoint, teacher: Checkpoint, weights: Weights) -> float:
    model = load_base(student, "full", "cpu").model
    examples = encode(_items(0, 6), student, 64).examples
    total, count = Lessons(Teaching(teacher, weights), model, torch.device("cpu")).loss(model, examples)
    return float(total.detach()) / count


@pytest.mark.parametrize(
    "weights",
    [Weights(), Weights(responses=0, hidden=1), Weights(responses=0, attention=1), EVERYTHING],
    ids=["responses", "hidden", "attention", "everything"],
)
def test_a_student_comes_nearer_to_its_teacher_in_what_it_learns(
    student: Checkpoint, teacher: Checkpoint, tmp_path: Path, weights: Weights
) -> None:
    before = _losses(student, teacher, weights)
    run(_job(student, teacher, tmp_path / "run", weights), _say)
    after = _losses(open_checkpoint(tmp_path / "run" / "model"), teacher, weights)
    assert after < 0.8 * before


def test_a_student_learns_answers_by_what_its_teacher_says_and_is_quantized_as_any_model(
    student: Checkpoint, teacher: Checkpoint, tmp_path: Path
) -> None:
    record = run(_job(student, teacher, tmp_path / "run", Weights()), _say)
    assert record.held_out.loss_after < 0.6 * record.held_out.loss_before
    assert record.teaching is not None
    assert record.teaching["teacher"] == "model"
    made = open_checkpoint(tmp_path / "run" / "model")
    assert made.config["num_hidden_layers"] == 2
    modules = read_modules(made)
    part_store(tmp_path / "variants", made, modules, None).assemble(
        uniform(modules, "w4a16-g32", method="mse"), tmp_path / "variants/int4"
    )
    assert open_checkpoint(tmp_path / "variants/int4")


def test_a_teacher_has_nothing_to_teach_itself(teacher: Checkpoint) -> None:
    weights = Weights(responses=1, hidden=1, attention=1)
    assert _losses(teacher, teacher, weights) == pytest.approx(0, abs=1e-6)


def test_padding_teaches_nothing(student: Checkpoint, teacher: Checkpoint) -> None:
    model = load_base(student, "full", "cpu").model
    examples = encode(_items(0, 24), student, 64).examples
    short, long = (of(examples, key=lambda one: len(one.ids)) for of in (min, max))
    assert len(short.ids) < len(long.ids)
    # What is averaged over tokens is not the sum of two averages.
    summed = dataclasses.replace(EVERYTHING, hidden=0, attention=0)
    with torch.no_grad():
        lessons = Lessons(Teaching(teacher, summed), model, torch.device("cpu"))
        alone = sum(float(lessons.loss(model, [one])[0]) for one in (short, long))
        assert float(lessons.loss(model, [short, long])[0]) == pytest.approx(alone, rel=1e-4)
        lessons = Lessons(Teaching(teacher, EVERYTHING), model, torch.device("cpu"))
        twice, _ = lessons.loss(model, [short, short])
        assert float(lessons.loss(model, [short, long])[0]) > 0
        assert float(twice) == pytest.approx(2 * float(lessons.loss(model, [short])[0]), rel=1e-4)


def test_layers_are_matched_evenly_and_the_last_with_the_last() -> None:
    assert pairs(2, 4) == [(1, 2), (2, 4)]
    assert pairs(3, 12) == [(1, 4), (2, 8), (3, 12)]
    assert pairs(4, 4) == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_at_a_high_temperature_answers_are_compared_by_their_logits() -> None:
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    near = logits + 1e-3 * torch.randn(5, 30, generator=torch.Generator().manual_seed(1))
    assert float(distill.responses(logits, logits, 3.0)) == pytest.approx(0, abs=1e-6)
    # T² KL tends to half the mean square of the differences, less their mean.
    apart = near - logits
    wanted = 0.5 * float((apart - apart.mean(-1, keepdim=True)).square().mean(-1).sum())
    assert float(distill.responses(near.double(), logits.double(), 1e4)) == pytest.approx(wanted, rel=1e-2)


def test_a_run_that_was_stopped_ends_with_the_same_student(
    student: Checkpoint, teacher: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(_job(student, teacher, tmp_path / "whole", EVERYTHING), _say)
    step, seen = loop._Run.step, []

    def stopping(self: Any, number: int, *rest: Any) -> Any:
        seen.append(number)
        if len(seen) == 10:
            raise RuntimeError("the machine went away")
        return step(self, number, *rest)

    monkeypatch.setattr(loop._Run, "step", stopping)
    with pytest.raises(RuntimeError, match="went away"):
        run(_job(student, teacher, tmp_path / "stopped", EVERYTHING), _say)
    again = run(_job(student, teacher, tmp_path / "stopped", EVERYTHING), _say)
    assert seen[10] > 0
    assert again.curve == whole.curve
    with pytest.raises(TrainError, match="another run, with other teaching"):
        run(_job(student, teacher, tmp_path / "stopped", Weights()), _say)


def test_memory_counts_the_teacher(student: Checkpoint, teacher: Checkpoint, tmp_path: Path) -> None:
    job = _job(student, teacher, tmp_path / "run", EVERYTHING)
    taught = fitting(job, read_modules(student))[1]
    alone = fitting(dataclasses.replace(job, teaching=None), read_modules(student))[1]
    assert taught.base - alone.base == 4 * sum(one.bytes // 2 for one in teacher.tensors.values())
    with pytest.raises(TrainError, match="needed beside the program itself"):
        run(dataclasses.replace(job, memory=0.001), _say)
    assert not (tmp_path / "run").exists()


def test_who_cannot_learn_from_whom_is_said_before_work(
    student: Checkpoint, teacher: Checkpoint, tmp_path: Path
) -> None:
    def refused(one: Checkpoint, other: Checkpoint, weights: Weights, words: str) -> None:
        with pytest.raises(TrainError, match=words):
            run(_job(one, other, tmp_path / "run", weights), _say)
        assert not (tmp_path / "run").exists()

    refused(teacher, teacher, Weights(), "is the teacher itself")
    refused(teacher, student, Weights(), "give a smaller one")
    narrow = open_checkpoint(make_checkpoint(tmp_path / "narrow", hidden_size=64))
    refused(narrow, teacher, Weights(hidden=1), "give --hidden 0")
    quantized = make_checkpoint(tmp_path / "quantized")
    change_config(quantized, quantization_config={"quant_method": "gptq"})
    refused(student, open_checkpoint(quantized), Weights(), "quantized already")
    other = make_checkpoint(tmp_path / "other", num_hidden_layers=4)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    refused(student, open_checkpoint(other), Weights(), "another tokenizer or chat template")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"responses": -1}, "responses: -1; must be a number, 0 or more"),
        ({"temperature": 0}, "temperature: 0; must be above 0"),
        ({"responses": 0}, "nothing is to be learned"),
    ],
)
def test_weights_that_teach_nothing_are_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(TrainError, match=words):
        Weights(**settings)
