"""What the Python of one request costs, without a network: whole answers and streams through the data plane,
with connections whose transports only take the bytes.

    python -m benchmarks.gateway.per_request

CPU time is the process' own and the least of many repeats, calls are counted: neither depends much on what
else the machine does. (Callgrind takes more than ten minutes to import a gateway.)
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import sys
import time
from collections import Counter
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import uvloop

from benchmarks.gateway.load import request
from benchmarks.gateway.peers import KEY, variants
from benchmarks.gateway.upstream import COUNTED, END, LAST_USAGE, STREAM_HEAD, WHOLE
from gateway.app import Gateway
from gateway.config import Config
from gateway.routing.policies import POLICIES
from gateway.wire.engine import EngineConnection

CHUNKS = 64
_LOT = 200


class Sink:
    """A transport that takes everything."""

    def __init__(self) -> None:
        self.write = self.written = self._count
        self.parts = 0

    def _count(self, data: bytes) -> None:
        self.parts += 1

    def writelines(self, parts: Any) -> None:
        self.parts += 1

    def is_closing(self) -> bool:
        return False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def abort(self) -> None: ...

    close = abort


class EngineSink(Sink):
    def __init__(self, bench: Bench, engine: EngineConnection) -> None:
        super().__init__()
        self._bench, self._engine = bench, engine

    def _count(self, data: bytes) -> None:
        self._bench.sent += 1
        self._bench.engine = self._engine


def made(replicas: int, policy: str) -> Gateway:
    """What a deployed gateway has switched on; whether an answer is listened to is drawn, and none is."""
    cards, digest = variants(), hashlib.sha256(KEY.encode()).hexdigest()
    config = Config.model_validate(
        {
            "models": {"assistant": {"path": Path("model"), "serve": ("bf16", "int8")}},
            "variants_dir": Path("variants"),
            "roles": {"core": {}, "summarizer": {}},
            "default_role": "core",
            "pools": {
                "bf16": [f"http://127.0.1.{n + 1}:9" for n in range(replicas)],
                "int8": ["http://127.0.0.2:9"],
            },
            "keys": [{"name": "bench", "sha256": digest, "tenant": "bench"}],
            "quality": {"sample_rate": 1e-9},
            "watch": {"enabled": False},
            "gateway": {"policy": policy},
        }
    )
    gateway = Gateway(config, {card.id: card for card in cards.values()})
    gateway.log.flush = lambda: gateway.log._lines.clear()  # type: ignore[method-assign]
    return gateway


class Bench:
    """One client's connection and one engine's."""

    def __init__(self, replicas: int = 1, policy: str = "prefix_aware") -> None:
        self.gateway = made(replicas, policy)
        state = SimpleNamespace(connections=set())
        self.client = self.gateway.protocol(config=None, server_state=state, app_state=None)
        self.client_sink = Sink()
        self.client.connection_made(self.client_sink)  # type: ignore[arg-type]
        self.engine: EngineConnection
        """That which was asked last."""
        for replica in self.gateway.plane.snapshot.pools.by_variant["assistant:bf16"].replicas:
            engine = EngineConnection(replica.connections)
            engine.connection_made(EngineSink(self, engine))  # type: ignore[arg-type]
            replica.connections.keep(engine)
        self.sent = 0
        self._whole, self._stream = request(9), request(9, stream=True)

    def whole(self, count: int) -> None:
        client, message = self.client, self._whole
        for _ in range(count):
            client.data_received(message)
            self.engine.data_received(WHOLE)

    def stream(self, count: int) -> None:
        client, message = self.client, self._stream
        for _ in range(count):
            client.data_received(message)
            engine = self.engine
            engine.data_received(STREAM_HEAD + COUNTED[0])
            for chunk in COUNTED[1:CHUNKS]:
                engine.data_received(chunk)
            engine.data_received(LAST_USAGE + END)

    def check(self) -> None:
        """Raises RuntimeError where requests were not answered as they should be."""
        before, sent = self.client_sink.parts, self.sent
        self.whole(2)
        if (self.client_sink.parts - before, self.sent - sent) != (2, 2):
            raise RuntimeError("whole answers did not pass")
        self.stream(1)
        if self.client_sink.parts - before != 2 + CHUNKS + 2:  # the last event, and the end
            raise RuntimeError(f"a stream had {self.client_sink.parts - before - 2} parts")


def least_us(bench: Bench, kind: str, repeats: int) -> float:
    run, least = getattr(bench, kind), float("inf")
    count = _LOT if kind == "whole" else _LOT // 10
    for _ in range(repeats):
        began = time.process_time_ns()
        run(count)
        least = min(least, (time.process_time_ns() - began) / 1000 / count)
        bench.gateway.log.flush()
    return least


def calls(bench: Bench, kind: str) -> tuple[Counter[str], Counter[str]]:
    """Functions of Python and of C that one request calls."""
    ours: Counter[str] = Counter()
    theirs: Counter[str] = Counter()

    def count(frame: FrameType, event: str, what: Any) -> None:
        if event == "call":
            code = frame.f_code
            ours[f"{Path(code.co_filename).name}:{code.co_firstlineno}:{code.co_qualname}"] += 1
        elif event == "c_call":
            theirs[getattr(what, "__qualname__", repr(what))] += 1

    run = getattr(bench, kind)
    run(3)
    sys.setprofile(count)
    run(1)
    sys.setprofile(None)
    del theirs["setprofile"]
    return ours, theirs


async def _main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--repeats", type=int, default=100)
    options.add_argument("--replicas", type=int, default=1, help="of the pool that is asked")
    options.add_argument(
        "--policy", choices=tuple(POLICIES), default="prefix_aware", help="of several replicas"
    )
    options.add_argument("--list", action="store_true", help="which functions are called")
    given = options.parse_args()
    bench = Bench(given.replicas, given.policy)
    bench.check()
    gc.collect()
    gc.freeze()
    found = {}
    for kind in ("whole", "stream"):
        ours, theirs = calls(bench, kind)
        us = least_us(bench, kind, given.repeats)
        found[kind] = {"us": round(us, 2), "python_calls": ours.total(), "c_calls": theirs.total()}
        if given.list:
            for name, number in (*ours.items(), *theirs.items()):
                print(f"{number:5}  {name}")
    print(json.dumps(found))


if __name__ == "__main__":
    uvloop.run(_main())
