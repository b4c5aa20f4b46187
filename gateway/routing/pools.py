"""Pools and their replicas."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.config import Config, shown_url
from gateway.proxy.endpoints import Endpoint
from gateway.routing.breaker import Breaker, Clock
from gateway.wire.engine import ConnectionPool

if TYPE_CHECKING:
    from gateway.routing.policies import PickQuery, SelectionPolicy
    from gateway.workers import Board

PROVIDER = "provider"
"""The variant label of what LiteLLM serves, whose precision nobody here knows."""
STALE_READING_S = 10.0


@dataclass(frozen=True, slots=True)
class Reading:
    """Figures of one engine, from its ``/metrics``; None for what it does not report."""

    kv_cache_usage: float | None = None
    waiting: float | None = None
    running: float | None = None
    cache_tokens: int | None = None
    """Tokens that its KV cache has room for."""
    preemptions: float | None = None
    """Requests that it has thrown out of its KV cache since its start, to begin them again."""
    adapters: int | None = None
    """LoRA adapters that it holds at a time."""
    prompt_tokens: float | None = None
    generation_tokens: float | None = None
    """Tokens that it has read and written since its start."""
    at: float = 0.0


class Lease:
    """A request's place at a replica: one more in flight there, and the work that it brings."""

    __slots__ = ("_replica", "_ticket", "_work", "released")

    def __init__(self, replica: Replica, work: float, ticket: int) -> None:
        self._replica = replica
        self._work = work
        self._ticket = ticket
        self.released = False

    def began(self) -> None:
        """Its first token has come: its prompt waits no more. Safe at any time and twice."""
        if self._work:
            self._replica.work -= self._work
            self._work = 0.0

    def release(self) -> None:
        """It is over, however it ended; the breaker has been told before. Safe at any time and twice."""
        if self.released:
            return
        self.released = True
        self.began()
        if self._ticket:
            self._replica.breaker.abandoned(self._ticket)
        self._replica.leave()


class Replica:
    """One engine process, or one provider's model (then ``url`` is empty)."""

    def __init__(
        self,
        variant: str,
        name: str,
        url: str,
        clock: Clock,
        connect_timeout_s: float = 2.0,
        board: Board | None = None,
    ) -> None:
        """``board``: where several workers tell each other of their requests in flight."""
        self.variant = variant
        self.name = name
        self.url = url
        self.breaker = Breaker(clock)
        self._mine = 0
        self._board = board
        self._slot = 0 if board is None else board.slot(variant, url)
        self.work = 0.0
        """Blocks that are not in its cache, of requests whose first token has not come."""
        self.heard_at = 0.0
        """When it last gave a byte of an answer to anybody; seconds of the clock."""
        self.reachable: bool | None = None
        """What the last health probe found; None before the first."""
        self.reading = Reading()
        self._in_flight_at_reading = 0
        self.heard_at = clock()
        """When something last came of it: a byte of an answer, or tokens by its own count."""
        self._clock = clock
        self.connections = ConnectionPool(url, connect_timeout_s)
        self._heads: dict[str, bytes] = {}

    @property
    def where(self) -> str:
        """Its name and address, for the log."""
        return f"{self.name} at {shown_url(self.url)}"

    @property
    def in_flight(self) -> int:
        """Requests of ours, of all workers."""
        board = self._board
        return self._mine if board is None else self._mine + board.others(self._slot)

    def take(self, work: float = 0.0) -> Lease:
        """A request goes there. ``work``: blocks of its prompt that are not in the replica's cache."""
        self._mine += 1
        self.work += work
        if self._board is not None:
            self._board.write(self._slot, self._mine)
        breaker = self.breaker
        return Lease(self, work, 0 if breaker.no_failures else breaker.take())

    def leave(self) -> None:
        """A lease has ended; for leases alone."""
        self._mine -= 1
        if not self._mine:
            self.work = 0.0
        if self._board is not None:
            self._board.write(self._slot, self._mine)

    def read(self, reading: Reading) -> None:
        """The engine's own figures have come in."""
        before, self.reading = self.reading, reading
        self._in_flight_at_reading = self.in_flight
        if _rose(before.generation_tokens, reading.generation_tokens) or _rose(
            before.prompt_tokens, reading.prompt_tokens
        ):
            self.heard_at = self._clock()
            self.breaker.heard()

    def load(self) -> float | None:
        """Requests running and waiting there; None when the engine has not said so lately."""
        reading = self.reading
        if reading.running is None or self._clock() - reading.at > STALE_READING_S:
            return None
        since = self.in_flight - self._in_flight_at_reading
        return reading.running + (reading.waiting or 0.0) + since

    def request_head(self, endpoint: Endpoint) -> bytes:
        """What every request to an endpoint begins with."""
        head = self._heads.get(endpoint.path)
        if head is None:
            host = self.connections.netloc
            target = self.connections.base_path + endpoint.engine_path
            head = self._heads[endpoint.path] = (
                f"POST {target} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n".encode()
            )
        return head


def _rose(before: float | None, now: float | None) -> bool:
    """Whether a counter did; one that has fallen is of an engine that started anew."""
    return before is not None and now is not None and now > before


class Pool:
    """The replicas that serve one variant. ``limit``: requests in flight at each, None for no limit."""

    def __init__(
        self, variant: str, replicas: Iterable[Replica], policy: SelectionPolicy, limit: int | None = None
    ) -> None:
        self.variant = variant
        self.replicas = tuple(replicas)
        self.policy = policy
        self.limit = limit

    @property
    def reachable(self) -> bool:
        return any(replica.reachable for replica in self.replicas)

    def free(self, replica: Replica) -> bool:
        """Whether one of its replicas may be asked now."""
        breaker = replica.breaker
        return (self.limit is None or replica.in_flight < self.limit) and (
            breaker.no_failures or breaker.free
        )

    def usable(self) -> Sequence[Replica]:
        """Replicas that may be asked, full or not."""
        return [replica for replica in self.replicas if replica.breaker.free]

    def pick(self, query: PickQuery, *, last: bool = False) -> tuple[Replica, float] | None:
        """The policy's choice, and the work it adds; None if none is usable, or all of those are full.
        ``last``: no other pool would take the request, so a replica that failed is better than none."""
        usable = self.usable()
        if not usable and last:
            usable = [replica for replica in self.replicas if replica.breaker.may_try_early][:1]
        if (limit := self.limit) is not None:
            usable = [replica for replica in usable if replica.in_flight < limit]
        if not usable:
            return None
        if len(self.replicas) == 1:
            return usable[0], 0.0
        return self.policy.pick(usable, query)


class Pools:
    """Every pool, by variant, and the models of providers, by model id. Replicas that ``before`` had too
    are taken over, with their connections and what is known of them."""

    def __init__(
        self,
        config: Config,
        clock: Clock,
        before: Pools | None = None,
        board: Board | None = None,
        urls: Callable[[str], Sequence[str]] | None = None,
    ) -> None:
        """``urls``: the present replicas of a variant, where they are found by name."""
        from gateway.routing.policies import POLICIES

        known = {(r.variant, r.url): r for r in before.replicas()} if before else {}
        timeout = config.gateway.connect_timeout_s

        def replicas(variant: str) -> list[Replica]:
            """Those that were known keep their names; new ones take the lowest that are free."""
            present = (urls or config.replicas)(variant)
            taken = {old.name for url in present if (old := known.get((variant, url)))}
            free = (f"{variant}-{n}" for n in itertools.count() if f"{variant}-{n}" not in taken)
            return [
                known.get((variant, url)) or Replica(variant, next(free), url, clock, timeout, board)
                for url in present
            ]

        self.by_variant = {
            variant: Pool(
                variant,
                replicas(variant),
                POLICIES[config.gateway.policy](),
                config.gateway.max_in_flight,
            )
            for variant in config.serve
        }
        if before is not None:
            for variant, pool in self.by_variant.items():
                old_pool = before.by_variant.get(variant)
                if old_pool is not None and type(old_pool.policy) is type(pool.policy):
                    pool.policy = old_pool.policy
        old_providers: Mapping[str, Replica] = before.providers if before else {}
        self.providers: dict[str, Replica] = {
            provider.model: old_providers.get(provider.model)
            or Replica(PROVIDER, provider.model, "", clock, timeout)
            for provider in config.providers
        }

    def replicas(self) -> Iterator[Replica]:
        """All engines of all pools."""
        for pool in self.by_variant.values():
            yield from pool.replicas
