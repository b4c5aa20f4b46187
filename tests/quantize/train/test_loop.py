"""The training loop on a problem of its own: resuming, stopping, refusing."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from quantize.train.loop import (
    DivergedError,
    Loss,
    Outcome,
    Place,
    Settings,
    TrainError,
    batch_of,
    train,
)
from quantize.train.state import read_state

RUN = {"model": "m", "data": "d"}


class Killed(BaseException):
    """What ends a process without a word."""


def _problem() -> tuple[dict[str, torch.Tensor], Loss]:
    """A small network with dropout, whose loss depends on random numbers as well as on examples."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(40, 6, generator=generator)
    wanted = inputs.sum(1, keepdim=True).tanh()
    tensors = {
        "first": torch.randn(6, 5, generator=generator),
        "last": torch.randn(5, 1, generator=generator),
    }

    def loss(_step: int, numbers: Sequence[int]) -> tuple[torch.Tensor, float]:
        hidden = torch.nn.functional.dropout((inputs[numbers] @ tensors["first"]).tanh(), 0.2)
        return ((hidden @ tensors["last"] - wanted[numbers]) ** 2).sum(), float(len(numbers))

    return tensors, loss


def _settings(**more: Any) -> Settings:
    given: dict[str, Any] = {"steps": 25, "learning_rate": 0.05, "batch": 6, "together": 4, "keep_every": 4}
    return Settings(**{**given, **more})


def _after(step: int, then: Callable[[], None], loss: Loss) -> Loss:
    """The loss, but that something happens in the middle of a step."""

    def interrupted(now: int, numbers: Sequence[int]) -> tuple[torch.Tensor, float]:
        if now == step:
            then()
        return loss(now, numbers)

    return interrupted


def _killed() -> None:
    raise Killed


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def _trained(directory: Path | None = None, **more: Any) -> tuple[dict[str, torch.Tensor], Outcome]:
    tensors, loss = _problem()
    place = Place(directory, RUN) if directory else None
    return tensors, train(tensors, loss, 40, _settings(**more), place)


@pytest.mark.parametrize("step", [1, 7, 8, 9, 24])
def test_a_killed_run_goes_on_to_the_same_result_bit_for_bit(tmp_path: Path, step: int) -> None:
    whole, curve = _trained()
    tensors, loss = _problem()
    with pytest.raises(Killed):
        train(tensors, _after(step, _killed, loss), 40, _settings(), Place(tmp_path, RUN))
    again, loss = _problem()
    outcome = train(again, loss, 40, _settings(), Place(tmp_path, RUN))
    assert 0 <= outcome.begun_at <= step
    assert step < 4 or outcome.begun_at > 0
    assert _same(whole, again)
    assert outcome.points == curve.points


def test_training_lowers_the_loss() -> None:
    _, outcome = _trained(steps=200)
    first, last = outcome.points[:10], outcome.points[-10:]
    assert sum(point.loss for point in last) < 0.5 * sum(point.loss for point in first)


def test_gradients_of_portions_are_those_of_the_whole_batch() -> None:
    inputs = torch.randn(40, 6, generator=torch.Generator().manual_seed(2))

    def trained(together: int) -> torch.Tensor:
        weight = torch.ones(6)

        def loss(_step: int, numbers: Sequence[int]) -> tuple[torch.Tensor, float]:
            return ((inputs[numbers] @ weight - 1) ** 2).sum(), float(len(numbers))

        train({"weight": weight}, loss, 40, _settings(together=together, steps=3))
        return weight.detach()

    assert torch.allclose(trained(1), trained(6), atol=1e-5)


def test_the_first_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    tensors, loss = _problem()

    def bad(step: int, numbers: Sequence[int]) -> tuple[torch.Tensor, float]:
        value, weight = loss(step, numbers)
        return (value * torch.nan if step == 10 else value), weight

    with pytest.raises(DivergedError, match=r"step 11: the loss is nan; lower learning_rate, which is 0\.05"):
        train(tensors, bad, 40, _settings(), Place(tmp_path, RUN))
    kept, words = read_state(tmp_path / "checkpoint.safetensors")
    assert len(words["points"]) == 8
    assert all(bool(torch.isfinite(tensor).all()) for tensor in kept.values())


def test_a_rate_that_explodes_stops_in_one_sentence(tmp_path: Path) -> None:
    tensors, loss = _problem()
    with pytest.raises(DivergedError, match="lower learning_rate"):
        train(tensors, loss, 40, _settings(learning_rate=1e30, keep_every=1), Place(tmp_path, RUN))
    kept, _ = read_state(tmp_path / "checkpoint.safetensors")
    assert float(kept["weights.first"].abs().max()) < 100, "what the exploding step made is kept"


def test_a_loss_that_grows_out_of_proportion_stops_while_it_is_finite() -> None:
    tensors, loss = _problem()

    def growing(step: int, numbers: Sequence[int]) -> tuple[torch.Tensor, float]:
        value, weight = loss(step, numbers)
        return value * 2.0**step, weight

    with pytest.raises(DivergedError, match="the loss has grown from"):
        train(tensors, growing, 40, _settings())


@pytest.mark.parametrize(
    ("run", "more", "said"),
    [
        ({"model": "other"}, {}, "differs in model"),
        ({"data": "other"}, {}, "differs in data"),
        ({}, {"learning_rate": 0.1}, r"differs in settings \(learning_rate was 0.05 and is 0.1\)"),
        ({}, {"seed": 3}, r"differs in settings \(seed was 0 and is 3\)"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path, run: dict[str, str], more: dict[str, Any], said: str
) -> None:
    tensors, loss = _problem()
    train(tensors, loss, 40, _settings(), Place(tmp_path, RUN))
    with pytest.raises(TrainError, match=said):
        train(tensors, loss, 40, _settings(**more), Place(tmp_path, {**RUN, **run}))


def test_a_damaged_checkpoint_is_said_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(TrainError, match="remove it, training begins anew then"):
        _trained(tmp_path)


def test_ctrl_c_keeps_what_is_done_and_the_run_goes_on(tmp_path: Path) -> None:
    whole, _ = _trained()
    tensors, loss = _problem()
    asked = _after(6, lambda: os.kill(os.getpid(), signal.SIGINT), loss)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tensors, asked, 40, _settings(keep_every=100), Place(tmp_path, RUN))
    assert signal.getsignal(signal.SIGINT) is before
    again, loss = _problem()
    outcome = train(again, loss, 40, _settings(keep_every=100), Place(tmp_path, RUN))
    assert outcome.begun_at == 6
    assert _same(whole, again)


def test_it_is_evaluated_before_after_and_between_and_not_twice(tmp_path: Path) -> None:
    tensors, loss = _problem()
    seen: list[int] = []

    def evaluate(step: int) -> dict[str, float]:
        seen.append(step)
        return {"step": step}

    place = Place(tmp_path, RUN)
    with pytest.raises(Killed):
        train(tensors, _after(13, _killed, loss), 40, _settings(evaluate_every=10), place, evaluate)
    assert seen == [0, 10]
    tensors, loss = _problem()
    outcome = train(tensors, loss, 40, _settings(evaluate_every=10), place, evaluate)
    assert seen == [0, 10, 20, 25]
    assert [one.step for one in outcome.evaluations] == [0, 10, 20, 25]


def test_every_example_comes_once_before_any_comes_again() -> None:
    seen = [number for step in range(8) for number in batch_of(step, 10, 5, seed=0)]
    assert sorted(seen[:10]) == list(range(10))
    assert sorted(seen[30:]) == list(range(10))
    assert seen[:10] != seen[10:20]
    assert len(batch_of(0, 3, 8, seed=0)) == 8


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"steps": 0}, "steps: 0"),
        ({"steps": 10**300}, r"steps: 1e\+300; give at most 10,000,000"),
        ({"evaluate_every": -1}, "evaluate_every: -1"),
        ({"learning_rate": 0.0}, r"learning_rate: 0\.0"),
        ({"learning_rate": float("inf")}, "learning_rate: inf"),
        ({"warm_up": 1.0}, "warm_up"),
        ({"max_norm": 0}, "max_norm"),
    ],
)
def test_settings_that_cannot_be_are_refused(more: dict[str, Any], said: str) -> None:
    with pytest.raises(TrainError, match=said):
        _settings(**more)


def test_the_rate_rises_and_falls() -> None:
    settings = _settings(steps=100, warm_up=0.1, learning_rate=1.0, last_rate=0.1)
    rates = [settings.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == 1.0
    assert rates[9] == 1.0
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
