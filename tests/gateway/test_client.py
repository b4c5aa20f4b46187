"""A client's connection, byte by byte, on a real socket."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import pytest
from gateway_stack import CHAT, Stack, eventually, running_gateway

from gateway.wire.requests import LARGE_HEAD_BYTES

QUESTION = json.dumps({"model": "assistant", "messages": [{"role": "user", "content": "hi"}]}).encode()


def request(body: bytes = QUESTION, *lines: str, path: str = CHAT, version: str = "1.1") -> bytes:
    head = [f"POST {path} HTTP/{version}", "host: a", "content-type: application/json", *lines]
    if not any(line.lower().startswith(("content-length", "transfer-encoding")) for line in lines):
        head.append(f"content-length: {len(body)}")
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


class Client:
    """A socket, and what is read from it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the next answer."""
        async with asyncio.timeout(30):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.strip().split("\r\n")
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
            if "content-length" in headers:
                body = await self.reader.readexactly(int(headers["content-length"]))
            elif headers.get("transfer-encoding") == "chunked":
                body = b""
                while size := int(await self.reader.readuntil(b"\r\n"), 16):
                    body += await self.reader.readexactly(size)
                    await self.reader.readexactly(2)
                await self.reader.readexactly(2)
            else:
                body = await self.reader.read()
            return int(first.split()[1]), headers, body

    async def closed(self, within_s: float = 25.0) -> bool:
        """Whether the gateway closes the connection without another byte."""
        try:
            async with asyncio.timeout(within_s):
                return await self.reader.read(1) == b""
        except ConnectionError:
            return True
        except TimeoutError:
            return False


@asynccontextmanager
async def connected(stack: Stack) -> AsyncIterator[Client]:
    parts = urlsplit(stack.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()


BIG, INT8 = "assistant:bf16", "assistant:int8"


async def test_requests_one_after_another_and_all_at_once(stack: Stack) -> None:
    async with connected(stack) as client:
        for _ in range(3):
            await client.send(request())
            assert (await client.answer())[0] == 200
        other = json.dumps({"model": "summarizer", "messages": [{"role": "user", "content": "hi"}]}).encode()
        get = b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n"
        await client.send(request() + request(other) + get + request(other) + b"\r\n" + request())
        variants = []
        for _ in range(5):
            status, headers, _ = await client.answer()
            assert status == 200
            variants.append(headers.get("x-tiercel-variant"))
        assert variants == [BIG, INT8, None, INT8, BIG], "in order, each its own answer"


async def test_a_request_in_single_bytes(stack: Stack) -> None:
    async with connected(stack) as client:
        for byte in request():
            client.writer.write(bytes([byte]))
            await asyncio.sleep(0)
        assert (await client.answer())[0] == 200
        chunked = b"".join(b"1\r\n%c\r\n" % byte for byte in QUESTION) + b"0\r\n\r\n"
        for byte in request(chunked, "transfer-encoding: chunked"):
            client.writer.write(bytes([byte]))
        assert (await client.answer())[0] == 200


async def test_continue_is_said_when_it_is_waited_for(stack: Stack) -> None:
    async with connected(stack) as client:
        raw = request(QUESTION, "expect: 100-continue")
        await client.send(raw[: -len(QUESTION)])
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(QUESTION)
        assert (await client.answer())[0] == 200


async def test_http_1_0(stack: Stack) -> None:
    streamed = QUESTION[:-1] + b', "stream": true}'
    for body in (QUESTION, streamed):
        async with connected(stack) as client:
            await client.send(request(body, version="1.0"))
            status, headers, answer = await client.answer()
            assert status == 200
            assert "transfer-encoding" not in headers
            assert b"$277." in answer.replace(b" ", b"")
            assert await client.closed()


async def test_closing_when_asked_to(stack: Stack) -> None:
    async with connected(stack) as client:
        await client.send(request(QUESTION, "connection: close"))
        _, headers, _ = await client.answer()
        assert headers["connection"] == "close"
        assert await client.closed()


async def test_what_cannot_be_read_is_refused_and_the_connection_closed(stack: Stack) -> None:
    hidden = b"GET /admin/config HTTP/1.1\r\nhost: a\r\n\r\n"
    smuggled, chunked = b"0\r\n\r\n" + hidden, b"%x\r\n%b\r\n" % (len(QUESTION), QUESTION)
    for raw, status in (
        (request(smuggled, "content-length: 5", "transfer-encoding: chunked"), 400),
        (request(b"zz\r\n", "transfer-encoding: chunked"), 400),
        (request(chunked + b"0\r\nx: y\n\n" + hidden, "transfer-encoding: chunked"), 400),
        (request(chunked + b"0\r\n" + hidden, "transfer-encoding: chunked"), 400),
        (request(chunked + b"0\r\nx: y\rz\r\n\r\n", "transfer-encoding: chunked"), 400),
        (request(b"2;a\rb\r\n{}\r\n0\r\n\r\n", "transfer-encoding: chunked"), 400),
        (request(QUESTION, "transfer-encoding: gzip"), 501),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nx: " + b"y" * 70_000, 431),
        (request(b"", "content-length: 99999999999"), 413),
    ):
        async with connected(stack) as client:
            await client.send(raw)
            found, headers, body = await client.answer()
            assert found == status, raw[:60]
            assert headers["connection"] == "close"
            assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
            client.writer.write(request())
            assert await client.closed(), "nothing that follows is taken for a request"
    assert not any(engine.requests for engine in stack.engines.values())


async def test_trailers_and_extensions_are_read_over(stack: Stack) -> None:
    body = b'%x;a="b"\r\n%b\r\n0\r\ndigest: c\r\nx: y\r\n\r\n' % (len(QUESTION), QUESTION)
    async with connected(stack) as client:
        for _ in range(2):
            await client.send(request(body, "transfer-encoding: chunked"))
            assert (await client.answer())[0] == 200


async def test_slow_clients_are_not_waited_for() -> None:
    limits = {"header_timeout_s": 0.2, "body_timeout_s": 0.2, "keep_alive_s": 0.2}
    async with running_gateway(gateway=limits) as stack:
        async with connected(stack) as client:
            await client.send(b"POST / HT")
            assert (await client.answer())[0] == 408
        async with connected(stack) as client:
            await client.send(request()[:-5])
            assert (await client.answer())[0] == 408
        async with connected(stack) as client:
            assert await client.closed(), "an idle connection"
        await eventually(lambda: not stack.gateway.plane.clients)


async def test_a_connection_that_was_idle_has_its_time_for_a_head() -> None:
    async with running_gateway(gateway={"header_timeout_s": 2.0}) as stack, connected(stack) as client:
        await client.send(request())
        assert (await client.answer())[0] == 200
        await asyncio.sleep(2.5)
        await client.send(request()[:20])
        await asyncio.sleep(0.3)
        await client.send(request()[20:])
        assert (await client.answer())[0] == 200


async def test_random_bytes_break_nothing(stack: Stack) -> None:
    rng = random.Random(7)
    good = request()
    for _ in range(150):
        raw = bytearray(good)
        for _ in range(rng.randint(1, 8)):
            at = rng.randrange(len(raw))
            raw[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 4))
        async with connected(stack) as client:
            await client.send(bytes(raw))
            client.writer.write_eof()
            async with asyncio.timeout(30):
                answer = await client.reader.read()
            assert b"Traceback" not in answer
            assert not answer or answer.startswith(b"HTTP/1.1 "), raw
    await eventually(lambda: not stack.gateway.plane.clients)
    assert not stack.gateway.plane.active
    async with stack.post() as response:
        assert response.status == 200
    pools = stack.gateway.plane.snapshot.pools
    assert all(replica.in_flight == 0 for replica in pools.replicas())


async def test_answers_are_never_crossed(stack: Stack) -> None:
    """Many clients at once, some of which leave: each gets its own answer or none."""
    for engine in stack.engines.values():
        engine.script.token_delay_s = 0.005
        engine.script.echo = True

    async def ask(n: int) -> None:
        body = {"stream": n % 2 == 0, "messages": [{"role": "user", "content": f"number {n}"}]}
        async with stack.post(body) as response:
            if n % 7 == 0:
                return
            text = await response.text()
        assert f"<{n}>" in text
        assert text.count("<") == 1

    await asyncio.gather(*(ask(n) for n in range(120)))


async def test_a_client_that_does_not_read_holds_the_engine_back() -> None:
    """Nothing is gathered in memory for a slow reader: the engine's connection is not read either."""
    async with running_gateway(quality={"logprobs": False}) as stack:
        stack.engines["bf16"].script.text = ("x" * 20_000 + " ") * 1_000
        active = stack.gateway.plane.active
        parts = urlsplit(stack.url)
        with socket.create_connection((parts.hostname, parts.port)) as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.sendall(request(QUESTION[:-1] + b', "stream": true}'))
            await eventually(lambda: any(exchange.paused_at for exchange in active))
            client = next(iter(active)).client
            await asyncio.sleep(0.3)
            assert client.transport.get_write_buffer_size() < 1 << 20
            async with stack.post({"model": "summarizer"}) as response:
                assert response.status == 200, "and nobody else waits"
        await eventually(lambda: not active)


@pytest.mark.parametrize("when", ["mid-stream", "before the first token", "not streamed"])
async def test_a_client_that_leaves_frees_the_engine_at_once(stack: Stack, when: str) -> None:
    engine = stack.engines["bf16"]
    engine.script.first_token_delay_s = 0 if when == "mid-stream" else 600
    engine.script.token_delay_s = 600
    body = QUESTION if when == "not streamed" else QUESTION[:-1] + b', "stream": true}'
    async with connected(stack) as client:
        await client.send(request(body))
        await eventually(lambda: engine.running == 1)
        if when == "mid-stream":
            await client.reader.readuntil(b"data: ")
        client.writer.transport.abort()
        await eventually(lambda: engine.running == 0)
    assert engine.aborted == 1


async def test_idle_connections_keep_no_large_heads() -> None:
    """Ten thousand of them would else keep a gigabyte, and nobody has to have a key for it."""
    async with running_gateway() as stack, connected(stack) as client:
        head = f"GET /health HTTP/1.1\r\nhost: a\r\nx-long: {'x' * LARGE_HEAD_BYTES}\r\n\r\n".encode()
        await client.send(head)
        assert (await client.answer())[0] == 200
        (connection,) = stack.gateway.plane.clients
        await eventually(lambda: connection._reader.head is None)
        await client.send(head + request())
        assert [(await client.answer())[0] for _ in range(2)] == [200, 200]
        assert connection._reader.head is not None


@pytest.mark.parametrize("path", ["/readiness", "/v1/models/zz", "/v1/responses/x", "/admin/config/", "/"])
async def test_bytes_that_are_no_text_in_a_target_are_no_failure(
    stack: Stack, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(stack) as client:
        statuses = []
        for more in (b"", b"?other=\xff&\xc3\xa9", b"\xff?\xff"):
            await client.send(b"GET " + path.encode() + more + b" HTTP/1.1\r\nhost: a\r\n\r\n")
            statuses.append((await client.answer())[0])
    assert 500 not in statuses
    assert "a page failed" not in caplog.text
