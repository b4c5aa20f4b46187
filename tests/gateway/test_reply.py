"""What the client is sent."""

from __future__ import annotations

import time

import pytest
from exchanges import Client, Driver, Trial, exchange

from gateway.errors import OverloadedError, UnauthenticatedError, UpstreamError
from gateway.proxy.endpoints import endpoint_of
from gateway.proxy.reply import MOST_GAPS, Reply, only_comments

EVENT = b'data: {"a":1}\n\n'


def test_a_head_says_where_a_request_went_and_is_made_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    trial, reply = Trial(), Reply()
    monkeypatch.setattr(time, "time", lambda: 1000.5)
    for number in range(2):
        one = exchange(trial.client, trial.driver, x_request_id=f"mine-{number}")
        trial.choose(one)
        reply.whole(one, b"{}")
    (_, first), (_, second) = trial.client.got
    assert first.startswith(b"HTTP/1.1 200 OK\r\n")
    for line in (
        b"content-type: application/json\r\n",
        b"x-tiercel-variant: assistant:int8\r\n",
        b"x-tiercel-replica: assistant:int8-0\r\n",
        b"x-tiercel-route-reason: cheapest_in_budget\r\n",
        b"date: Thu, 01 Jan 1970 00:16:40 GMT\r\n",
        b"x-request-id: mine-0\r\n",
    ):
        assert first.count(line) == 1
    assert second == first.replace(b"mine-0", b"mine-1")
    monkeypatch.setattr(time, "time", lambda: 1001.5)
    trial.choose(one)
    reply.whole(one, b"{}")
    assert b"00:16:41 GMT" in trial.client.got[-1][1]


def test_a_stream_is_begun_once_and_its_times_are_those_of_its_tokens() -> None:
    trial, reply = Trial(stream=True), Reply()
    one = trial.exchange
    for out, now in ((b": hi\n\n", 101.0), (EVENT, 102.0), (b": hi\n\n", 102.5), (EVENT, 103.0)):
        reply.part(one, out, now)
    reply.end(one)
    assert trial.client.kinds == ["begin", "part", "part", "part", "end"]
    assert b"text/event-stream" in trial.client.got[0][1]
    assert (one.first_at, one.gaps) == (102.0, [1.0]), "a comment is no token"
    one.gaps = [0.1] * MOST_GAPS
    reply.part(one, EVENT, 104.0)
    assert len(one.gaps) == MOST_GAPS


def test_a_stream_without_a_part_is_one_all_the_same() -> None:
    trial = Trial(stream=True)
    Reply().end(trial.exchange)
    assert trial.client.kinds == ["begin", "end"]


def test_an_error_is_a_status_or_the_last_event() -> None:
    trial, reply = Trial(stream=True), Reply()
    busy = OverloadedError("full; try again")
    busy.retry_after_s = 7
    reply.error(trial.exchange, busy)
    (_, head) = trial.client.got[0]
    assert head.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 7\r\n" in head
    reply.error(exchange(client := Client(), Driver()), UnauthenticatedError("no"))
    assert b"www-authenticate: Bearer\r\n" in client.got[0][1]
    begun = Trial(stream=True)
    reply.part(begun.exchange, EVENT, 1.0)
    reply.error(begun.exchange, UpstreamError("it broke off"))
    kind, last = begun.client.got[-1]
    assert (kind, last.startswith(b"data: "), b"it broke off" in last) == ("end", True, True)


def test_anthropics_clients_find_their_own_id() -> None:
    endpoint = endpoint_of("/v1/messages")
    assert endpoint is not None
    one = exchange(client := Client(), Driver(), endpoint=endpoint, x_request_id="r1")
    Reply().whole(one, b"{}")
    assert b"\r\nrequest-id: r1\r\n" in client.got[0][1]


@pytest.mark.parametrize(
    ("events", "are"),
    [
        (b": a\n\n", True),
        (b": a\n: b\n\n", True),
        (b": a\n\ndata: 1\n\n", False),
        (b": a", False),
        (b"data: 1\n\n", False),
    ],
)
def test_comments_are_no_answer(events: bytes, are: bool) -> None:
    assert only_comments(events) is are
