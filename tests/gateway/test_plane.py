"""What all connections share: which configuration a request began with, what is refused how, and the end."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any, cast

import pytest
from exchanges import Client
from gateway_stack import CHAT, Stack, eventually, make_cards, make_config
from prometheus_client import CollectorRegistry

from gateway.app import Gateway
from gateway.errors import (
    GatewayError,
    MethodNotAllowedError,
    NoWebSocketError,
    OverloadedError,
    UnauthenticatedError,
)
from gateway.proxy.hops import Admit
from gateway.proxy.plane import DataPlane
from gateway.wire.client import ClientConnection
from gateway.wire.heads import RequestHead


@pytest.fixture
def plane() -> DataPlane:
    pools = {variant: (f"http://127.0.0.1:{n}",) for n, variant in enumerate(make_cards(), 1)}
    return Gateway(make_config(pools=pools), make_cards(), CollectorRegistry()).plane


def head(path: str = CHAT, method: str = "POST") -> RequestHead:
    return RequestHead(method, path, "", {"content-type": "application/json"}, 2, keep_alive=True)


def test_what_another_configuration_admitted_is_looked_at_again(plane: DataPlane) -> None:
    one = head()
    plane.admit(one)
    before = one.memo
    plane.admit(one)
    assert one.memo is before
    config = make_config(gateway={"max_body_bytes": 5000})
    plane.snapshot = dataclasses.replace(plane.snapshot, admit=Admit(config))
    assert plane.admit(one).max_body_bytes == 5000
    assert one.memo is not before


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UnauthenticatedError("no key"), 401, b"www-authenticate: Bearer\r\n"),
        (MethodNotAllowedError("POST only"), 405, b"allow: POST\r\n"),
        (NoWebSocketError("no"), 426, b"upgrade: HTTP/1.1\r\n"),
        (OverloadedError("full"), 503, b"retry-after: "),
    ],
)
def test_a_refusal_has_the_lines_that_its_status_asks_for(
    plane: DataPlane, error: GatewayError, status: int, line: bytes
) -> None:
    client = Client()
    plane.refuse(cast(ClientConnection, client), error, head())
    ((_, sent),) = client.got
    assert sent.startswith(b"HTTP/1.1 %d " % status)
    assert line in sent
    assert plane.metrics.requests.labels("other", "other", "none", "none", str(status)).value == 1


@pytest.mark.parametrize(("path", "key"), [("/v1/messages", b'"type":"error"'), (CHAT, b'"error"')])
def test_a_refusal_has_the_form_of_its_endpoint(plane: DataPlane, path: str, key: bytes) -> None:
    client = Client()
    plane.refuse(cast(ClientConnection, client), OverloadedError("full"), head(path))
    assert key in client.got[0][1].replace(b" ", b"").split(b"\r\n\r\n")[-1]


async def test_requests_under_way_keep_the_pipeline_that_they_began_with(stack: Stack) -> None:
    plane = stack.gateway.plane
    stack.engines["bf16"].script.hold = asyncio.Event()
    asking = asyncio.ensure_future(stack.post().__aenter__())
    await eventually(lambda: stack.engines["bf16"].running)
    (one,) = plane.active
    before = one.pipeline
    plane.snapshot = dataclasses.replace(
        plane.snapshot,
        pipeline=cast(Any, stack.gateway)._make_pipeline(
            plane.snapshot.config, plane.snapshot.router, plane.snapshot.observer
        ),
    )
    assert one.pipeline is before is not plane.snapshot.pipeline
    stack.engines["bf16"].script.hold.set()
    async with await asking as response:
        assert response.status == 200
    assert not plane.active


async def test_a_plane_that_is_closed_ends_what_is_under_way_with_a_reason(stack: Stack) -> None:
    stack.engines["bf16"].script.hold = asyncio.Event()
    asking = asyncio.ensure_future(stack.post().__aenter__())
    await eventually(lambda: stack.engines["bf16"].running)
    await stack.gateway.plane.close(1.0)
    async with await asking as response:
        assert response.status == 503
        assert (await response.json())["error"]["code"] == "shutting_down"
    assert not stack.gateway.plane.active


async def test_a_sweep_that_fails_is_not_the_last(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plane, sweeps = stack.gateway.plane, 0

    def sweep() -> None:
        nonlocal sweeps
        sweeps += 1
        raise ValueError("once")

    monkeypatch.setattr(plane, "_sweep", sweep)
    await eventually(lambda: sweeps >= 2)
    assert "the sweep failed" in caplog.text
