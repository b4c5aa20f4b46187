"""Which replica of a pool: the policies, by name.

``prefix_aware`` keeps a shadow of what each replica's prefix cache holds, over blocks of the request's own
text, and chooses the replica with the least work: blocks that are queued there and not cached, plus
``OWN_WEIGHT`` times the blocks of this request that are not. It needs neither a session id nor the
engine's tokenizer. The shadow is a tenant's and a LoRA adapter's own, as the engines' caches are, and a
replica that probably holds the adapter already is preferred.
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
OWN_WEIGHT = 8.0
"""What a block costs that is computed again, above its time: it drives others out, and is asked for again."""
SHARED_WEIGHT = 1.0
"""The same of a block that many prompts begin with: it will serve others there too."""
RUNNING_WEIGHT = 4.0
"""What a running request costs those beside it, in blocks."""
HOME_WEIGHT = 4.0
"""What a conversation will cost the replica that it begins at, in blocks: its later turns will go there."""
ADAPTER_WEIGHT = 32.0
"""What it costs to load a LoRA adapter where there is room for it, in blocks; twice that where another has to
leave."""
ADAPTERS = 1
"""LoRA adapters that an engine holds at a time when it does not say: vLLM's own default."""
FADE = 0.98
"""By how much earlier beginnings count less with each new one."""
FORKS = 3
"""A block that so many different ones follow ends what prompts share."""
_START = 0
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
    adapter: str = ""
    """The LoRA adapter that is asked for, if one is."""


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


class Prefixes:
    """Which blocks are the beginning of many prompts: those up to the last that is followed by different
    ones. A system prompt is, a conversation is not, however long it grows."""

    __slots__ = ("_followers",)

    def __init__(self) -> None:
        self._followers: OrderedDict[int, int] = OrderedDict()

    def shared(self, chain: Sequence[int]) -> int:
        """How many blocks of ``chain`` are, after it has been taken in."""
        followers = self._followers
        before = _START
        depth = 0
        for index, block in enumerate(chain):
            if block not in followers:
                followers[block] = 0
                followers[before] = followers.get(before, 0) + 1
            if index and followers.get(before, 0) >= FORKS:
                depth = index
            before = block
        while len(followers) > MOST_BLOCKS:
            followers.popitem(last=False)
        return depth


class PrefixAware:
    def __init__(
        self,
        own: float = OWN_WEIGHT,
        shared: float = SHARED_WEIGHT,
        running: float = RUNNING_WEIGHT,
        home: float = HOME_WEIGHT,
        rng: random.Random | None = None,
    ) -> None:
        self._weights = own, shared, running, home
        self._homes: WeakKeyDictionary[Replica, float] = WeakKeyDictionary()
        """New conversations that were given to each replica lately."""
        self._rng = rng or random.Random()
        self._prefixes = Prefixes()
        self._shadows: WeakKeyDictionary[Replica, Shadow] = WeakKeyDictionary()
        self._adapters: WeakKeyDictionary[Replica, OrderedDict[str, None]] = WeakKeyDictionary()
        """Those that each replica was sent lately, as many as it holds; the last one last."""

    def pick(self, usable: Sequence[Replica], ask: Ask) -> tuple[Replica, float]:
        own, shared, running, home = self._weights
        adapter = ask.adapter
        chain = block_chain(ask.prompt(), f"{ask.salt}\0{adapter}" if adapter else ask.salt)
        size, depth = len(chain), self._prefixes.shared(chain)
        missing = [self._shadow(replica).missing(chain) for replica in usable]
        new = min(missing) >= size - depth
        best = 0
        best_key: tuple[float, float] = (0.0, 0.0)
        for index, replica in enumerate(usable):
            missing_own = min(missing[index], size - depth)
            cost = replica.work + own * missing_own + shared * (missing[index] - missing_own)
            cost += running * replica.in_flight
            if adapter:
                cost += self._loading(replica, adapter)
            if new:
                cost += home * self._homes.get(replica, 0.0)
            key = (cost, self._rng.random())
            if not index or key < best_key:
                best, best_key = index, key
        chosen = usable[best]
        if new:
            for replica in usable:
                self._homes[replica] = FADE * self._homes.get(replica, 0.0)
            self._homes[chosen] += 1.0
        if adapter:
            self._loaded(chosen, adapter)
        self._shadow(chosen).add(chain, chosen.cache_blocks(BLOCK_BYTES / BYTES_PER_TOKEN) or MOST_BLOCKS)
        return chosen, float(missing[best])

    def _loading(self, replica: Replica, adapter: str) -> float:
        """What it costs a replica to have an adapter, in blocks."""
        held = self._adapters.get(replica, ())
        if adapter in held:
            return 0.0
        return ADAPTER_WEIGHT * (1 + (len(held) >= (replica.reading.adapters or ADAPTERS)))

    def _loaded(self, replica: Replica, adapter: str) -> None:
        held = self._adapters.setdefault(replica, OrderedDict())
        held[adapter] = None
        held.move_to_end(adapter)
        while len(held) > (replica.reading.adapters or ADAPTERS):
            held.popitem(last=False)

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
