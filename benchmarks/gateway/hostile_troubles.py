"""The troubles of ``benchmarks.gateway.hostile``: what clients do that mean no good."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gateway.load import request

LARGE = 8_000_000
SLOW_CLIENTS = 1000


@dataclass
class Setting:
    """What runs: a gateway, an engine for the client that is measured, and one for those that are not."""

    port: int
    tls: bool = False
    mine: str = ""
    other: str = ""
    """Sessions at the engine of the client that is measured, and at the other one."""
    counted: int = 0
    """How often the trouble did what it does."""
    other_statuses: Counter[int] = field(default_factory=Counter)
    """Of its requests that were not answered with 200."""

    def connect(self) -> Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        return asyncio.open_connection("127.0.0.1", self.port, ssl=unchecked() if self.tls else None)

    async def ask(self, message: bytes) -> None:
        """Over a connection of its own; counts it if it is answered."""
        reader, writer = await self.connect()
        try:
            writer.write(message)
            await writer.drain()
            status = int((await reader.readline()).split()[1])
            while await reader.read(1 << 18):
                pass
            if status == 200:
                self.counted += 1
            else:
                self.other_statuses[status] += 1
        finally:
            writer.transport.abort()

    def message(self, session: str, *, closes: bool = False, **asked: Any) -> bytes:
        more = f"x-session-id: {session}\r\n" + ("connection: close\r\n" if closes else "")
        return request(self.port, **asked).replace(b"content-length", f"{more}content-length".encode(), 1)

    def large(self, text: str) -> bytes:
        """A body of 8 MB."""
        messages = [{"role": "user", "content": text * (LARGE // len(text.encode()))}]
        body = json.dumps({"model": "assistant", "messages": messages}, ensure_ascii=False).encode()
        head = self.message(self.other, closes=True).partition(b"content-length")[0]
        return b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body)


def unchecked() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


Trouble = Callable[[Setting], Awaitable[None]]


async def nothing(_: Setting) -> None: ...


def large(text: str) -> Trouble:
    """One client that sends a body of 8 MB, again and again."""

    async def go(setting: Setting) -> None:
        message = setting.large(text)
        while True:
            await setting.ask(message)

    return go


async def slow_clients(setting: Setting) -> None:
    """A thousand that send a byte of their head each second, and a thousand connections with nothing."""

    async def one() -> None:
        with contextlib.suppress(OSError):
            _, writer = await setting.connect()
            try:
                setting.counted += 1
                for byte in b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 1000:
                    writer.write(bytes([byte]))
                    await asyncio.sleep(1.0)
            finally:
                writer.transport.abort()

    async with asyncio.TaskGroup() as group:
        for _ in range(SLOW_CLIENTS):
            group.create_task(one())


async def pipelining(setting: Setting) -> None:
    """Clients that pipeline and do not read."""

    async def one() -> None:
        _, writer = await setting.connect()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        try:
            message = setting.message(setting.other) * 200
            while True:
                writer.write(message)
                setting.counted += 200
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(writer.drain(), 0.5)
                if writer.transport.get_write_buffer_size() > 1 << 20:
                    await asyncio.sleep(3600)
        finally:
            writer.transport.abort()

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(one())


async def handshakes(setting: Setting) -> None:
    """Twenty connections a second that begin TLS and leave within it, and twenty that end it and leave."""
    while True:
        for whole in (False, True):
            with contextlib.suppress(OSError):
                if whole:
                    _, writer = await setting.connect()
                else:
                    _, writer = await asyncio.open_connection("127.0.0.1", setting.port)
                    writer.write(b"\x16\x03\x01\x02\x00\x01")
                    await asyncio.sleep(0)
                writer.transport.abort()
                setting.counted += 1
        await asyncio.sleep(0.05)


async def schema_bombs(setting: Setting) -> None:
    """Requests whose schemas take for ever, each another one."""
    number = 0
    while True:
        steps: dict[str, Any] = {"s0": {"type": "object", "title": f"{number}"}}
        for level in range(1, 60):
            steps[f"s{level}"] = {"allOf": [{"$ref": f"#/$defs/s{level - 1}"}] * 2}
        schema = {"$defs": steps, "$ref": "#/$defs/s59"}
        asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        await setting.ask(setting.message(setting.other, closes=True, response_format=asked))
        number += 1
        await asyncio.sleep(0.02)


async def burst(setting: Setting) -> None:
    """Sixty-four clients at once, twice a second."""
    while True:
        message = setting.message(setting.other, closes=True)
        await asyncio.gather(*(setting.ask(message) for _ in range(64)), return_exceptions=True)
        await asyncio.sleep(0.5)
