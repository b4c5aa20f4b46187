"""Which replica of a pool: the policies, by name.

``prefix_aware`` keeps an index of what each replica's prefix cache holds (``prefixes.py``), and chooses the
replica with the least work: blocks that are queued there and not cached, plus ``OWN_WEIGHT`` times the blocks
of this request that are not. It needs neither a session id nor the engine's tokenizer. What is indexed is a
tenant's and a LoRA adapter's own, as the engines' caches are, and a replica that probably holds the adapter
already is preferred.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

import msgspec

from gateway.routing.prefixes import (
    BLOCK_BYTES,
    MOST_BYTES,
    Buffer,
    CacheIndex,
    SharedBeginnings,
    block_chain,
)
from gateway.routing.replicas import Replica

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
NEAR_WEIGHT = HOME_WEIGHT + 1.0
"""What it is worth to begin a sub-agent where its parent is, in blocks: the parent waits meanwhile, so it is
not in the way there; and a block more, so that the parent's replica, idle, is better than another idle one. A
second sub-agent at the same time goes elsewhere, and so does a first where somebody else runs."""
MOST_PLACES = 8192
"""Sessions of which it is remembered where they were last."""
ADAPTERS = 1
"""LoRA adapters that an engine holds at a time when it does not say: vLLM's own default."""
FADE = 0.98
"""By how much earlier beginnings count less with each new one."""
BYTES_PER_TOKEN = 4
"""Of a request's JSON, to say in bytes how large an engine's cache is."""


class PickQuery(msgspec.Struct):
    """What a policy may know of a request."""

    session: str | None = None
    salt: str = ""
    """Set where caches are kept apart by tenant."""
    prompt: Callable[[], Sequence[Buffer]] = tuple
    """What the engine's prompt is made of, in its order."""
    adapter: str = ""
    """The LoRA adapter that is asked for, if one is."""
    parent: str | None = None
    """The session that started this one's, which says little more than where it could be near its parent."""


class SelectionPolicy(Protocol):
    def pick(self, usable: Sequence[Replica], query: PickQuery) -> tuple[Replica, float]:
        """One of ``usable``, of which there is at least one, and the work that this adds to it."""
        ...


class RoundRobin:
    def __init__(self) -> None:
        self._turn = -1

    def pick(self, usable: Sequence[Replica], query: PickQuery) -> tuple[Replica, float]:
        self._turn += 1
        return usable[self._turn % len(usable)], 0.0


class LeastInFlight:
    """The fewest requests of ours in flight, ties in turn."""

    def __init__(self) -> None:
        self._turn = 0

    def pick(self, usable: Sequence[Replica], query: PickQuery) -> tuple[Replica, float]:
        self._turn = turn = (self._turn + 1) % len(usable)
        in_turn = (*usable[turn:], *usable[:turn])
        return min(in_turn, key=lambda replica: replica.in_flight), 0.0


class LeastLoad:
    """The fewest requests running and waiting, by the engine's own count where that is fresh, so that
    other gateways' requests count too. What was sent since the last reading is added."""

    def __init__(self) -> None:
        self._fallback = LeastInFlight()

    def pick(self, usable: Sequence[Replica], query: PickQuery) -> tuple[Replica, float]:
        loads = [replica.load() for replica in usable]
        known = [load for load in loads if load is not None]
        if len(known) < len(loads):
            return self._fallback.pick(usable, query)
        least = min(known)
        return random.choice([r for r, load in zip(usable, loads, strict=True) if load == least]), 0.0


class SessionAffinity:
    """Every session at one replica, by rendezvous hashing: when a replica goes, only its sessions move. What
    an agent has started is where that agent is, and so is what that has started in turn: a session counts as
    the first one above it. That takes having seen those between, here and not too long ago; otherwise it is
    where its parent would be if nobody had started that."""

    def __init__(self) -> None:
        self._fallback = LeastInFlight()
        self._firsts: OrderedDict[tuple[str, str], str] = OrderedDict()
        """By a tenant's session that another one has started: the one above which there is none."""

    def pick(self, usable: Sequence[Replica], query: PickQuery) -> tuple[Replica, float]:
        if query.session is None and query.parent is None:
            return self._fallback.pick(usable, query)
        first = self._first(query)
        return max(usable, key=lambda replica: _weight(first, replica.url)), 0.0

    def _first(self, query: PickQuery) -> str:
        firsts, salt, session = self._firsts, query.salt, query.session
        if query.parent is None:
            assert session is not None
            return firsts.get((salt, session), session)
        first = firsts.get((salt, query.parent), query.parent)
        if session is not None and first != session:  # none is above itself, whatever is said
            firsts[salt, session] = first
            firsts.move_to_end((salt, session))
            if len(firsts) > MOST_PLACES:
                firsts.popitem(last=False)
        return first


def _weight(session: str, url: str) -> bytes:
    return hashlib.blake2b(f"{url}\0{session}".encode(), digest_size=8).digest()


class _Known:
    """What ``PrefixAware`` knows of one replica."""

    __slots__ = ("adapters", "cache", "homes")

    def __init__(self) -> None:
        self.cache = CacheIndex()
        self.homes = 0.0
        """New conversations that it was given lately."""
        self.adapters: OrderedDict[str, None] = OrderedDict()
        """LoRA adapters that it was sent lately, as many as it holds; the last one last."""


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
        self._random = (rng or random.Random()).random
        self._beginnings = SharedBeginnings()
        self._replicas: WeakKeyDictionary[Replica, _Known] = WeakKeyDictionary()
        self._usable: Sequence[Replica] = ()
        self._places: dict[tuple[str, str], str] = {}
        """Salt and session to the address of the replica where it was last; the oldest first."""
        self._known: list[_Known] = []
        """Of those that were usable last, which nearly always are so again."""

    def pick(self, usable: Sequence[Replica], query: PickQuery) -> tuple[Replica, float]:
        own, shared, running, home = self._weights
        adapter = query.adapter
        chain = block_chain(query.prompt(), f"{query.salt}\0{adapter}" if adapter else query.salt)
        known = self._known if self._usable is usable else self._look_up(usable)
        cached = [one.cache.cached(chain) for one in known]
        size = chain.size
        own_bytes = size - self._beginnings.shared(chain)
        new = size - max(cached) >= own_bytes
        near = self._places.get((query.salt, query.parent)) if new and query.parent is not None else None
        best, least, ties = 0, math.inf, 0
        for index, replica in enumerate(usable):
            in_flight = replica.mine if replica.board is None else replica.in_flight
            cost = replica.work + running * in_flight
            if missing := size - cached[index]:
                missing_own = min(missing, own_bytes)
                cost += (own * missing_own + shared * (missing - missing_own)) / BLOCK_BYTES
            if adapter:
                cost += _loading(replica, known[index], adapter)
            if new:
                cost += home * known[index].homes
                if near is not None and replica.url == near:
                    cost -= NEAR_WEIGHT
            if cost < least:
                best, least, ties = index, cost, 1
            elif cost == least:
                ties += 1
                if self._random() * ties < 1:
                    best = index
        chosen = known[best]
        if new:
            for one in known:
                one.homes *= FADE
            chosen.homes += 1.0
        if adapter:
            _loaded(usable[best], chosen, adapter)
        if query.session is not None:
            self._remember((query.salt, query.session), usable[best].url)
        tokens = usable[best].reading.cache_tokens
        chosen.cache.add(chain, MOST_BYTES if tokens is None else tokens * BYTES_PER_TOKEN)
        return usable[best], (size - cached[best]) / BLOCK_BYTES

    def _remember(self, session: tuple[str, str], url: str) -> None:
        places = self._places
        places.pop(session, None)
        places[session] = url
        if len(places) > MOST_PLACES:
            del places[next(iter(places))]

    def _look_up(self, usable: Sequence[Replica]) -> list[_Known]:
        self._usable = usable
        self._known = [self._replicas.setdefault(replica, _Known()) for replica in usable]
        return self._known


def _loading(replica: Replica, known: _Known, adapter: str) -> float:
    """What it costs a replica to have an adapter, in blocks."""
    if adapter in known.adapters:
        return 0.0
    return ADAPTER_WEIGHT * (1 + (len(known.adapters) >= (replica.reading.adapters or ADAPTERS)))


def _loaded(replica: Replica, known: _Known, adapter: str) -> None:
    known.adapters[adapter] = None
    known.adapters.move_to_end(adapter)
    while len(known.adapters) > (replica.reading.adapters or ADAPTERS):
        known.adapters.popitem(last=False)


POLICIES: dict[str, Callable[[], SelectionPolicy]] = {
    "round_robin": RoundRobin,
    "least_in_flight": LeastInFlight,
    "least_load": LeastLoad,
    "session_affinity": SessionAffinity,
    "prefix_aware": PrefixAware,
}
