"""Connections to an engine under random answers, cuts, pauses and ends, over real TCP, and a checker that
knows what every request must be told.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from random import Random
from typing import cast

from gateway.wire.engine import RECENT_S, ConnectionPool, EngineConnection
from gateway.wire.heads import AnswerHead
from gateway.wire.states import EngineState

PATIENCE_S = 20.0
_ENDINGS = (
    "kept",
    "kept",
    "kept",
    "kept",
    "close",
    "until close",
    "extra",
    "short",
    "garbage",
    "silent",
    "late",
)
_END = b"\r\n\r\n"


@dataclass
class Answer:
    """What the engine says to one request."""

    number: int
    body: bytes
    raw: bytes
    ending: str
    """kept, or how it is spoiled: close (announced), until close (no length), extra (bytes after it), short
    (it breaks off), garbage, silent (no byte, closed), late (closed when the connection is idle again)."""

    @property
    def whole(self) -> bool:
        return self.ending in ("kept", "close", "until close", "extra", "late")


def random_answer(rng: Random, number: int) -> Answer:
    body = b"%d;" % number + rng.randbytes(rng.choice((0, 10, 3_000, 70_000)))
    ending = rng.choice(_ENDINGS)
    lines = ["HTTP/1.1 200 OK", f"x-n: {number}"]
    sent = body
    if ending == "until close":
        pass
    elif rng.random() < 0.5 and ending != "short":
        lines.append("transfer-encoding: chunked")
        sent = _in_chunks(rng, body)
    else:
        lines.append(f"content-length: {len(body)}")
    if ending == "close":
        lines.append("connection: close")
    raw = "\r\n".join(lines).encode() + _END + sent
    if rng.random() < 0.1:
        raw = b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + raw
    if ending == "short":
        raw = raw[: rng.randint(1, len(raw) - 1)]
    elif ending == "extra":
        raw += rng.choice((b"x", b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nbad"))
    elif ending == "garbage":
        raw = b"\x00" + rng.randbytes(rng.randint(0, 50)) + _END
    elif ending == "silent":
        raw = b""
    return Answer(number, body, raw, ending)


def _in_chunks(rng: Random, body: bytes) -> bytes:
    parts = []
    while body:
        size = rng.choice((1_000, 5_000, 60_000))
        parts.append(b"%x\r\n%b\r\n" % (len(body[:size]), body[:size]))
        body = body[size:]
    return b"".join(parts) + b"0\r\n" + rng.choice((b"", b"x: y\r\na: b\r\n")) + b"\r\n"


class Engine(asyncio.Protocol):
    """One connection, on the engine's side."""

    transport: asyncio.Transport

    def __init__(self, rng: Random, answers: dict[int, Answer], tasks: set[asyncio.Task[None]]) -> None:
        self._rng = rng
        self._answers = answers
        self._tasks = tasks
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._data += data
        if self._data.endswith(b"!"):
            number = int(self._data[self._data.index(b"#") + 1 : -1])
            self._data = b""
            task = asyncio.get_running_loop().create_task(self._answer(self._answers[number]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, answer: Answer) -> None:
        rng, sent = self._rng, answer.raw
        while sent and not self.transport.is_closing():
            size = rng.choice((1, 20, 1_000, 20_000, 1 << 20))
            if len(sent) - size < 100:
                size = len(sent)  # bytes after an answer come with it, lest they be the next one's beginning
            self.transport.write(sent[:size])
            sent = sent[size:]
            for _ in range(rng.randint(0, 2)):
                await asyncio.sleep(0)
        if answer.ending == "late":
            for _ in range(rng.randint(0, 5)):
                await asyncio.sleep(0)
        if answer.ending not in ("kept", "extra", "garbage"):
            self.transport.close()


@dataclass
class Waiter:
    """Who sends one request, and what it is told."""

    number: int
    told: list[str] = field(default_factory=list)
    body: bytes = b""
    unread: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def whole(self, head: AnswerHead, body: bytes) -> None:
        self.began(head)
        self.arrived(body)
        self.ended()

    def began(self, head: AnswerHead) -> None:
        self.told.append(f"began {head.get('x-n')}")

    def arrived(self, payload: bytes) -> None:
        self.body += payload

    def ended(self) -> None:
        self.told.append("ended")
        self.over.set()

    def lost(self, why: str, *, unread: bool) -> None:
        self.told.append("lost")
        self.unread = unread
        self.over.set()

    def judge(self, answer: Answer, *, read: bool, doomed: bool) -> list[str]:
        """What it was told that is not true. ``read``: the engine has read the request. ``doomed``: it was
        about to close this connection."""
        if self.told and self.told[-1] == "ended":
            right = answer.whole and self.told == [f"began {self.number}", "ended"]
            cut = doomed and answer.ending == "until close"  # which nobody can tell from the end
            right &= answer.body.startswith(self.body) if cut else self.body == answer.body
        else:
            right = self.told[-1:] == ["lost"] and self.told.count("lost") == 1 and "ended" not in self.told
            right &= not answer.whole or not read or doomed
        problems = [] if right else [f"{answer.ending} {answer.number} was told {self.told}"]
        if self.unread and read:
            problems.append(f"{answer.ending} {answer.number} is called unread and was read")
        return problems


async def engine_scenario(rng: Random) -> tuple[int, list[str]]:
    """How many requests were tried, and what went wrong."""
    answers = {number: random_answer(rng, number) for number in range(rng.randint(1, 12))}
    tasks: set[asyncio.Task[None]] = set()
    read: set[int] = set()

    class Reading(dict[int, Answer]):
        def __getitem__(self, number: int) -> Answer:
            read.add(number)
            return answers[number]

    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Engine(rng, Reading(), tasks), "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    pool = ConnectionPool(f"http://{host}:{port}", 5.0)
    problems: list[str] = []
    doomed: set[EngineConnection] = set()
    try:
        async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
            for lane in range(rng.randint(1, 3)):
                numbers = [number for number in answers if number % 3 == lane]
                group.create_task(_lane(rng, pool, numbers, answers, read, doomed, problems))
    except TimeoutError:
        problems.append("hangs")
    for connection in pool.idle:
        if connection.state is not EngineState.FREE or connection.flow.held:
            problems.append(f"kept in {connection.state.name}, held {connection.flow.held}")
    pool.close()
    server.close()
    for task in tuple(tasks):
        task.cancel()
    await asyncio.sleep(0)
    return len(answers), problems


async def _lane(
    rng: Random,
    pool: ConnectionPool,
    numbers: list[int],
    answers: dict[int, Answer],
    read: set[int],
    doomed: set[EngineConnection],
    problems: list[str],
) -> None:
    """Requests one after the other."""
    for number in numbers:
        if rng.random() < 0.05:
            await asyncio.sleep(RECENT_S * 1.5)
        connection = pool.kept() or await pool.connect()
        waiter, before = Waiter(number), connection in doomed
        if answers[number].ending == "late":
            doomed.add(connection)
        connection.send(
            waiter, b"POST / HTTP/1.1\r\n" + json.dumps({"n": number}).encode() + b"#%d!" % number
        )
        if rng.random() < 0.1:
            await _leave(rng, connection, waiter)
            if len(waiter.told) > 1 and waiter.told[-1] not in ("ended", "lost"):
                problems.append(f"{number} was told {waiter.told} after it left")
            continue
        while not waiter.over.is_set():
            if rng.random() < 0.2:
                connection.pause()
                await asyncio.sleep(0)
                connection.resume()
            await asyncio.sleep(0)
        if rng.random() < 0.2:
            connection.pause()  # it is not its own any more: without effect
        problems += waiter.judge(answers[number], read=number in read, doomed=before)


async def _leave(rng: Random, connection: EngineConnection, waiter: Waiter) -> None:
    for _ in range(rng.randint(0, 6)):
        await asyncio.sleep(0)
    if not waiter.over.is_set():
        connection.close()
        told = list(waiter.told)
        await asyncio.sleep(0)
        if waiter.told != told:
            waiter.told.append("told after it left")
