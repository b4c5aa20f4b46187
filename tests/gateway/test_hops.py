"""Each hop decides one thing, and refuses what it cannot decide."""

from __future__ import annotations

import gzip
from typing import Any, cast

import pytest
from exchanges import Client, Driver, FakeAttempt, Trial, exchange
from gateway_stack import make_config

from gateway.errors import BadRequestError, MethodNotAllowedError, NoWebSocketError, UnauthenticatedError
from gateway.identity import Identities
from gateway.proxy.endpoints import CHAT, INVOCATIONS, endpoint_of
from gateway.proxy.exchange import Exchange
from gateway.proxy.hops import PAGE_BODY_BYTES, Admit, Admitted, Identify, Pace, ReadBody, Settle
from gateway.proxy.large import SMALL_BYTES, LargeReader
from gateway.proxy.record import NO_USAGE, Record, Usage
from gateway.upstream.settle import Unreported
from gateway.wire.flow import Admission
from gateway.wire.heads import RequestHead

KEYS = [{"name": "k", "sha256": "0" * 64, "tenant": "t"}]


def head(path: str = CHAT.path, method: str = "POST", length: int = 2, **headers: str) -> RequestHead:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return RequestHead(method, path, "", given, length, keep_alive=True)


def asking(raw: bytes, path: str = CHAT.path, *, coding: str = "", is_json: bool = True) -> Exchange:
    endpoint = endpoint_of(path)
    assert endpoint is not None
    made = exchange(Client(), Driver(), endpoint=endpoint)
    admission = Admission("", 1 << 20)
    made.head.memo = Admitted(None, endpoint, None, admission, is_json=is_json, coding=coding)
    made.raw = raw
    return made


def test_what_a_head_decides_is_kept_with_it_for_one_configuration() -> None:
    admit, one = Admit(make_config()), head()
    first = admit(one)
    assert admit(one) is first
    assert Admit(make_config())(one) is not first


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (head(method="GET"), MethodNotAllowedError),
        (head(method="GET", upgrade="WebSocket"), NoWebSocketError),
        (head(), UnauthenticatedError),
        (head(authorization="Bearer wrong"), UnauthenticatedError),
        (head("/admin/config", "PUT", authorization="Bearer wrong"), UnauthenticatedError),
    ],
)
def test_a_head_that_may_not_come_in_is_refused(asked: RequestHead, error: type[Exception]) -> None:
    with pytest.raises(error):
        Admit(make_config(keys=KEYS))(asked)


def test_pages_get_small_bodies_and_prompts_what_is_configured() -> None:
    admit = Admit(make_config(gateway={"max_body_bytes": 2 << 20}))
    assert admit(head()).admission.max_body_bytes == 2 << 20
    assert admit(head("/admin/config", "PUT")).admission.max_body_bytes == PAGE_BODY_BYTES


def test_a_body_is_read_as_json_that_says_so() -> None:
    with pytest.raises(BadRequestError, match="content-type: application/json"):
        ReadBody(LargeReader())(asking(b"{}", is_json=False))


async def test_a_body_says_what_is_asked_and_what_takes_long_is_waited_for() -> None:
    raw = b'{"model": "assistant", "stream": true, "messages": []}'
    for sent, coding in ((raw, ""), (gzip.compress(raw), "gzip"), (raw + b" " * (2 << 20), "")):
        one = asking(sent, coding=coding)
        waiting = ReadBody(LargeReader())(one)
        assert (waiting is None) == (len(sent) <= SMALL_BYTES and not coding)
        if waiting is not None:
            await waiting
        assert (one.model, one.options.stream, one.options.chat) == ("assistant", True, True)
        assert cast(Any, one.client).grown == ([len(raw)] if coding else [])


def test_what_invocations_are_of_is_known_by_the_body() -> None:
    one = asking(b'{"model": "m", "messages": []}', INVOCATIONS.path)
    ReadBody(LargeReader())(one)
    assert one.endpoint is not INVOCATIONS
    assert one.endpoint.chat


def test_who_names_no_model_gets_what_the_role_does() -> None:
    config = make_config()
    for raw, model, names in ((b"{}", "core", False), (b'{"model": "assistant"}', "assistant", True)):
        one = asking(raw)
        ReadBody(LargeReader())(one)
        sender = Identities(config).sender({})
        one.head.memo = Admitted(None, CHAT, sender, Admission("", 0))
        Identify()(one)
        assert (one.model, one.names_model) == (model, names)
        assert one.caller is not None
        assert one.caller.role == "core"


def record(usage: Usage = NO_USAGE, **changes: Any) -> Record:
    fields = dict.fromkeys(Record.__struct_fields__) | {
        "role": "core", "status": 200, "usage": usage, "spent": (), "duration_s": 2.0, "hedged": False,
    }  # fmt: skip
    return Record(**fields | changes)


class Owed:
    def __init__(self) -> None:
        self.reported: list[Unreported] = []

    def report(self, attempt: Unreported) -> None:
        self.reported.append(attempt)


def test_every_attempt_that_was_begun_and_not_counted_is_reported_once() -> None:
    trial, owed = Trial(), Owed()
    settle, one = Settle(owed), trial.exchange  # type: ignore[arg-type]
    won, lost, never, refused = (FakeAttempt(one, trial.replicas[0]) for _ in range(4))
    won.sent = lost.sent = refused.sent = refused.did_nothing = True
    one.attempts, one.owing, one.winner = [won, never], (lost, refused), won
    partial = Usage(3, 0, 2, exact=False)
    settle(record(partial), one)
    assert [attempt.usage for attempt in owed.reported] == [NO_USAGE, partial]
    owed.reported.clear()
    settle(record(Usage(3, 0, 2, exact=True)), one)
    assert [attempt.usage for attempt in owed.reported] == [NO_USAGE], "the winner's is in the books"
    owed.reported.clear()
    settle(record(role=None), one)
    assert owed.reported == []


def test_only_first_answers_tell_how_fast_a_pool_is() -> None:
    trial, seen = Trial(), []

    class Paces:
        def answered(self, *told: Any) -> None:
            seen.append(told)

    pace, one = Pace(Paces()), trial.exchange  # type: ignore[arg-type]
    trial.choose(one)
    usage = Usage(3, 0, 5, exact=True)
    pace(record(usage), one)
    pace(record(usage, first_token_s=0.5), one)
    assert [(tokens, seconds) for _, _, tokens, seconds, _ in seen] == [(5, 2.0), (4, 1.5)]
    for other in (record(usage, status=502), record(usage, hedged=True), record(NO_USAGE)):
        pace(other, one)
    one.tries = 1
    pace(record(usage), one)
    assert len(seen) == 2
