"""Which replica of a pool: the policies, by name.

``prefix_aware`` keeps a shadow of what each replica's prefix cache holds, over blocks of the request's own
text, and chooses the replica with the least work: blocks that are queued there and not cached, plus
``PREFIX_WEIGHT`` times the blocks of this request that are not. It needs neither a session id nor the
engine's tokenizer. The shadow is a tenant's own, as the engines' caches are.
"""

from __future__ import annotations

import hashlib
import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

import msgspec

from gateway.routing.pools import Replica

BLOCK_BYTES = 512
PREFIX_WEIGHT = 4.0
MOST_BLOCKS = 200_000
"""Blocks that a shadow holds when the engine does not say how large its cache is."""
BYTES_PER_TOKEN = 4
"""Of a request's JSON, to put an engine's cache in blocks."""


class Ask(msgspec.Struct):
    """What a policy may know of a request."""

    session: str | None = None
    salt: str = ""
    """Set where caches are kept apart by tenant."""
    prompt: Callable[[], bytes] = bytes
    """The bytes that the engine's prompt is made of, in their order."""


class Policy(Protocol):
    def pick(self, usable: Sequence[Replica], ask: Ask) -> tuple[Replica, float]:
        """One of ``usable``, of which there is at least one, and the work that this adds to it."""
        ...


class RoundRobin:
    def __init__(self) -> None:
        self._turn = -1

    def pick(self, usable: Sequence[Replica], ask: Ask) -> tuple[Replica, float]:
        self._turn += 1
        return usable[self._turn % len(usable)], 0.0


class LeastInFlight:
    """The fewest requests of ours in flight, ties in turn."""

    def __init__(self) -> None:
        self._turn = 0

    def pick(self, usable: Sequence[Replica], ask: Ask) -> tuple[Replica, float]:
        self._turn = turn = (self._turn + 1) % len(usable)
        in_turn = (*usable[turn:], *usable[:turn])
        return min(in_turn, key=lambda replica: replica.in_flight), 0.0


class LeastLoad:
    """The fewest requests running and waiting, by the engine's own count where that is fresh, so that
    other gateways' requests count too. What was sent since the last reading is added."""

    def __init__(self) -> None:
        self._fallback = LeastInFlight()

    def pick(self, usable: Sequence[Replica], ask: Ask) -> tuple[Replica, float]:
        loads = [replica.load() for replica in usable]
        known = [load for load in loads if load is not None]
        if len(known) < len(loads):
            return self._fallback.pick(usable, ask)
        least = min(known)
        return random.choice([r for r, load in zip(usable, loads, strict=True) if load == least]), 0.0


class SessionAffinity:
    """Every session at one replica, by rendezvous hashing: when a replica goes, only its sessions move."""

    def __init__(self) -> None:
        self._fallback = LeastInFlight()

    def pick(self, usable: Sequence[Replica], ask: Ask) -> tuple[Replica, float]:
        session = ask.session
        if session is None:
            return self._fallback.pick(usable, ask)
        return max(usable, key=lambda replica: _weight(session, replica.url)), 0.0


def _weight(session: str, url: str) -> bytes:
    return hashlib.blake2b(f"{url}\0{session}".encode(), digest_size=8).digest()


class Shadow:
    """What a replica's prefix cache probably holds: hashes of blocks, the least recently used leave."""

    __slots__ = ("_blocks",)

    def __init__(self) -> None:
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def missing(self, chain: Sequence[int]) -> int:
        """Blocks of ``chain`` after the first that is not cached."""
        blocks = self._blocks
        # A chain is cached up to some block: look for it by halves.
        low, high = 0, len(chain)
        while low < high:
            middle = (low + high) // 2
            if chain[middle] in blocks:
                low = middle + 1
            else:
                high = middle
        return len(chain) - low

    def add(self, chain: Sequence[int], capacity: int) -> None:
        """Later blocks leave before earlier ones of the same chain, as in vLLM."""
        blocks = self._blocks
        for block in reversed(chain):
            if block in blocks:
                blocks.move_to_end(block)
            else:
                blocks[block] = None
        while len(blocks) > capacity:
            blocks.popitem(last=False)


class PrefixAware:
    def __init__(self, weight: float = PREFIX_WEIGHT, rng: random.Random | None = None) -> None:
        self._weight = weight
        self._rng = rng or random.Random()
        self._shadows: WeakKeyDictionary[Replica, Shadow] = WeakKeyDictionary()

    def pick(self, usable: Sequence[Replica], ask: Ask) -> tuple[Replica, float]:
        chain = block_chain(ask.prompt(), ask.salt)
        best: Replica | None = None
        best_key: tuple[float, float, float] = (0.0, 0.0, 0.0)
        best_missing = 0
        for replica in usable:
            shadow = self._shadow(replica)
            missing = shadow.missing(chain)
            key = (replica.work + self._weight * missing, replica.in_flight, self._rng.random())
            if best is None or key < best_key:
                best, best_key, best_missing = replica, key, missing
        assert best is not None
        self._shadow(best).add(chain, best.cache_blocks(BLOCK_BYTES / BYTES_PER_TOKEN) or MOST_BLOCKS)
        return best, float(best_missing)

    def _shadow(self, replica: Replica) -> Shadow:
        shadow = self._shadows.get(replica)
        if shadow is None:
            shadow = self._shadows[replica] = Shadow()
        return shadow


def block_chain(prompt: bytes, salt: str = "") -> list[int]:
    """Hashes of the prefixes of ``prompt`` that end at a block's end; one for a prompt of a single
    unfinished block. Differs from process to process."""
    seed = hash(salt)
    chain = []
    for at in range(0, max(1, len(prompt) - BLOCK_BYTES + 1), BLOCK_BYTES):
        seed = hash((seed, prompt[at : at + BLOCK_BYTES]))
        chain.append(seed)
    return chain


POLICIES: dict[str, Callable[[], Policy]] = {
    "round_robin": RoundRobin,
    "least_in_flight": LeastInFlight,
    "least_load": LeastLoad,
    "session_affinity": SessionAffinity,
    "prefix_aware": PrefixAware,
}
