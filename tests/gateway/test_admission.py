"""What clients can make the gateway hold, for how long, and what they are told: on real sockets."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import pytest
import uvloop
from gateway_stack import CHAT, Stack, eventually, running_gateway
from hypothesis import given, settings
from hypothesis import strategies as st
from test_client import QUESTION, Client, connected, request

from benchmarks.gateway.fuzz_client import Request, ScriptedHandler, answer_head, client_scenario, marked
from gateway.identity import hash_of
from gateway.wire.client import MOST_AT_ONCE, ClientConnection
from gateway.wire.flow import BACKLOG, WRITE_BUFFER
from gateway.wire.states import ClientState, OutOfOrderError

KEYS = {"keys": [{"name": "a", "sha256": hash_of("secret"), "tenant": "acme"}]}
LIMITS = {"max_buffered_bytes": 100_000, "max_buffered_bytes_per_tenant": 60_000}
GET = b"GET /metrics HTTP/1.1\r\nhost: a\r\n\r\n"


def said(answer: tuple[int, dict[str, str], bytes]) -> str:
    return str(json.loads(answer[2])["error"]["message"])


@asynccontextmanager
async def not_reading(stack: Stack) -> AsyncIterator[tuple[socket.socket, ClientConnection]]:
    """A client with nothing in its pockets, and the gateway's side of its connection."""
    await eventually(lambda: not stack.gateway.plane.clients)
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        raw.setblocking(False)
        port = int(stack.url.rpartition(":")[2])
        await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", port))
        await eventually(lambda: stack.gateway.plane.clients)
        (connection,) = stack.gateway.plane.clients
        sending = connection.transport.get_extra_info("socket")
        sending.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
        yield raw, connection


async def test_a_client_that_pipelines_and_does_not_read(stack: Stack) -> None:
    """Its requests wait, and so do the answers' bytes: in its own pocket."""
    async with connected(stack) as other:
        await other.send(GET)
        _, headers, _ = await other.answer()
    answer_bytes = int(headers["content-length"]) + 2_000
    loop = asyncio.get_running_loop()
    asked = 2_000_000 // answer_bytes
    async with not_reading(stack) as (raw, connection):
        sending = asyncio.create_task(loop.sock_sendall(raw, GET * asked))
        await eventually(lambda: connection.flow.held & WRITE_BUFFER, within_s=30)
        assert connection.transport.get_write_buffer_size() <= answer_bytes + (64 << 10)
        assert stack.gateway.plane.intake.buffered > 0, "what waits is counted"
        async with stack.post() as response:
            assert response.status == 200, "nobody else waits"
        got, most, begin = 0, 0, b"HTTP/1.1 200 OK"
        seen = b""
        async with asyncio.timeout(60):
            while got < asked:
                seen = seen[1 - len(begin) :] + await loop.sock_recv(raw, 1 << 20)
                got += seen.count(begin)
                most = max(most, connection.transport.get_write_buffer_size())
        await sending
        assert most <= answer_bytes + (64 << 10)
        await eventually(lambda: connection.flow.held == 0)
        await eventually(lambda: stack.gateway.plane.intake.buffered == 0)


async def test_nothing_is_kept_of_a_client_without_a_key() -> None:
    async with running_gateway(**KEYS) as stack:
        size = 8 << 20
        for path in (CHAT, "/nowhere", "/v1/embeddings"):
            async with connected(stack) as client:
                await client.send(request(b"x" * 100_000, f"content-length: {size}", path=path))
                status, headers, _ = await client.answer()
                assert (status, headers["connection"]) == (401, "close")
                assert stack.gateway.plane.intake.buffered == 0
                await client.send(b"x" * (size - 100_000))
                assert await client.closed(), "and the rest is read over"
        async with connected(stack) as client:
            await client.send(request(b"", "content-length: 100", "expect: 100-continue"))
            assert (await client.answer())[0] == 401, "and not 100"


async def test_paths_and_methods_are_refused_before_the_body() -> None:
    async with running_gateway() as stack:
        for raw, status in (
            (request(b"", f"content-length: {64 << 20}"), 413),
            (request(b"", "content-length: 1000").replace(b"POST", b"PUT"), 405),
        ):
            async with connected(stack) as client:
                await client.send(raw)
                found, headers, _ = await client.answer()
                assert (found, headers["connection"]) == (status, "close")


async def test_a_refused_request_that_is_whole_does_not_end_the_connection() -> None:
    async with running_gateway(**KEYS) as stack, connected(stack) as client:
        await client.send(request() + request(QUESTION, "authorization: Bearer secret"))
        assert [(await client.answer())[0] for _ in range(2)] == [401, 200]


async def test_an_image_of_ten_mebibytes_fits(stack: Stack) -> None:
    image = "data:image/png;base64," + "A" * (14 << 20)
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "what is it?"}]
    body = json.dumps({"model": "assistant", "messages": [{"role": "user", "content": content}]}).encode()
    async with connected(stack) as client:
        await client.send(request(body))
        assert (await client.answer())[0] == 200
        assert stack.gateway.plane.intake.buffered == 0
    async with connected(stack) as client:
        await client.send(request(b"", f"content-length: {64 << 20}"))
        assert "gateway.max_body_bytes" in said(await client.answer())


async def test_connections_beyond_the_limit_are_told_so() -> None:
    async with running_gateway(gateway={"max_connections": 2}) as stack:
        async with connected(stack) as first, connected(stack) as second:
            for client in (first, second):
                await client.send(request())
                assert (await client.answer())[0] == 200
            async with connected(stack) as third:
                answer = await third.answer()
                assert answer[0] == 503
                assert int(answer[1]["retry-after"]) > 0
                assert "gateway.max_connections" in said(answer)
                assert await third.closed()
            await first.send(request())
            assert (await first.answer())[0] == 200
        await eventually(lambda: stack.gateway.plane.intake.connections == 0)


async def test_bodies_beyond_the_limits_are_refused_and_not_kept() -> None:
    keys = {"keys": [{"name": t, "sha256": hash_of(t), "tenant": t} for t in ("a", "b")]}
    async with running_gateway(gateway=LIMITS, **keys) as stack:
        intake = stack.gateway.plane.intake

        async def part(client: Client, tenant: str) -> None:
            lines = (f"authorization: Bearer {tenant}", "content-length: 70000")
            await client.send(request(b" " * 50_000, *lines))

        async with connected(stack) as first, connected(stack) as second, connected(stack) as third:
            await part(first, "a")
            await eventually(lambda: intake.by_tenant.get("tenant:a") == 50_000)
            await part(second, "a")
            answer = await second.answer()
            assert (answer[0], answer[1]["connection"], answer[1]["retry-after"]) == (429, "close", "1")
            assert "gateway.max_buffered_bytes_per_tenant" in said(answer)
            await part(third, "b")
            await eventually(lambda: intake.buffered == 100_000)
            async with connected(stack) as fourth:
                await part(fourth, "b")
                answer = await fourth.answer()
                assert answer[0] == 503
                assert "gateway.max_buffered_bytes)" in said(answer)
        await eventually(lambda: intake.buffered == 0)
        async with stack.post(headers={"authorization": "Bearer a"}) as response:
            assert response.status == 200


async def test_a_key_without_a_tenant_has_room_of_its_own() -> None:
    keys = {"keys": [{"name": name, "sha256": hash_of(name)} for name in ("a", "b")]}
    async with running_gateway(gateway=LIMITS, **keys) as stack:
        intake = stack.gateway.plane.intake
        async with connected(stack) as first, connected(stack) as second, connected(stack) as third:
            lines = ("authorization: Bearer a", "content-length: 70000")
            await first.send(request(b" " * 50_000, *lines))
            await eventually(lambda: intake.by_tenant == {"key:a": 50_000})
            await second.send(request(b" " * 50_000, *lines))
            assert (await second.answer())[0] == 429
            await third.send(request(b" " * 50_000, "authorization: Bearer b", lines[1]))
            await eventually(lambda: intake.by_tenant == {"key:a": 50_000, "key:b": 50_000})


async def test_a_compressed_body_takes_the_room_that_it_becomes() -> None:
    keys = {"keys": [{"name": "a", "sha256": hash_of("a"), "tenant": "a"}]}
    messages = [{"role": "user", "content": "x" * 50_000}]
    packed = gzip.compress(json.dumps({"model": "assistant", "messages": messages}).encode())
    lines = ("authorization: Bearer a", "content-encoding: gzip", f"content-length: {len(packed)}")
    async with running_gateway(gateway=LIMITS | {"max_buffered_bytes": 400_000}, **keys) as stack:
        intake, engine = stack.gateway.plane.intake, stack.engines["bf16"]
        engine.script.hold = asyncio.Event()
        async with connected(stack) as first, connected(stack) as second:
            await first.send(request(packed, *lines))
            await eventually(lambda: intake.by_tenant.get("tenant:a", 0) > 50_000)
            await second.send(request(packed, *lines))
            answer = await second.answer()
            assert answer[0] == 429
            assert "gateway.max_buffered_bytes_per_tenant" in said(answer)
            engine.script.hold.set()
            assert (await first.answer())[0] == 200
        await eventually(lambda: intake.buffered == 0)


async def test_requests_behind_one_that_is_answered_are_counted_too() -> None:
    """Where there is no room for them, the first one is answered still, and the others are refused."""
    async with running_gateway(gateway={"max_buffered_bytes": 20_000}) as stack, connected(stack) as client:
        engine = stack.engines["bf16"]
        engine.script.hold = asyncio.Event()
        await client.send(request())
        await eventually(lambda: engine.running)
        await client.send(request(b" " * 50_000))
        await eventually(lambda: next(iter(stack.gateway.plane.clients)).flow.held & BACKLOG)
        assert stack.gateway.plane.intake.buffered == 0
        engine.script.hold.set()
        assert (await client.answer())[0] == 200
        answer = await client.answer()
        assert (answer[0], answer[1]["connection"]) == (503, "close")
        assert "gateway.max_buffered_bytes" in said(answer)


async def rest(client: Client) -> bytes:
    """What comes until the end of the connection, or until it is reset because we were still sending. What
    came just before a reset is in the reader's buffer, and ``read`` does not give it out any more."""
    got = b""
    try:
        while part := await client.reader.read(1 << 16):
            got += part
    except ConnectionError:
        got += bytes(client.reader._buffer)  # type: ignore[attr-defined]
    return got


@pytest.mark.parametrize("sent", ["head", "body", "nothing"])
async def test_a_client_that_trickles(sent: str) -> None:
    """Each byte comes in time, and all of them would hold a buffer for hours."""
    # A body's silence has longer: a busy machine makes pauses of its own.
    limits = {"header_timeout_s": 0.4, "body_timeout_s": 2.0, "keep_alive_s": 0.4}
    setting = {"head": "header_timeout_s", "body": "min_body_bytes_per_s", "nothing": ""}[sent]
    async with running_gateway(gateway=limits) as stack, connected(stack) as client:
        if sent == "body":
            await client.send(request(b"", "content-length: 1000000"))
        elif sent == "head":
            await client.send(b"POST / HTTP/1.1\r\nx: ")
        ended = asyncio.create_task(rest(client))
        for _ in range(200):
            client.writer.write(b"\r\n" if sent == "nothing" else b"x")
            await asyncio.sleep(0.05)
            if ended.done():
                break
        answer = await asyncio.wait_for(ended, 30)
        assert answer.startswith(b"HTTP/1.1 408 ") if setting else not answer
        assert f"gateway.{setting}".encode() in answer or not setting
        assert stack.gateway.plane.intake.buffered == 0


async def test_a_client_that_takes_nothing_is_cut() -> None:
    async with (
        running_gateway(gateway={"keep_alive_s": 0.5}) as stack,
        not_reading(stack) as (raw, connection),
    ):
        await asyncio.get_running_loop().sock_sendall(raw, GET * 200)
        await eventually(lambda: connection.flow.held & WRITE_BUFFER, within_s=30)
        await eventually(lambda: not stack.gateway.plane.clients, within_s=30)


async def test_a_client_that_leaves_while_it_is_not_read_frees_the_engine(stack: Stack) -> None:
    engine = stack.engines["bf16"]
    engine.script.first_token_delay_s = 30
    async with connected(stack) as client:
        await client.send(request())
        await eventually(lambda: engine.running)
        await client.send(b" " * 200_000)
        (connection,) = stack.gateway.plane.clients
        await eventually(lambda: connection.flow.held & BACKLOG)
        client.writer.transport.abort()
        await eventually(lambda: engine.running == 0)


async def test_head_requests_keep_answers_in_step(stack: Stack) -> None:
    """Whoever answers a HEAD, no body follows, or the next answer would begin in the middle of it."""
    heads = b"".join(
        b"HEAD %b HTTP/1.1\r\nhost: a\r\n\r\n" % path
        for path in (CHAT.encode(), b"/nowhere", b"/v1/models", b"/admin/config")
    )
    async with connected(stack) as client:
        await client.send(heads + b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n")
        for _ in range(4):
            head = await client.reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 ")
            assert b"content-length: " in head
        status, _, body = await client.answer()
        assert (status, json.loads(body)["object"]) == (200, "list")
        await client.send(b"HEAD / HTTP/1.1\r\n\r\n")  # without a host: not one that can be read
        head = await client.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert await client.closed(), "nor then a body"


async def test_http_1_0_is_told_that_its_connection_is_kept(stack: Stack) -> None:
    async with connected(stack) as client:
        for _ in range(2):
            await client.send(request(QUESTION, "connection: keep-alive", version="1.0"))
            status, headers, _ = await client.answer()
            assert (status, headers["connection"]) == (200, "keep-alive")


async def wired(requests: list[Request]) -> tuple[ClientConnection, ScriptedHandler, socket.socket]:
    """A connection of its own, what stands behind it, and its client's end."""
    handler = ScriptedHandler(Random(1), requests)
    connection = ClientConnection(handler)
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, ours)
    return connection, handler, theirs


def plain(number: int, kind: str) -> Request:
    raw = b"POST /%b HTTP/1.1\r\nhost: a\r\nx-n: %d\r\ncontent-length: 0\r\n\r\n" % (kind.encode(), number)
    return Request(number, raw, kind=kind, answer=marked(number, b""))


async def test_an_answer_is_never_sent_twice_or_to_no_request() -> None:
    asked = plain(0, "sync")
    connection, _, client = await wired([asked])
    head = answer_head(asked)
    for wrong in (
        lambda: connection.send_whole(head, b"x"),
        lambda: connection.begin(head, b"x"),
        lambda: connection.send(b"x"),
        lambda: connection.end(b"x"),
    ):
        with pytest.raises(OutOfOrderError):
            wrong()
    client.send(asked.raw)
    await eventually(lambda: connection.state is ClientState.IDLE and connection._reader.head)
    with pytest.raises(OutOfOrderError):
        connection.send_whole(head, b"twice")
    await asyncio.sleep(0)
    got = await asyncio.get_running_loop().sock_recv(client, 10_000)
    assert got.count(b"HTTP/1.1") == 1
    assert got.endswith(b"\r\n\r\n" + asked.answer)
    connection.abort()
    connection.send_whole(head, b"to nobody")
    connection.end()
    client.close()


async def test_one_client_does_not_keep_the_loop_to_itself() -> None:
    """Thousands of small requests that come at once are answered a few at a time."""
    asked = [plain(n, "sync") for n in range(200)]
    connection, handler, client = await wired(asked)
    connection.data_received(b"".join(one.raw for one in asked))
    assert len(handler.served) <= MOST_AT_ONCE
    await eventually(lambda: len(handler.served) == 200)
    assert handler.served == list(range(200))
    await eventually(lambda: connection.flow.held == 0)
    connection.abort()
    client.close()


async def test_a_handler_that_fails_is_a_500(caplog: pytest.LogCaptureFixture) -> None:
    connection, handler, client = await wired([])
    client.send(plain(7, "sync").raw + plain(8, "sync").raw)  # it knows of neither
    got = b""
    async with asyncio.timeout(30):
        while got.count(b"HTTP/1.1 500") < 2:
            got += await asyncio.get_running_loop().sock_recv(client, 10_000)
    assert "a request could not be served" in caplog.text
    assert handler.served == []
    assert connection.state is ClientState.IDLE
    connection.abort()
    client.close()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1 << 32))
def test_any_client(seed: int) -> None:
    """Requests, cuts, pauses and ends at random: every answer in order, once, and nobody else's."""
    _, problems = uvloop.run(client_scenario(Random(seed)))
    assert not problems
