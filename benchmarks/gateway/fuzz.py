"""The gateway's HTTP under random input: heads, chunked bodies, clients' connections, engines' connections.

    python -m benchmarks.gateway.fuzz                     # a million inputs, some minutes
    python -m benchmarks.gateway.fuzz --inputs 20000 --seed 7 --only clients

An input is a head, a body, or a message on a connection. Everything is made from the seed; a problem is
reported with the seed of its step, which ``--seed S --steps 1`` makes again. Problems are exceptions that no
caller expects, hangs, answers that are lost, doubled or another's, room that is not given back, connections
that are kept and not clean. Ends with status 1 if there was any.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import time
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import h11
import uvloop

from benchmarks.gateway.fuzz_client import client_scenario, in_chunks
from benchmarks.gateway.fuzz_engine import engine_scenario
from gateway.errors import MalformedRequestError
from gateway.telemetry.logs import EVENTS
from gateway.wire.bodies import ChunkedBody
from gateway.wire.heads import CHUNKED, UNTIL_CLOSE, parse_answer, parse_request

Step = Callable[[Random], Awaitable[tuple[int, list[str]]]]
MOST_REPORTED = 20
_BATCH = 200
_REQUESTS = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 12",
    b"GET http://a:80/v1/models?x=y HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, close\r\nX-A: b\r\nx-a: c",
    b"POST / HTTP/1.0\r\ntransfer-encoding: chunked\r\nexpect: 100-continue",
)
_ANSWERS = (
    b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-length: 12\r\ncontent-type: application/json",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nconnection: close",
    b"HTTP/1.0 404 Not Found\r\nx: y",
)
_PIECES = (b"\r\n", b"\n", b"\r", b" ", b"\t", b":", b",", b"\x00", b"\xff", b"0", b"9", b"chunked", b"close")


def mutated(rng: Random, raw: bytes) -> bytes:
    changed = bytearray(raw)
    for _ in range(rng.randint(0, 4)):
        at = rng.randrange(len(changed) + 1)
        changed[at : at + rng.randint(0, 3)] = rng.choice(_PIECES) * rng.randint(0, 2)
    if rng.random() < 0.1:
        lines = bytes(changed).split(b"\r\n")
        lines.insert(rng.randint(1, len(lines)), rng.choice(lines))
        return b"\r\n".join(lines)
    return bytes(changed)


def as_h11_reads(raw: bytes) -> tuple[str, int] | None:
    """Method and length of the body, as another server behind the same proxy might read them; None where it
    refuses."""
    try:
        reader = h11.Connection(h11.SERVER)
        reader.receive_data(raw + b"\r\n\r\n")
        found = reader.next_event()
    except h11.RemoteProtocolError:
        return None
    if not isinstance(found, h11.Request):
        return None
    headers = dict(found.headers)
    length = CHUNKED if b"transfer-encoding" in headers else int(headers.get(b"content-length", b"0"))
    return found.method.decode(), length


async def heads(rng: Random) -> tuple[int, list[str]]:
    problems = []
    for _ in range(_BATCH):
        raw = mutated(rng, rng.choice(_REQUESTS))
        try:
            request = parse_request(raw)
        except MalformedRequestError:
            pass
        else:
            other = as_h11_reads(raw)
            if other is not None and other != (request.method, request.length):
                problems.append(f"{raw!r} was read as {request}, and by h11 as {other}")
        raw = mutated(rng, rng.choice(_ANSWERS))
        try:
            answer = parse_answer(raw)
        except ValueError:
            continue
        if answer.length < UNTIL_CLOSE or not 100 <= answer.status <= 999:
            problems.append(f"{raw!r} was read as {answer}")
    return 2 * _BATCH, problems


async def bodies(rng: Random) -> tuple[int, list[str]]:
    problems = []
    for _ in range(_BATCH):
        payload = rng.randbytes(rng.choice((0, 1, 20, 300)))
        raw, rest = in_chunks(rng, payload), rng.randbytes(rng.randint(0, 9))
        spoiled = rng.random() < 0.5
        sent, body, got = mutated(rng, raw) if spoiled else raw + rest, ChunkedBody(), b""
        try:
            while sent and not body.done:
                size = rng.choice((1, 2, 10, 1000))
                got += body.feed(sent[:size])
                sent = sent[size:]
        except ValueError as error:
            if not spoiled:
                problems.append(f"{raw!r} was refused: {error}")
            continue
        if not spoiled and (not body.done or got != payload or body.rest + sent != rest):
            problems.append(f"{raw!r} was read as {got!r}")
    return _BATCH, problems


async def engines(rng: Random) -> tuple[int, list[str]]:
    return await engine_scenario(rng)


async def clients(rng: Random) -> tuple[int, list[str]]:
    return await client_scenario(rng)


PARTS: dict[str, tuple[Step, float]] = {
    "heads": (heads, 0.4),
    "bodies": (bodies, 0.3),
    "clients": (clients, 0.27),
    "engines": (engines, 0.03),
}
"""What is tried, and its share of the inputs."""


class Reports(logging.Handler):
    """Collects what the gateway and the loop would log as a traceback."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(f"{record.getMessage()}: {record.exc_info and record.exc_info[1]!r}")

    def on_loop(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.found.append(f"{context.get('message')}: {context.get('exception')!r}")

    def take(self) -> list[str]:
        found, self.found = self.found, []
        return found


async def fuzz(part: str, seed: int, inputs: int, steps: int | None = None) -> tuple[int, list[str]]:
    """Steps of one part until so many inputs, or for so many steps. Gives the inputs tried, and problems."""
    step, _ = PARTS[part]
    reports, loop = Reports(), asyncio.get_running_loop()
    loop.set_exception_handler(reports.on_loop)
    for name in (EVENTS, "asyncio"):
        logging.getLogger(name).addHandler(reports)
    tried, problems = 0, []
    try:
        while tried < inputs and steps != 0:
            try:
                count, found = await step(Random(seed))
            except Exception as error:
                count, found = 1, [repr(error)]
            found += reports.take()
            problems += [f"{part} --seed {seed}: {problem[:500]}" for problem in found]
            tried += count
            seed += 1
            steps = None if steps is None else steps - 1
            if len(problems) >= MOST_REPORTED:
                break
    finally:
        loop.set_exception_handler(None)
        for name in (EVENTS, "asyncio"):
            logging.getLogger(name).removeHandler(reports)
    return tried, problems


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, help="of each part at most")
    parser.add_argument("--only", choices=PARTS, help="one part alone gets all inputs")
    options = parser.parse_args()
    failed = False
    for part, (_, share) in PARTS.items():
        if options.only not in (None, part):
            continue
        wanted = options.inputs if options.only else int(options.inputs * share)
        began = time.perf_counter()
        tried, problems = uvloop.run(fuzz(part, options.seed, wanted, options.steps))
        print(
            f"{part}: {tried} inputs, {time.perf_counter() - began:.1f} s, {len(problems)} problems",
            flush=True,
        )
        for problem in problems:
            print(f"  {problem}")
        failed |= bool(problems)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
