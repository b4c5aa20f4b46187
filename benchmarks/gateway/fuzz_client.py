"""One client's connection under random requests, cuts, pauses and ends, over a real pair of sockets, and a
checker that knows what every answer must be.
"""

from __future__ import annotations

import asyncio
import socket
from binascii import crc32
from dataclasses import dataclass
from random import Random
from typing import cast

from gateway.errors import GatewayError, UnauthenticatedError
from gateway.wire.client import STATUS_LINES, Call, ClientConnection
from gateway.wire.flow import Admission, Intake
from gateway.wire.heads import RequestHead
from gateway.wire.requests import Received
from gateway.wire.states import ClientState

HIGH_WATER_BYTES = 64 << 10
LARGEST_ANSWER_BYTES = 120_000
PATIENCE_S = 20.0
_KINDS = ("sync", "sync", "later", "later", "stream", "stream", "refused", "abort")
_END = b"\r\n\r\n"


@dataclass
class Limits:
    max_connections: int = 1000
    max_buffered_bytes: int = 64 << 20
    max_buffered_bytes_per_tenant: int = 32 << 20
    min_body_bytes_per_s: int = 0


@dataclass
class Request:
    """One request, and what its answer must be."""

    number: int
    raw: bytes
    method: str = "POST"
    answer: bytes = b""
    kind: str = "garbage"
    """What becomes of it; garbage and refused are not served."""
    last: bool = False
    """The connection must end after its answer."""
    expects: bool = False


class ScriptedCall:
    """Answers some turns of the loop later, in one or in many parts."""

    def __init__(self, handler: ScriptedHandler, client: ClientConnection, request: Request) -> None:
        self._handler = handler
        self._client = client
        self._request = request
        self._going = asyncio.Event()
        self._going.set()
        self.task = asyncio.get_running_loop().create_task(self._run())

    def abandon(self) -> None:
        self.task.cancel()

    def pause(self) -> None:
        self._going.clear()

    def resume(self) -> None:
        self._going.set()

    async def _run(self) -> None:
        rng, request, client = self._handler.rng, self._request, self._client
        for _ in range(rng.randint(0, 3)):
            await asyncio.sleep(0)
        head = answer_head(request)
        if request.kind == "later":
            client.send_whole(head, request.answer)
            return
        cut = rng.randint(0, 20)
        client.begin(head, request.answer[:cut])
        rest = request.answer[cut:]
        while rest:
            await self._going.wait()
            size = rng.randint(1, 30_000)
            client.send(rest[:size])
            rest = rest[size:]
            await asyncio.sleep(0)
            if request.kind == "abort" and rng.random() < 0.5:
                client.abort()
                return
        client.end()


class ScriptedHandler:
    """Stands where the data plane does, and does what each request says."""

    header_timeout_s = body_timeout_s = keep_alive_s = 1e6

    def __init__(self, rng: Random, requests: list[Request], limits: Limits | None = None) -> None:
        self.rng = rng
        self.requests = {request.number: request for request in requests}
        self.clients: set[ClientConnection] = set()
        self.stopping = False
        self.intake = Intake(lambda: limits or Limits())
        self.admitted: list[int] = []
        self.served: list[int] = []
        self.problems: list[str] = []

    def admit(self, head: RequestHead) -> Admission:
        self.admitted.append(int(head.headers["x-n"]))
        if head.path == "/refused":
            raise UnauthenticatedError("no")
        return Admission("tenant", 1 << 20)

    def serve(self, client: ClientConnection, head: RequestHead, body: Received) -> Call | None:
        assert isinstance(body, bytes)  # no request here is so large
        request = self.requests[int(head.headers["x-n"])]
        self.served.append(request.number)
        if marked(request.number, body) != request.answer[: request.answer.index(b";") + 1]:
            self.problems.append(f"request {request.number} has another body than was sent")
        if client.transport.get_write_buffer_size() > HIGH_WATER_BYTES:
            self.problems.append("a request was served although answers are not taken")
        if request.kind == "sync":
            client.send_whole(answer_head(request), request.answer)
            return None
        return ScriptedCall(self, client, request)

    def refuse(self, client: ClientConnection, error: GatewayError, head: RequestHead | None) -> None:
        number = b"" if head is None else b"x-n: %b\r\n" % head.headers.get("x-n", "").encode()
        client.send_whole(STATUS_LINES[error.status] + number, error.message.encode())


def answer_head(request: Request) -> bytes:
    return STATUS_LINES[200] + b"x-n: %d\r\n" % request.number


def marked(number: int, body: bytes) -> bytes:
    return b"%d:%d:%08x;" % (number, len(body), crc32(body))


def random_request(rng: Random, number: int) -> Request:
    if rng.random() < 0.03:
        noise = bytes([rng.randint(1, 8)]) + rng.randbytes(rng.randint(0, 40)) + _END
        return Request(number, noise, last=True)
    method = rng.choice(("POST", "POST", "POST", "GET", "HEAD"))
    kind = rng.choice(_KINDS if method != "HEAD" else _KINDS[:-1])
    old = rng.random() < 0.05
    size = 0 if method != "POST" else rng.choice((0, 1, 30, 3_000, 40_000, 200_000))
    body = rng.randbytes(size)
    request = Request(number, b"", method, kind=kind)
    request.answer = marked(number, body) + b"." * rng.choice((0, 0, 100, 5_000, LARGEST_ANSWER_BYTES))
    lines = [f"{method} /{kind} HTTP/1.{0 if old else 1}", "host: a", f"x-n: {number}"]
    if rng.random() < 0.05 or (old and rng.random() < 0.5):
        lines.append(rng.choice(("connection: close", "connection: keep-alive")))
    request.last = "connection: close" in lines or (old and "connection: keep-alive" not in lines)
    request.last |= old and kind in ("stream", "abort")
    if size and rng.random() < 0.1:
        lines.append("expect: 100-continue")
        request.expects = not old
    if not old and (size and rng.random() < 0.3):
        lines.append("transfer-encoding: chunked")
        sent = in_chunks(rng, body)
        if rng.random() < 0.05:
            sent, request.kind, request.last = b"zz\r\n" + sent, "garbage", True
    else:
        lines.append(f"content-length: {size}")
        sent = body
    request.raw = b"\r\n" * (rng.random() < 0.05) + "\r\n".join(lines).encode() + _END + sent
    return request


def in_chunks(rng: Random, body: bytes) -> bytes:
    parts = []
    while body:
        size = rng.choice((1, 7, 500, 5_000, 100_000))
        parts.append(b"%x%b\r\n%b\r\n" % (len(body[:size]), rng.choice((b"", b";a=b")), body[:size]))
        body = body[size:]
    return b"".join(parts) + b"0\r\n" + rng.choice((b"", b"x: y\r\n")) + b"\r\n"


class Peer(asyncio.Protocol):
    """The client: what it gets, read as answers."""

    transport: asyncio.Transport

    def __init__(self, requests: list[Request]) -> None:
        self.waiting = list(requests)
        self.problems: list[str] = []
        self.ended = asyncio.Event()
        """All that can come has come: the last answer, or the end of the connection."""
        self.closes = False
        self._data = b""
        self._until_close: Request | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._data += data
        while self._data and not self._until_close and self._read_answer():
            pass
        if not self.waiting and not self._until_close:
            self.ended.set()

    def connection_lost(self, exc: Exception | None) -> None:
        if (request := self._until_close) is not None:
            whole = self._data == (b"" if request.method == "HEAD" else request.answer)
            if not whole and request.kind != "abort" and exc is None:
                self.problems.append(f"answer {request.number} until the end is not whole")
            self.waiting.pop(0)
            self.closes = True
        self.ended.set()

    def _read_answer(self) -> bool:
        """Whether a whole one was there."""
        end = self._data.find(_END)
        if end < 0:
            return False
        lines = self._data[:end].decode().split("\r\n")
        if not self.waiting or self.closes:
            self.problems.append(f"an answer to no request: {lines[0]}")
            self._data = b""
            return False
        request, status = self.waiting[0], int(lines[0].split()[1])
        if status == 100:
            if not request.expects:
                self.problems.append("100 Continue that nobody waits for")
            request.expects = False
            self._data = self._data[end + 4 :]
            return True
        headers = dict(line.split(": ", 1) for line in lines[1:])
        body = self._body(request, headers, end + 4)
        if body is None:
            return False
        self._check(request, status, headers, body)
        return True

    def _body(self, request: Request, headers: dict[str, str], at: int) -> bytes | None:
        """The body, which is then read; None if it is not whole."""
        data = self._data
        if request.method == "HEAD" and request.kind != "garbage":
            self._data = data[at:]
            return b""
        if "content-length" in headers:
            end = at + int(headers["content-length"])
            if len(data) < end:
                return None
            self._data = data[end:]
            return data[at:end]
        if headers.get("transfer-encoding") != "chunked":
            self._until_close, self._data = request, data[at:]
            return None
        parts = []
        while (line_end := data.find(b"\r\n", at)) >= 0:
            size = int(data[at:line_end], 16)
            parts.append(data[line_end + 2 : line_end + 2 + size])
            at = line_end + 4 + size
            if len(data) < at:
                return None
            if not size:
                self._data = data[at:]
                return b"".join(parts)
        return None

    def _check(self, request: Request, status: int, headers: dict[str, str], body: bytes) -> None:
        self.waiting.pop(0)
        self.closes = headers.get("connection") == "close"
        number, kind = headers.get("x-n"), request.kind
        if kind == "garbage":
            right = status >= 400 and self.closes
        elif kind == "refused":
            right = status == 401 and number == str(request.number)
        else:
            right = status == 200 and number == str(request.number)
            right &= body == (b"" if request.method == "HEAD" else request.answer)
        if not right or (request.last and not self.closes):
            self.problems.append(f"{status} {headers} {body[:30]!r} answers {kind} {request.number}")


async def client_scenario(rng: Random) -> tuple[int, list[str]]:
    """How many requests were tried, and what went wrong."""
    requests = [random_request(rng, number) for number in range(rng.randint(1, 12))]
    handler = ScriptedHandler(rng, requests)
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    connection = ClientConnection(handler)
    await loop.connect_accepted_socket(lambda: connection, ours)
    _, peer = await loop.create_connection(lambda: Peer(requests), sock=theirs)
    leaves = rng.random() < 0.25
    await _talk(rng, peer, b"".join(request.raw for request in requests), connection, leaves)
    problems = peer.problems + handler.problems
    try:
        async with asyncio.timeout(PATIENCE_S):
            if not leaves:
                await peer.ended.wait()
                problems += _check_end(connection, peer)
            (peer.transport.abort if leaves else peer.transport.close)()
            while handler.clients:
                await asyncio.sleep(0)
                for client in tuple(handler.clients):  # one that drains waits for its time
                    if client.state is ClientState.DRAINING:
                        client.abort()
    except TimeoutError:
        problems.append(f"hangs in {connection.state.name}, held {connection.flow.held}")
        peer.transport.abort()
        connection.abort()
    if handler.intake.buffered or handler.intake.connections or handler.intake.by_tenant:
        problems.append(f"room is still taken: {vars(handler.intake)}")
    if handler.served != sorted(set(handler.served)):
        problems.append(f"served {handler.served}")
    if len(set(handler.admitted)) != len(handler.admitted):
        problems.append(f"admitted {handler.admitted}")
    return len(requests), problems


async def _talk(rng: Random, peer: Peer, sent: bytes, connection: ClientConnection, leaves: bool) -> None:
    """Send in pieces, read or do not, and perhaps leave in between."""
    if leaves:
        sent = sent[: rng.randint(0, len(sent))]
    reads = True
    while sent and not peer.transport.is_closing():
        size = rng.choice((1, 3, 50, 1_000, 20_000, 1 << 20))
        peer.transport.write(sent[:size])
        sent = sent[size:]
        for _ in range(rng.randint(0, 2)):
            await asyncio.sleep(0)
        if rng.random() < 0.1:
            reads = not reads
            (peer.transport.resume_reading if reads else peer.transport.pause_reading)()
        unsent = connection.transport.get_write_buffer_size()
        if unsent > LARGEST_ANSWER_BYTES + 2 * HIGH_WATER_BYTES:
            peer.problems.append(f"{unsent} bytes wait in the write buffer")
    if leaves and not peer.transport.is_closing():
        rng.choice((peer.transport.abort, peer.transport.close, peer.transport.write_eof))()
    if not reads and not peer.transport.is_closing():
        peer.transport.resume_reading()


def _check_end(connection: ClientConnection, peer: Peer) -> list[str]:
    """All answers have come, or the connection has ended."""
    if peer.transport.is_closing():
        aborted = any(request.kind == "abort" for request in peer.waiting)  # with what waited to be sent
        if peer.waiting and not peer.closes and not aborted:
            return [f"{len(peer.waiting)} answers were lost"]
        return []
    if connection.state is ClientState.IDLE and connection.flow.held:
        return [f"it is not read any more: {connection.flow.held}"]
    return []
