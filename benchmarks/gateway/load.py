"""Loads that ``wrk`` cannot make: paced streams, many open ones, and clients that leave."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import aiohttp

from benchmarks.gateway.peers import KEY

PATH = "/v1/chat/completions"
HEADERS = f"content-type: application/json\r\nauthorization: Bearer {KEY}\r\n"
GIVE_UP_S = 1.0


def request(port: int, **more: Any) -> bytes:
    payload = json.dumps(
        {"model": "assistant", "messages": [{"role": "user", "content": "hello " * 100}], **more}
    )
    head = f"POST {PATH} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n{HEADERS}content-length: {len(payload)}\r\n"
    return f"{head}\r\n{payload}".encode()


class _Listener(asyncio.Protocol):
    """One stream: when its chunks came, and whether it was whole."""

    def __init__(self, message: bytes) -> None:
        self._message = message
        self.arrivals: list[float] = []
        self.tail = b""
        self.done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(self._message)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        for _ in range(data.count(b"data: {")):
            self.arrivals.append(now)
        self.tail = (self.tail + data)[-64:]
        if b"[DONE]" in self.tail and self.tail.endswith(b"0\r\n\r\n") and not self.done.done():
            self.done.set_result(True)
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(False)


async def _listen(port: int, message: bytes) -> _Listener:
    loop = asyncio.get_running_loop()
    _, listener = await loop.create_connection(lambda: _Listener(message), "127.0.0.1", port)
    return listener


async def paced(port: int, streams: int, chunks: int, pause_ms: int) -> dict[str, Any]:
    """How late chunks come: the time since the stream's first chunk, against the pauses that there were."""
    message = request(port, stream=True, max_tokens=chunks, seed=pause_ms)
    listeners = []
    for _ in range(streams):
        listeners.append(await _listen(port, message))
        await asyncio.sleep(pause_ms / 1000 / streams)
    whole = [await listener.done for listener in listeners]
    gaps = sorted(
        1000 * (after - before) - pause_ms
        for listener in listeners
        for before, after in zip(listener.arrivals, listener.arrivals[1:], strict=False)
    )
    return {
        "errors": whole.count(False),
        "p50_ms": gaps[len(gaps) // 2],
        "p99_ms": gaps[int(0.99 * len(gaps))],
        "worst_ms": gaps[-1],
    }


async def open_streams(port: int, streams: int, chunks: int, pause_ms: int) -> dict[str, Any]:
    """Many at once, as agents that think slowly."""
    message = request(port, stream=True, max_tokens=chunks, seed=pause_ms)
    listeners, refused = [], 0
    for n in range(streams):
        try:
            listeners.append(await _listen(port, message))
        except OSError:
            refused += 1
        if n % 50 == 49:
            await asyncio.sleep(0.02)
    whole = [await listener.done for listener in listeners]
    return {"errors": whole.count(False) + refused}


async def disconnects(port: int, upstream_port: int) -> dict[str, Any]:
    """Seconds from a client's leaving until the engine sees it; None if it does not within a second."""
    async with aiohttp.ClientSession() as http:

        async def cancelled() -> int:
            async with http.get(f"http://127.0.0.1:{upstream_port}/cancelled") as response:
                return int(await response.text())

        async def leave(read_first: bool, **asked: Any) -> float | None:
            before = await cancelled()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request(port, **asked))
            if read_first:
                while b"data: {" not in await reader.read(65536):
                    pass
            else:
                await asyncio.sleep(0.3)
            writer.transport.abort()
            left = time.perf_counter()
            while time.perf_counter() - left < GIVE_UP_S:
                if await cancelled() > before:
                    return time.perf_counter() - left
                await asyncio.sleep(0.002)
            return None

        return {
            "mid_stream": await leave(True, stream=True, max_tokens=200, seed=50),
            "before_first": await leave(False, stream=True, top_k=7),
            "not_streamed": await leave(False, top_k=7),
        }
