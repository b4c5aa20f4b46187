"""Pools and their replicas: who is counted where, and what outlives a change of the configuration."""

from __future__ import annotations

import base64
import random
from typing import Any

from gateway_stack import make_config
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.proxy.endpoints import CHAT
from gateway.routing.policies import PickQuery, RoundRobin
from gateway.routing.pools import Pool, Pools
from gateway.routing.replicas import Lease, Reading, Replica
from gateway.telemetry.engines import parse_reading


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def replicas(count: int, board: Any = None) -> list[Replica]:
    return [
        Replica("assistant:int8", f"int8-{n}", f"http://127.0.0.1:{n + 1}", Clock(), board=board)
        for n in range(count)
    ]


class OneWorkersBoard:
    """What a worker has written for the others to read."""

    def __init__(self) -> None:
        self.written: dict[int, int] = {}

    def slot(self, variant: str, url: str) -> int:
        return int(url.rpartition(":")[2])

    def write(self, slot: int, in_flight: int) -> None:
        self.written[slot] = in_flight

    def others(self, slot: int) -> int:
        return 100

    def free(self, slot: int) -> None:
        """A replica is gone."""


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2000)), max_size=60), st.randoms())
def test_what_is_taken_is_given_back_once(requests: list[tuple[int, int]], rng: random.Random) -> None:
    """In any order, some twice: the accounts are those of the requests under way, and empty in the end."""
    board = OneWorkersBoard()
    three = replicas(3, board)
    under_way: list[tuple[Replica, Lease, float]] = []
    for number, size in requests:
        replica, work = three[number], size / 512
        under_way.append((replica, replica.take(work), work))
        if rng.random() < 0.3:
            under_way[-1][1].began()
            under_way[-1] = (*under_way[-1][:2], 0.0)
        while under_way and rng.random() < 0.5:
            _, lease, _ = under_way.pop(rng.randrange(len(under_way)))
            for _ in range(rng.randint(1, 3)):
                lease.release()
                lease.began()
        for one in three:
            mine = [work for replica, _, work in under_way if replica is one]
            assert one.in_flight == 100 + len(mine)
            assert one.work == sum(mine)
            assert board.written.get(board.slot(one.variant, one.url), 0) == len(mine)
    for _, lease, _ in under_way:
        lease.release()
    assert [(one.in_flight, one.work) for one in three] == [(100, 0.0)] * 3
    assert not any(board.written.values())


def test_a_full_replica_is_not_picked() -> None:
    pair = replicas(2)
    pool = Pool("int8", pair, RoundRobin(), limit=1)
    leases = [pool.pick(PickQuery()) for _ in range(2)]
    assert {picked[0] for picked in leases if picked} == set(pair)
    held = [picked[0].take() for picked in leases if picked]
    assert pool.pick(PickQuery(), last=True) is None, "not even where no other pool is left"
    assert len(pool.usable()) == 2, "full is not broken"
    held[0].release()
    assert pool.pick(PickQuery()) is not None


def test_replicas_that_stay_keep_what_is_known_of_them() -> None:
    clock = Clock()
    pools = Pools(make_config(pools={"int8": ("http://a:1", "http://b:1")}), clock)
    a, b = pools.by_variant["assistant:int8"].replicas
    lease = b.take()
    b.breaker.not_reached()
    after = Pools(make_config(pools={"int8": ("http://c:1", "http://b:1")}), clock, before=pools)
    c, still = after.by_variant["assistant:int8"].replicas
    assert still is b
    assert (still.in_flight, still.breaker.closed) == (1, False)
    assert c is not a
    assert c.name == "assistant:int8-0", "the lowest name that is free"
    assert after.by_variant["assistant:int8"].policy is pools.by_variant["assistant:int8"].policy, (
        "and what it knows of caches"
    )
    lease.release()
    assert still.in_flight == 0


def test_a_replica_is_named_without_its_password() -> None:
    replica = Replica("assistant:int8", "assistant:int8-0", "http://me:pw@10.0.0.1:8000", Clock())
    assert replica.where == "assistant:int8-0 at http://me:…@10.0.0.1:8000"


def test_a_name_and_a_password_in_a_url_go_with_every_request() -> None:
    replica = Replica("a:int8", "a:int8-0", "http://me%40here:p%3Aw@10.0.0.1:8000", Clock(), key="sk-engine")
    head = replica.request_head(CHAT)
    assert b"authorization: Basic " + base64.b64encode(b"me@here:p:w") + b"\r\n" in head
    assert b"host: 10.0.0.1:8000\r\n" in head
    assert b"sk-engine" not in head
    assert replica.credentials == {"authorization": "Basic " + base64.b64encode(b"me@here:p:w").decode()}
    assert replica.base == "http://10.0.0.1:8000"


def test_an_engine_says_how_many_tokens_it_has_read_and_written() -> None:
    text = """# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="m"} 11.0
vllm:prompt_tokens_total{engine="1",model_name="m"} 5.0
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="m"} 7.0
"""
    reading = parse_reading(text)
    assert (reading.prompt_tokens, reading.generation_tokens) == (16, 7)
    assert parse_reading("vllm:num_requests_running 1\n").generation_tokens is None
    assert Reading().prompt_tokens is None
