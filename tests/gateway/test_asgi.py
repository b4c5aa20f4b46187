"""Requests in an application's hands: what it is told of them, and what becomes of its failures."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from gateway.errors import MalformedRequestError
from gateway.wire.asgi import AsgiCall
from gateway.wire.heads import parse_request

SECRET = "what a client sent"


class Client:
    """Takes an answer."""

    def __init__(self) -> None:
        self.transport = SimpleNamespace(get_extra_info={"sockname": ("127.0.0.1", 80)}.get)
        self.got: list[tuple[bytes, bytes]] = []

    def send_whole(self, head: bytes, body: bytes, *, no_body: bool = False) -> None:
        self.got.append((head, body))


async def called(app: Any, target: bytes) -> Client:
    client: Any = Client()
    head = parse_request(b"GET " + target + b" HTTP/1.1\r\nhost: a")
    await AsgiCall(app, client, head, b"", lambda: b"").task
    found: Client = client
    return found


async def scope_of(target: bytes) -> Scope:
    scopes = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append(scope)

    await called(app, target)
    return scopes[0]


async def test_a_target_is_told_in_ascii() -> None:
    scope = await scope_of(b"/v1/\xc3\xa9%20\xff?a=\xff&b=\xc3\xa9%20")
    assert scope["path"] == "/v1/\N{LATIN SMALL LETTER E WITH ACUTE} \N{REPLACEMENT CHARACTER}"
    assert scope["raw_path"] == b"/v1/%C3%A9%20%FF"
    assert scope["query_string"] == b"a=%FF&b=%C3%A9%20"
    assert Request(scope).query_params["b"] == "\N{LATIN SMALL LETTER E WITH ACUTE} "


@given(st.binary(max_size=20), st.binary(max_size=20))
def test_whatever_the_target_is_an_application_can_read_it(path: bytes, query: bytes) -> None:
    try:
        request = Request(asyncio.run(scope_of(b"/%b?%b" % (path, query))))
    except MalformedRequestError:
        return
    assert request.url.hostname == "a"
    assert str(request.url)
    assert isinstance(request.query_params.multi_items(), list)


async def test_a_failure_is_told_by_its_type_and_place_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError(SECRET)

    with caplog.at_level(logging.ERROR):
        client = await called(app, b"/readiness?" + SECRET.replace(" ", "+").encode())
    assert client.got == [
        (b"HTTP/1.1 500 Internal Server Error\r\n", b"The gateway failed; its log says why.\n")
    ]
    (record,) = caplog.records
    cause = record.__dict__["fields"]["cause"]
    assert cause.startswith("ValueError at ")
    assert "test_asgi.py:" in cause
    assert record.exc_info is None
    assert SECRET.split(" ")[-1] not in str(record.__dict__["fields"]) + record.getMessage()
