"""Connections to engines, on real sockets: what is kept, what is lost, and what was never read."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from random import Random

import pytest
import uvloop
from gateway_stack import eventually
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.gateway.fuzz import fuzz
from benchmarks.gateway.fuzz_engine import engine_scenario
from gateway.wire import engine as engines
from gateway.wire.engine import ConnectionPool, EngineConnection
from gateway.wire.heads import AnswerHead
from gateway.wire.states import EngineState, OutOfOrderError

REQUEST = b"POST / HTTP/1.1\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"


class Heard:
    """What a handler is told."""

    def __init__(self) -> None:
        self.status = 0
        self.body = b""
        self.end = ""
        self.unread = False
        self.pauses: EngineConnection | None = None
        """The connection that it pauses at each part."""

    def whole(self, head: AnswerHead, body: bytes) -> None:
        self.status, self.body, self.end = head.status, body, "ended"

    def began(self, head: AnswerHead) -> None:
        self.status = head.status

    def arrived(self, payload: bytes) -> None:
        self.body += payload
        if self.pauses is not None:
            self.pauses.pause()

    def ended(self) -> None:
        self.end = "ended"

    def lost(self, why: str, *, unread: bool) -> None:
        self.end, self.unread = why, unread


class Engine:
    """A pool, and the other end of its connections."""

    def __init__(self) -> None:
        self._listening = socket.socket()
        self._listening.bind(("127.0.0.1", 0))
        self._listening.listen()
        self._listening.setblocking(False)
        host, port = self._listening.getsockname()
        self.pool = ConnectionPool(f"http://{host}:{port}", 5.0)
        self.ends: list[socket.socket] = []

    async def connect(self) -> tuple[EngineConnection, socket.socket]:
        connection = await self.pool.connect()
        end, _ = await asyncio.get_running_loop().sock_accept(self._listening)
        end.setblocking(False)
        self.ends.append(end)
        return connection, end

    async def ask(self, connection: EngineConnection, end: socket.socket, answer: bytes = ANSWER) -> Heard:
        """A request, read by the engine, and its answer."""
        heard = Heard()
        connection.send(heard, REQUEST)
        loop = asyncio.get_running_loop()
        assert await loop.sock_recv(end, 1000) == REQUEST
        await loop.sock_sendall(end, answer)
        await eventually(lambda: heard.end)
        return heard

    async def kept(self) -> tuple[EngineConnection, socket.socket]:
        """A connection that was kept after an answer, and is taken again."""
        connection, end = await self.connect()
        await self.ask(connection, end)
        assert self.pool.kept() is connection
        return connection, end

    def close(self) -> None:
        self.pool.close()
        for end in (*self.ends, self._listening):
            end.close()


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    running = Engine()
    yield running
    running.close()


async def test_a_connection_is_kept_and_used_again(engine: Engine) -> None:
    connection, end = await engine.connect()
    for _ in range(3):
        heard = await engine.ask(connection, end)
        assert (heard.status, heard.body, heard.end) == (200, b"hi", "ended")
        assert engine.pool.kept() is connection
        assert engine.pool.kept() is None


@pytest.mark.parametrize(
    "framed",
    [b"content-length: 5\r\n\r\nhello", b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"],
)
async def test_a_connection_that_was_held_back_is_read_again_before_it_is_kept(
    engine: Engine, framed: bytes
) -> None:
    """A slow client's last part pauses the connection; the next request on it is another client's."""
    connection, end = await engine.connect()
    heard = Heard()
    heard.pauses = connection
    connection.send(heard, REQUEST)
    loop = asyncio.get_running_loop()
    await loop.sock_recv(end, 1000)
    head, line_ends, body = framed.partition(b"\r\n\r\n")
    await loop.sock_sendall(end, b"HTTP/1.1 200 OK\r\n" + head + line_ends)
    await eventually(lambda: heard.status)
    await loop.sock_sendall(end, body)
    await eventually(lambda: heard.end)
    assert heard.body == b"hello"
    connection.pause()  # it is not the slow client's any more
    assert engine.pool.kept() is connection
    assert connection.flow.held == 0
    assert (await engine.ask(connection, end)).body == b"hi"


async def test_an_engine_that_answers_before_it_has_read_the_request(engine: Engine) -> None:
    connection, end = await engine.connect()
    heard = Heard()
    connection.send(heard, b"x" * (32 << 20))
    assert connection.write_paused
    await asyncio.get_running_loop().sock_sendall(end, ANSWER)
    await eventually(lambda: heard.end)
    assert heard.body == b"hi"
    assert engine.pool.kept() is None, "the rest of the request would be sent before the next one"


async def test_a_large_request_is_sent_in_pieces_as_they_are_taken(engine: Engine) -> None:
    connection, end = await engine.connect()
    heard, parts = Heard(), (b"head", memoryview(b"x" * (8 << 20)), b"tail")
    connection.send(heard, parts)
    await eventually(lambda: connection.write_paused)
    assert connection.transport.get_write_buffer_size() <= 2 * engines.PIECE_BYTES, "the rest waits with us"
    got = bytearray()
    while len(got) < sum(map(len, parts)):
        got += await asyncio.get_running_loop().sock_recv(end, 1 << 20)
    assert bytes(got) == b"".join(parts)
    await asyncio.get_running_loop().sock_sendall(end, ANSWER)
    await eventually(lambda: heard.end)
    assert engine.pool.kept() is connection


async def test_what_is_left_of_a_large_request_is_not_sent_after_its_answer(engine: Engine) -> None:
    connection, end = await engine.connect()
    heard = Heard()
    connection.send(heard, (b"head", b"x" * (32 << 20)))
    await eventually(lambda: connection.write_paused)
    await asyncio.get_running_loop().sock_sendall(end, ANSWER)
    await eventually(lambda: heard.end)
    assert heard.body == b"hi"
    assert engine.pool.kept() is None
    assert connection._unsent is None
    assert connection.state is EngineState.CLOSED


async def test_a_connection_that_was_closed_meanwhile_is_not_used(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "RECENT_S", 0.0)
    connection, end = await engine.kept()
    connection.pool.keep(connection)
    end.close()
    assert engine.pool.kept() is None, "although the loop has not seen it yet"
    assert not engine.pool.idle


async def test_bytes_that_nobody_asked_for_end_a_kept_connection(engine: Engine) -> None:
    connection, end = await engine.kept()
    connection.pool.keep(connection)
    end.send(ANSWER)
    await eventually(lambda: not engine.pool.idle)
    assert connection.state is EngineState.CLOSED


async def test_what_follows_an_answer_is_not_taken_for_the_next_one(engine: Engine) -> None:
    for answer in (ANSWER + b"x", b"HTTP/1.1 204 No Content\r\n\r\nx", ANSWER.replace(b"1.1", b"1.0")):
        connection, end = await engine.connect()
        heard = await engine.ask(connection, end, answer)
        assert heard.end == "ended"
        assert engine.pool.kept() is None


async def test_a_request_that_was_never_read(engine: Engine) -> None:
    """Only then may it be sent again."""
    loop = asyncio.get_running_loop()

    async def lost(connection: EngineConnection, end: socket.socket, *, reads: bool, first: bool) -> bool:
        heard = Heard()
        if first:
            end.close()
        connection.send(heard, REQUEST)
        if reads:
            await loop.sock_recv(end, 1000)
        elif not first:
            await eventually(lambda: connection.flow.acknowledged() == connection._sent)
        end.close()
        await eventually(lambda: heard.end)
        return heard.unread

    assert await lost(*await engine.kept(), reads=False, first=True), "it was closed before the request"
    assert not await lost(*await engine.kept(), reads=True, first=False), "it may have done the work"
    assert not await lost(*await engine.kept(), reads=False, first=False), "a proxy may have passed it on"
    assert not await lost(*await engine.connect(), reads=True, first=False), "a new connection"


async def test_a_reset_at_once_proves_nothing_where_bytes_were_acknowledged(engine: Engine) -> None:
    """What stands between the gateway and an engine can read all of a request, pass it on and be reset."""
    connection, end = await engine.kept()
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    heard = Heard()
    connection.send(heard, REQUEST)
    assert await asyncio.get_running_loop().sock_recv(end, 1000) == REQUEST
    end.close()
    await eventually(lambda: heard.end)
    assert not heard.unread


async def test_a_request_on_a_connection_that_is_closed_is_lost_and_not_forgotten(engine: Engine) -> None:
    connection, end = await engine.connect()
    end.close()
    await eventually(lambda: connection.state is EngineState.CLOSED)
    heard = Heard()
    connection.send(heard, REQUEST)
    assert not heard.end, "not within the call"
    await eventually(lambda: heard.end)
    assert heard.unread


async def test_two_requests_at_once_are_a_defect(engine: Engine) -> None:
    connection, _ = await engine.connect()
    connection.send(Heard(), REQUEST)
    with pytest.raises(OutOfOrderError):
        connection.send(Heard(), REQUEST)


async def test_idle_connections_are_discarded(engine: Engine) -> None:
    connections = [await engine.connect() for _ in range(3)]
    for connection, end in connections:
        await engine.ask(connection, end)
    assert len(engine.pool.idle) == 3
    engine.pool.discard_idle()
    assert not engine.pool.idle
    assert engine.pool.kept() is None
    connection, end = await engine.connect()
    engine.pool.close()
    assert (await engine.ask(connection, end)).body == b"hi", "what is under way is finished"
    assert connection.state is EngineState.CLOSED, "and then closed"


ANSWERS = [
    (b"HTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n" + ANSWER, b"hi", True),
    (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 9\r\n\r\n", b"", True),
    (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nx: y\r\n\r\n", b"hi", True),
    (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2;a=\t\r\nhi\r\n0\r\n\r\n", b"hi", True),
    (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\nx", b"hi", False),
    (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nhi", b"hi", False),
    (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", b"", True),
]


@pytest.mark.parametrize(("answer", "body", "kept"), ANSWERS)
@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_an_answer_in_pieces(engine: Engine, answer: bytes, body: bytes, kept: bool, size: int) -> None:
    connection, end = await engine.connect()
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    heard = Heard()
    connection.send(heard, REQUEST)
    for at in range(0, len(answer), size):
        await asyncio.get_running_loop().sock_sendall(end, answer[at : at + size])
        await asyncio.sleep(0)
    await eventually(lambda: heard.end)
    assert (heard.end, heard.body) == ("ended", body)
    await eventually(lambda: connection.state is (EngineState.FREE if kept else EngineState.CLOSED))


BROKEN = [
    b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n folded: 1\r\n\r\nhi",
    b"HTTP/1.1 200 OK\r\ncontent-length : 2\r\n\r\nhi",
    b"HTTP/1.1 2000 OK\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n" + b"x: y\r\n" * 2000,
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n" + b"x: y\r\n" * 2000 + b"\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2;a\rb\r\nhi\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nx: y\n\n" + ANSWER,
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nx: y\0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000,
]


@pytest.mark.parametrize("answer", BROKEN)
async def test_a_broken_answer_is_lost(engine: Engine, answer: bytes) -> None:
    connection, end = await engine.connect()
    heard = await engine.ask(connection, end, answer)
    assert heard.end.startswith("it sent what is no HTTP answer")
    assert not heard.unread
    assert connection.state is EngineState.CLOSED


async def test_an_answer_until_the_end_of_the_connection(engine: Engine) -> None:
    for whole in (True, False):
        connection, end = await engine.connect()
        heard = Heard()
        connection.send(heard, REQUEST)
        await asyncio.get_running_loop().sock_sendall(end, b"HTTP/1.1 200 OK\r\n\r\nhello")
        await eventually(lambda h=heard: h.body)
        if whole:
            await asyncio.get_running_loop().sock_recv(end, 1000)
        end.close()  # with bytes unread, the system resets the connection
        await eventually(lambda h=heard: h.end)
        assert heard.body == b"hello"
        assert (heard.end == "ended") is whole


async def test_a_handlers_own_error_is_not_taken_for_the_engines(engine: Engine) -> None:
    class Fails(Heard):
        def whole(self, head: AnswerHead, body: bytes) -> None:
            raise ValueError("of the handler's own")

    connection, _ = await engine.connect()
    fails = Fails()
    connection.send(fails, REQUEST)
    with pytest.raises(ValueError, match="own"):
        connection.data_received(ANSWER)
    assert not fails.end


def test_a_header_that_comes_twice_can_be_asked_for() -> None:
    head = AnswerHead(429, b"HTTP/1.1 429 Too Many\r\nRetry-After: 37\r\nretry-after: 5\r\nX: Y", 0, True)
    assert (head.get("retry-after"), head.get("x"), head.get("z")) == ("37", "Y", None)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32))
def test_any_engine(seed: int) -> None:
    """Cuts, pauses, ends and spoiled answers at random: each request is told once, and the truth."""
    _, problems = uvloop.run(engine_scenario(Random(seed)))
    assert not problems


def test_a_short_fuzz() -> None:
    for part in ("heads", "bodies", "engines", "clients"):
        tried, problems = uvloop.run(fuzz(part, seed=1, inputs=400))
        assert tried >= 400
        assert not problems
