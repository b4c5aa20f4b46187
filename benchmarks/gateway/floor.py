"""What a proxy on uvloop costs before it looks at anything: bytes of a client to an engine, and back.

    python -m benchmarks.gateway.floor --port 8080 --engine 8000

Every connection of a client has one of its own to the engine for as long as it lasts; nothing is parsed,
counted, limited or logged. It is the least that a gateway in Python on uvloop can take, and not one.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import cast

import uvloop

HOST = "127.0.0.1"
SIZE = 1 << 18


class _Side(asyncio.BufferedProtocol):
    """One of two connections; what comes is written to the other."""

    def __init__(self) -> None:
        self._buffer = bytearray(SIZE)
        self._view = memoryview(self._buffer)
        self.transport: asyncio.Transport | None = None
        self.other: _Side | None = None
        self._waiting = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        if self._waiting:
            self.transport.write(self._waiting)
            self._waiting = b""

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        assert self.other is not None
        data = bytes(self._view[:nbytes])
        if self.other.transport is None:
            self.other._waiting += data
        else:
            self.other.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()


class _Client(_Side):
    def __init__(self, engine: int) -> None:
        super().__init__()
        self._engine = engine

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        side = self.other = _Side()
        side.other = self
        loop = asyncio.get_running_loop()
        self._connecting = loop.create_task(loop.create_connection(lambda: side, HOST, self._engine))


async def _serve(port: int, engine: int) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: _Client(engine), HOST, port)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--engine", type=int, required=True)
    options = parser.parse_args()
    uvloop.run(_serve(options.port, options.engine))


if __name__ == "__main__":
    main()
