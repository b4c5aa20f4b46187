"""Where requests are placed, on real agent traces against simulated replicas with vLLM's block cache.

    python -m benchmarks.gateway.placement --traces path/to/agent_traces

Sessions are cut from the traces: the first requests of each, at an eighth of their length (every eighth block
of 64 tokens stands for eight), several times over with blocks of their own but for the system prompt and the
tools, which all sessions of a trace share. A session waits for an answer before it goes on, and thinks
between requests as long as the trace does, but not more than two seconds. Sub-agents run beside it.

A replica computes prompts one after another (a fixed time per block that is not cached) while it decodes all
running answers, each the slower the more there are. Its cache holds so many blocks, the least recently used
go. Policies see what the gateway sees: bytes, never the blocks' numbers.
"""

from __future__ import annotations

import argparse
import gzip
import heapq
import itertools
import json
import random
import statistics
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway.routing.policies import POLICIES, PickQuery, PrefixAware, SelectionPolicy
from gateway.routing.prefixes import BLOCK_BYTES
from gateway.routing.replicas import Reading, Replica

SCALE = 8
TOKENS_PER_BLOCK = 64
PREFILL_S = 0.004
"""Seconds per block of 64 tokens: 16,000 tokens a second."""
DECODE_S = 0.02
"""Seconds per token of an answer alone; twice that with ``CROWD`` beside it."""
CROWD = 16
LONGEST_THOUGHT_S = 2.0
LONGEST_ANSWER = 60
TUNED_ON = ("trace_0003", "trace_0010", "trace_0014", "trace_0277")


@dataclass
class Turn:
    chain: tuple[int, ...]
    out: int
    think_s: float
    helpers: tuple[Session, ...] = ()
    """Sessions of sub-agents that begin with it."""


@dataclass
class Session:
    name: str
    turns: list[Turn]


@dataclass
class Engine:
    """A simulated replica."""

    replica: Replica
    capacity: int
    cache: OrderedDict[int, None] = field(default_factory=OrderedDict)
    busy_until: float = 0.0
    decoding: int = 0
    hits: int = 0
    asked: int = 0

    def prefill(self, chain: Sequence[int]) -> int:
        """Blocks to compute, which are cached from now on."""
        cached = next((n for n, block in enumerate(chain) if block not in self.cache), len(chain))
        self.hits += cached
        self.asked += len(chain)
        for block in reversed(chain):
            self.cache[block] = None
            self.cache.move_to_end(block)
        while len(self.cache) > self.capacity:
            self.cache.popitem(last=False)
        return len(chain) - cached


def load(
    folder: Path, names: Sequence[str] | None, sessions: int, turns: int, scale: int = SCALE
) -> list[Session]:
    """``sessions`` sessions of at most ``turns`` turns, from the traces in turn."""
    traces = [
        json.loads(gzip.decompress(path.read_bytes()))
        for path in sorted(folder.glob("*.json.gz"))
        if names is None or path.name.split(".")[0] in names
    ]
    return [
        session(traces[n % len(traces)], f"{n}", n // len(traces), n % len(traces), turns, scale)
        for n in range(sessions)
    ]


def session(trace: dict[str, Any], name: str, copy: int, number: int, turns: int, scale: int) -> Session:
    common = (trace["tool_tokens"] + trace["system_tokens"]) // (TOKENS_PER_BLOCK * scale)

    def chain(hashes: Sequence[int]) -> tuple[int, ...]:
        blocks = hashes[scale - 1 :: scale] or hashes[:1]
        return tuple(hash((number, block, None if n < common else copy)) for n, block in enumerate(blocks))

    def turn(request: dict[str, Any]) -> Turn:
        think = min(float(request.get("think_time") or 0.0), LONGEST_THOUGHT_S)
        return Turn(chain(request["hash_ids"]), max(1, min(request["out"] // scale, LONGEST_ANSWER)), think)

    made: list[Turn] = []
    for index, request in enumerate(trace["requests"]):
        if len(made) >= turns:
            break
        if request["type"] == "subagent":
            inner = [turn(one) for one in request["requests"] if one.get("hash_ids")][:turns]
            if made and inner:
                made[-1].helpers = (*made[-1].helpers, Session(f"{name}/{index}", inner))
        elif request.get("hash_ids"):
            made.append(turn(request))
    return Session(name, made)


def working_set(sessions: Sequence[Session]) -> set[int]:
    """All blocks of all prompts, those of sub-agents too."""
    turns = [turn for one in sessions for turn in one.turns]
    turns += [turn for one in tuple(turns) for helper in one.helpers for turn in helper.turns]
    return {block for turn in turns for block in turn.chain}


def prompt_of(chain: Sequence[int]) -> bytes:
    """Bytes that differ from block to block as the engine's tokens do."""
    return b"".join([(b"%x " % (block & 0xFFFFFFFFFFFF)).ljust(BLOCK_BYTES, b".") for block in chain])


class CacheAware:
    """The rule of sglang's and vLLM's Rust routers: by match if the load is even, else by load."""

    def __init__(self) -> None:
        self._seen: dict[Replica, set[bytes]] = {}

    def pick(self, usable: Sequence[Replica], query: PickQuery) -> tuple[Replica, float]:
        prompt = b"".join(query.prompt())
        blocks = [prompt[:end] for end in range(BLOCK_BYTES, len(prompt) + 1, BLOCK_BYTES)]
        keys = [hash(block).to_bytes(8, "big", signed=True) for block in blocks]
        for replica in usable:
            self._seen.setdefault(replica, set())
        loads = [replica.in_flight for replica in usable]
        if max(loads) - min(loads) > 32 and max(loads) > 1.1 * min(loads):
            chosen = min(usable, key=lambda replica: replica.in_flight)
        else:
            matches = {
                r: sum(1 for _ in itertools.takewhile(self._seen[r].__contains__, keys)) for r in usable
            }
            best = max(usable, key=lambda replica: matches[replica])
            if matches[best] > 0.5 * len(keys):
                chosen = best
            else:
                chosen = min(usable, key=lambda replica: len(self._seen[replica]))
        self._seen[chosen].update(keys)
        return chosen, 0.0


def _engines(replicas: int, capacity: int, clock: Callable[[], float]) -> dict[Replica, Engine]:
    engines = {}
    for n in range(replicas):
        replica = Replica("v", f"v-{n}", f"http://127.0.0.1:{n + 1}", clock)
        # The gateway takes 4 bytes for a token: what a cache of so many blocks is said to hold.
        replica.read(Reading(cache_tokens=int(capacity * BLOCK_BYTES / 4)))
        engines[replica] = Engine(replica, capacity)
    return engines


def simulate(
    sessions: list[Session], policy: SelectionPolicy, replicas: int, capacity: int, seed: int = 1
) -> dict[str, float]:
    """``capacity``: blocks of a replica's cache. ``seed``: of the sessions' arrivals."""
    now = 0.0
    clock = lambda: now  # noqa: E731
    engines = _engines(replicas, capacity, clock)
    queue: list[tuple[float, int, Callable[[], None]]] = []
    order = itertools.count()
    ttfts: list[float] = []
    placed: dict[str, Replica] = {}
    imbalance: list[tuple[float, float]] = []

    def at(when: float, what: Callable[[], None]) -> None:
        heapq.heappush(queue, (when, next(order), what))

    def begin(one: Session, n: int) -> None:
        turn = one.turns[n]
        prompt = prompt_of(turn.chain)
        replica, work = policy.pick(list(engines), PickQuery(one.name, "", lambda: (prompt,)))
        placed.setdefault(one.name, replica)
        lease = replica.take(work)
        engine = engines[replica]
        sent = now
        loads = [r.in_flight for r in engines]
        imbalance.append((now, max(loads) / (sum(loads) / len(loads))))
        start = max(now, engine.busy_until)
        engine.busy_until = start + PREFILL_S * engine.prefill(turn.chain) + 0.001

        def first() -> None:
            lease.began()
            ttfts.append(now - sent)
            engine.decoding += 1
            slow = 1 + engine.decoding / CROWD
            at(now + turn.out * DECODE_S * slow, end)

        def end() -> None:
            engine.decoding -= 1
            lease.release()
            for helper in turn.helpers:
                at(now, lambda helper=helper: begin(helper, 0))  # type: ignore[misc]
            if n + 1 < len(one.turns):
                at(now + turn.think_s, lambda: begin(one, n + 1))

        at(engine.busy_until, first)

    rng = random.Random(seed)
    for one in sessions:
        at(rng.uniform(0, 5.0), lambda one=one: begin(one, 0))  # type: ignore[misc]
    while queue:
        now, _, what = heapq.heappop(queue)
        what()
    return _figures(list(engines.values()), ttfts) | {
        "makespan_s": now,
        "imbalance": statistics.fmean(value for _, value in imbalance),
    }


def _figures(engines: Sequence[Engine], ttfts: list[float]) -> dict[str, float]:
    hits, asked = sum(engine.hits for engine in engines), sum(engine.asked for engine in engines)
    ttfts.sort()
    return {
        "hit_rate": hits / asked,
        "p50_s": ttfts[len(ttfts) // 2],
        "p95_s": ttfts[int(0.95 * len(ttfts))],
        "requests": len(ttfts),
    }


def spread(policy: SelectionPolicy, seed: int, arrive_s: float, turns: int = 4) -> list[int]:
    """How 16 new sessions that share a prompt of 6 kB come to lie on four replicas."""
    rng = random.Random(seed)
    common = tuple(rng.getrandbits(40) for _ in range(6000 // BLOCK_BYTES + 1))
    replicas = [Replica("v", f"v-{n}", f"http://127.0.0.1:{n + 1}", lambda: 0.0) for n in range(4)]
    events: list[tuple[float, int, Callable[[], None]]] = []
    order = itertools.count()
    homes: dict[int, Replica] = {}
    now = 0.0

    def begin(one: int, turn: int, chain: tuple[int, ...]) -> None:
        chain = (*chain, *(rng.getrandbits(40) for _ in range(3)))
        prompt = prompt_of(chain)
        replica, work = policy.pick(replicas, PickQuery(str(one), "", lambda: (prompt,)))
        homes.setdefault(one, replica)
        lease = replica.take(work)

        def first() -> None:
            lease.began()

        def end() -> None:
            lease.release()
            if turn + 1 < turns:
                push(now + rng.uniform(0.1, 1.0), lambda: begin(one, turn + 1, chain))

        push(now + 0.01 + PREFILL_S * work, first)
        push(now + 0.5, end)

    def push(when: float, what: Callable[[], None]) -> None:
        heapq.heappush(events, (when, next(order), what))

    for one in range(16):
        push(one * arrive_s, lambda one=one: begin(one, 0, common))  # type: ignore[misc]
    while events:
        now, _, what = heapq.heappop(events)
        what()
    return sorted(list(homes.values()).count(replica) for replica in replicas)


def policies() -> Iterator[tuple[str, Callable[[], SelectionPolicy]]]:
    for name in ("round_robin", "least_in_flight", "session_affinity"):
        yield name, POLICIES[name]
    yield "cache_aware", CacheAware
    yield "prefix_aware", lambda: PrefixAware(rng=random.Random(3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=5, help="orders in which sessions arrive")
    parser.add_argument("--tune", action="store_true", help="on the traces that are not reported")
    options = parser.parse_args()
    every = [path.name.split(".")[0] for path in sorted(options.traces.glob("*.json.gz"))]
    names = TUNED_ON if options.tune else tuple(name for name in every if name not in TUNED_ON)
    sessions = load(options.traces, names, options.sessions, options.turns)
    blocks = working_set(sessions)
    infinite = simulate(sessions, POLICIES["round_robin"](), 1, 10**9)["hit_rate"]
    print(f"{', '.join(names)}: working set {len(blocks):,} blocks, infinite cache hits {infinite:.3f}\n")
    print("| policy | cache each | hits ÷ infinite | p95 TTFT ÷ sticky | makespan ÷ sticky | max/mean load |")
    print("|---|---|---|---|---|---|")
    for share in (1.0, 0.25, 0.08):
        capacity = max(1, int(share * len(blocks)))
        runs: dict[str, list[dict[str, float]]] = {name: [] for name, _ in policies()}
        for seed in range(options.seeds):
            for name, make in policies():
                runs[name].append(simulate(sessions, make(), options.replicas, capacity, seed))
        sticky = runs["session_affinity"]
        for name, rows in runs.items():
            cells = (
                [row["hit_rate"] / infinite for row in rows],
                [row["p95_s"] / other["p95_s"] for row, other in zip(rows, sticky, strict=True)],
                [row["makespan_s"] / other["makespan_s"] for row, other in zip(rows, sticky, strict=True)],
                [row["imbalance"] for row in rows],
            )
            print(f"| {name} | {share:.0%} | " + " | ".join(map(_middle, cells)) + " |")
    print(
        "\n16 new sessions that share a prompt of 6 kB, on 4 replicas; 0, 50 ms and 1 s between arrivals:\n"
    )
    for name, make in policies():
        found = [str(spread(make(), seed, gap)) for seed, gap in enumerate((0.0, 0.05, 1.0))]
        print(f"- {name}: {'; '.join(found)}")


def _middle(values: Sequence[float]) -> str:
    """The median, with the least and the most."""
    return f"{statistics.median(values):.3g} ({min(values):.3g}–{max(values):.3g})"


if __name__ == "__main__":
    main()
