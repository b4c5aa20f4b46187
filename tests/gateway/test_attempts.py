"""Retry, hedge and who wins, over attempts that go as each test says."""

from __future__ import annotations

import asyncio

import pytest
from exchanges import WHOLE_ANSWER, Trial

from gateway.errors import NeverReachedError, NoReplicaError, UpstreamError, UpstreamTimeoutError
from gateway.proxy.attempts import MOST_TRIES

CHUNK = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'


def test_a_request_that_reached_nobody_is_tried_again_and_not_for_ever() -> None:
    trial = Trial()
    attempt = trial.begin()
    for tries in range(1, MOST_TRIES):
        trial.breaks(attempt, NeverReachedError("refused"), did_nothing=True)
        assert (len(trial.engines.made), trial.driver.errors) == (tries + 1, [])
        attempt = trial.engines.made[-1]
    last = NeverReachedError("refused")
    trial.breaks(attempt, last, did_nothing=True)
    assert (len(trial.engines.made), trial.driver.errors) == (MOST_TRIES, [last])
    assert trial.exchange.owing == ()


def test_what_an_engine_may_have_begun_is_never_sent_again() -> None:
    trial = Trial()
    attempt, error = trial.begin(), UpstreamError("it died")
    trial.breaks(attempt, error)
    assert (trial.engines.made, trial.driver.errors) == ([attempt], [error])
    assert trial.exchange.owing == (attempt,), "what it took in is asked for"


def test_nothing_is_tried_again_once_the_client_has_a_part() -> None:
    trial = Trial(stream=True)
    attempt = trial.begin()
    trial.attempts.arrived(attempt, CHUNK)
    error = NeverReachedError("refused")
    trial.breaks(attempt, error)
    assert (len(trial.engines.made), trial.driver.errors) == (1, [error])
    assert trial.client.kinds == ["begin"]


def test_a_refusal_while_it_is_tried_again_is_the_answer() -> None:
    trial = Trial()
    attempt, full = trial.begin(), NoReplicaError("full")

    def choose(_: object) -> None:
        raise full

    trial.attempts._choose = choose
    trial.breaks(attempt, NeverReachedError("refused"), did_nothing=True)
    assert trial.driver.errors == [full]


def test_a_whole_answer_is_sent_and_the_exchange_ends() -> None:
    trial = Trial()
    trial.attempts.whole(trial.begin(), WHOLE_ANSWER)
    assert trial.client.kinds == ["whole"]
    assert (trial.driver.finished, trial.driver.errors) == (1, [])
    assert trial.took == [0.0]


def test_a_stream_that_ends_before_it_is_complete_is_an_error() -> None:
    trial = Trial(stream=True)
    attempt = trial.begin()
    trial.attempts.arrived(attempt, CHUNK)
    trial.attempts.ended(attempt)
    assert [str(error) for error in trial.driver.errors] == [
        "The engine ended its answer before it was complete."
    ]


async def hedged(trial: Trial) -> None:
    """Until the second replica has been asked."""
    trial.hedge_after_s = 0.0
    trial.begin()
    while len(trial.engines.made) < 2:
        await asyncio.sleep(0)


@pytest.mark.parametrize("winner", [0, 1])
async def test_of_a_hedged_pair_the_first_part_wins_and_the_other_is_cancelled(winner: int) -> None:
    trial = Trial(stream=True)
    await hedged(trial)
    won, lost = trial.engines.made[winner], trial.engines.made[1 - winner]
    trial.attempts.arrived(won, CHUNK)
    exchange = trial.exchange
    assert (lost.cancelled, exchange.attempts, exchange.won) == (True, [won], ("first", "second")[winner])
    assert exchange.route is not None
    assert exchange.route.replica is won.replica, "header and log name whose answer it is"
    assert [(spent.replica, spent.why) for spent in exchange.spent] == [(lost.replica.name, "hedged")]
    assert exchange.owing == (lost,)


async def test_a_comment_wins_no_hedge() -> None:
    trial = Trial(stream=True)
    await hedged(trial)
    trial.attempts.arrived(trial.engines.made[0], b": keep-alive\n\n")
    assert trial.exchange.winner is None
    trial.attempts.arrived(trial.engines.made[1], CHUNK)
    assert trial.exchange.won == "second"


async def test_an_empty_stream_leaves_a_hedged_pair_to_the_other() -> None:
    trial = Trial(stream=True)
    await hedged(trial)
    first, second = trial.engines.made
    trial.attempts.arrived(first, b": keep-alive\n\n")
    first.over = True
    trial.attempts.ended(first)
    assert trial.driver.errors == []
    trial.attempts.arrived(second, CHUNK)
    assert (trial.exchange.won, trial.exchange.owing) == ("second", (first,))


async def test_a_hedged_pair_fails_when_both_have() -> None:
    trial = Trial(stream=True)
    await hedged(trial)
    first, second = trial.engines.made
    trial.breaks(first, UpstreamError("one"))
    assert trial.driver.errors == []
    trial.breaks(second, last := UpstreamError("two"))
    assert trial.driver.errors == [last]


async def test_without_a_budget_nothing_is_hedged() -> None:
    trial = Trial()
    trial.hedge_after_s, trial.budget = 0.0, False
    trial.begin()
    await asyncio.sleep(0.01)
    assert len(trial.engines.made) == 1


def test_a_part_of_an_answer_that_nobody_waits_for_ends_its_attempt() -> None:
    trial = Trial(stream=True)
    attempt = trial.begin()
    trial.exchange.finished = True
    trial.attempts.arrived(attempt, CHUNK)
    assert attempt.cancelled
    assert trial.client.got == []


@pytest.mark.parametrize(
    ("stream", "seconds", "setting"),
    [(True, 11, "first_byte_timeout_s"), (False, 21, "answer_timeout_s"), (False, 61, "total_timeout_s")],
)
def test_what_takes_too_long_names_the_setting(stream: bool, seconds: float, setting: str) -> None:
    trial = Trial(stream=stream)
    trial.begin()
    trial.attempts.sweep(trial.exchange, trial.clock.now + seconds - 2)
    assert trial.driver.errors == [] or setting == "total_timeout_s"
    trial.driver.errors.clear()
    trial.attempts.sweep(trial.exchange, trial.clock.now + seconds)
    (error,) = trial.driver.errors
    assert isinstance(error, UpstreamTimeoutError)
    assert f"gateway.{setting}" in error.message


def test_a_replica_that_writes_other_answers_is_not_silent() -> None:
    """Its breaker counts silence, and a long honest answer beside others is none."""
    trial = Trial()
    trial.begin()
    replica = trial.replicas[0]
    replica.heard_at = trial.clock.now + 5
    trial.attempts.sweep(trial.exchange, trial.clock.now + 21)
    assert replica.breaker.no_failures
    other = Trial()
    other.begin()
    other.attempts.sweep(other.exchange, other.clock.now + 21)
    assert not other.replicas[0].breaker.no_failures
