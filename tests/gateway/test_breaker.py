"""When a replica is left alone, and when it is tried again: too early harms it, too late harms everybody."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from gateway_stack import eventually, from_clients, running_gateway
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.routing.breaker import FAILURES_IN_A_ROW, LONGEST_BACK_OFF_S, Breaker
from gateway.routing.policies import PickQuery, RoundRobin
from gateway.routing.pools import Pool
from gateway.routing.replicas import Lease, Reading, Replica


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def made() -> tuple[Replica, Breaker, Clock]:
    clock = Clock()
    replica = Replica("int8", "assistant:int8-0", "http://127.0.0.1:1", clock)
    return replica, replica.breaker, clock


def failing(times: int = FAILURES_IN_A_ROW) -> tuple[Replica, Breaker, Clock]:
    replica, breaker, clock = made()
    for _ in range(times):
        breaker.errored()
    return replica, breaker, clock


def test_it_backs_off_and_doubles() -> None:
    _, breaker, clock = made()
    waits = []
    for _ in range(7):
        breaker.not_reached()
        opened = clock.now
        while not breaker.free:
            clock.now += 0.5
        waits.append(clock.now - opened)
    assert waits == [1, 2, 4, 8, 16, 30, 30]
    breaker.not_reached()
    breaker.healthy()
    assert breaker.closed


@pytest.mark.parametrize("failed", [Breaker.errored, Breaker.silent])
def test_the_third_failure_in_a_row_opens_it(failed: Callable[[Breaker], None]) -> None:
    _, breaker, _ = made()
    for _ in range(2):
        failed(breaker)
    breaker.answered()  # as after a 4xx: the replica works
    for _ in range(2):
        failed(breaker)
    assert breaker.closed
    failed(breaker)
    assert not breaker.closed
    assert not breaker.free
    breaker.healthy()
    assert not breaker.free, "an engine that answers 500 often reports that it is healthy"


def test_half_open_lets_one_in() -> None:
    replica, breaker, clock = failing()
    clock.now += 1
    assert breaker.free
    trial = replica.take()
    assert not breaker.free, "the others wait for what becomes of it"
    clock.now += 1000
    assert not breaker.free
    breaker.answered()
    trial.release()
    assert breaker.closed


def test_a_trial_that_is_cancelled_lets_the_next_one_in() -> None:
    replica, breaker, clock = failing()
    clock.now += 1
    for _ in range(3):
        lease = replica.take()
        assert not breaker.free
        lease.release()
        assert breaker.free
        lease.release()
    assert replica.in_flight == 0


def test_who_came_before_gives_nobody_elses_place_back() -> None:
    replica, breaker, clock = made()
    old = replica.take()
    for _ in range(FAILURES_IN_A_ROW):
        breaker.errored()
    clock.now += 1
    trial = replica.take()
    old.release()
    assert not breaker.free
    breaker.errored()  # the old one's, told late
    clock.now += LONGEST_BACK_OFF_S
    assert not breaker.free, "the trial is still under way"
    trial.release()
    assert breaker.free


def test_an_answer_that_has_begun_lets_others_in_and_breaking_off_shuts_them_out() -> None:
    replica, breaker, clock = failing()
    clock.now += 1
    trial = replica.take()
    breaker.heard()
    assert breaker.closed, "nobody waits for the end of a long stream"
    breaker.errored()
    assert not breaker.free, "one failure is enough then"
    clock.now += 1.5
    assert not breaker.free, "and the back-off has doubled"
    clock.now += 0.5
    assert breaker.free
    trial.release()
    breaker.heard()
    assert not breaker.closed, "what was under way before says nothing: nobody has been let in"


def test_an_engine_that_writes_tokens_is_not_silent() -> None:
    """Long answers that are not streamed: nothing comes of them, but the engine's own count rises."""
    replica, breaker, clock = failing()
    replica.read(Reading(prompt_tokens=5, generation_tokens=10))
    began = replica.heard_at
    clock.now += 100
    replica.read(Reading(prompt_tokens=5, generation_tokens=10))
    replica.read(Reading())
    replica.read(Reading(prompt_tokens=1, generation_tokens=1))
    assert replica.heard_at == began, "nothing was written, nothing is known, and it was started anew"
    lease = replica.take()
    replica.read(Reading(prompt_tokens=1, generation_tokens=2))
    assert replica.heard_at == clock.now
    assert breaker.closed
    lease.release()
    clock.now += 1
    replica.read(Reading(prompt_tokens=2, generation_tokens=2))
    assert replica.heard_at == clock.now, "reading a long prompt is progress too"


def test_the_last_pool_tries_one_rather_than_refuse_all() -> None:
    clock = Clock()
    pair = [Replica("bf16", f"bf16-{n}", f"http://127.0.0.1:{n + 1}", clock) for n in range(2)]
    pool = Pool("bf16", pair, RoundRobin())
    for _ in range(6):  # a back-off of 2 s and more
        clock.now += LONGEST_BACK_OFF_S
        for replica in pair:
            replica.breaker.errored()
    opened = clock.now
    assert pool.pick(PickQuery(), last=True) is None, "not at once"
    clock.now += 1
    assert pool.pick(PickQuery()) is None, "another pool is better"
    leases = []
    while picked := pool.pick(PickQuery(), last=True):
        leases.append(picked[0].take())
    assert len(leases) == 2, "one at each"
    for lease in leases:
        lease.release()
    assert pool.pick(PickQuery(), last=True) is None, "and one a second"
    clock.now += 1
    assert clock.now - opened < 3
    assert pool.pick(PickQuery(), last=True)
    for replica in pair:
        replica.breaker.not_reached()
    assert pool.pick(PickQuery(), last=True) is None, "nobody is there"


async def test_a_gateway_lets_one_request_find_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.routing.breaker.FIRST_BACK_OFF_S", 3600.0)
    async with running_gateway(watch={"rate": 0}) as stack:
        engine = stack.engines["bf16"]

        async def status() -> int:
            async with stack.post() as response:
                await response.read()
                return int(response.status)

        engine.script.status = 500
        assert [await status() for _ in range(5)] == [502, 502, 502, 503, 503]
        assert len(from_clients(engine)) == 3
        engine.script.status, engine.script.hold = 200, asyncio.Event()
        monkeypatch.setattr("gateway.routing.breaker.FIRST_BACK_OFF_S", 0.0)
        first = asyncio.ensure_future(status())
        await eventually(lambda: engine.running)
        assert [await status() for _ in range(4)] == [503] * 4
        assert len(from_clients(engine)) == 4, "the others are refused at once"
        engine.script.hold.set()
        assert await first == 200
        assert await asyncio.gather(*(status() for _ in range(4))) == [200] * 4


class Breakers(RuleBasedStateMachine):
    """Any sequence of requests, verdicts, probes, readings and time."""

    def __init__(self) -> None:
        super().__init__()
        self.replica, self.breaker, self.clock = made()
        self.leases: list[Lease] = []
        self.let_in: list[Lease] = []
        """Those that went while it was not closed, since it last was."""

    def closed_again(self) -> None:
        if self.breaker.closed:
            self.let_in.clear()

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 5.0, 40.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @precondition(lambda self: self.breaker.free or self.breaker.may_try_early)
    @rule(work=st.integers(0, 5000).map(lambda n: n / 512))
    def take(self, work: float) -> None:
        was_closed = self.breaker.closed
        lease = self.replica.take(work)
        self.leases.append(lease)
        if not was_closed:
            self.let_in.append(lease)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def first_token(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.leases)).began()

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), twice=st.booleans())
    def release(self, data: st.DataObject, twice: bool) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        lease.release()
        if twice:
            lease.release()
        self.leases.remove(lease)
        if lease in self.let_in:
            self.let_in.remove(lease)

    @rule(verdict=st.sampled_from([Breaker.errored, Breaker.silent, Breaker.not_reached]))
    def failed(self, verdict: Callable[[Breaker], None]) -> None:
        was_closed = self.breaker.closed
        verdict(self.breaker)
        assert was_closed or not self.breaker.closed, "no failure closes it"

    @rule()
    def answered(self) -> None:
        self.breaker.answered()
        assert self.breaker.closed
        assert self.breaker.no_failures
        self.closed_again()

    @rule(said=st.sampled_from([Breaker.heard, Breaker.healthy]))
    def told(self, said: Callable[[Breaker], None]) -> None:
        said(self.breaker)
        self.closed_again()

    @invariant()
    def one_at_a_time(self) -> None:
        assert len(self.let_in) <= 1
        if self.let_in and not self.breaker.closed:
            assert not self.breaker.free

    @invariant()
    def accounts_are_right(self) -> None:
        assert self.replica.in_flight == len(self.leases)
        assert self.replica.work >= 0
        if not self.leases:
            assert self.replica.work == 0

    @invariant()
    def without_failures_it_is_closed(self) -> None:
        assert self.breaker.closed or not self.breaker.no_failures

    def teardown(self) -> None:
        """However it came to be open: when all requests have ended it is not for long."""
        for lease in self.leases:
            lease.release()
        self.clock.now += LONGEST_BACK_OFF_S
        assert self.breaker.free
        assert self.replica.in_flight == 0
        assert self.replica.work == 0


Breakers.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
test_any_sequence = Breakers.TestCase


def test_one_keys_requests_alone_do_not_open_it() -> None:
    breaker = Breaker(lambda: 0.0)
    for _ in range(10):
        breaker.errored("mallory")
    assert breaker.closed
    breaker.errored("alice")
    assert not breaker.closed, "two keys' requests failed in a row"


def test_who_was_blamed_is_forgotten_with_an_answer() -> None:
    breaker = Breaker(lambda: 0.0)
    for _ in range(3):
        breaker.errored("alice")
        breaker.answered()
        for _ in range(5):
            breaker.errored("mallory")
    assert breaker.closed
