"""Pools: the replicas that serve one variant each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from gateway.config import Config
from gateway.routing.breaker import Clock
from gateway.routing.policies import POLICIES, PickQuery, SelectionPolicy
from gateway.routing.replicas import Replica
from gateway.workers.board import Board

PROVIDER = "provider"
"""Stands for the variant of what LiteLLM serves, whose precision nobody here knows."""


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
        for replica in self.replicas:
            if not replica.breaker.no_failures:
                break
        else:
            return self.replicas
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
    """Every pool, by ``model:variant``, and the models of providers, by model id. Replicas that ``before``
    had too are taken over, with their connections and what is known of them."""

    def __init__(
        self,
        config: Config,
        clock: Clock,
        before: Pools | None = None,
        board: Board | None = None,
        urls: Callable[[str], Sequence[str]] | None = None,
    ) -> None:
        """``urls``: the present replicas of a variant, where they are found by name."""
        known = {(r.variant, r.url): r for r in before.replicas()} if before else {}
        timeout, key = config.gateway.connect_timeout_s, config.gateway.engine_key()

        def replicas(variant: str) -> list[Replica]:
            """Those that were known keep their names; new ones take the lowest that are free."""
            present = (urls or config.replicas)(variant)
            taken = {old.name for url in present if (old := known.get((variant, url)))}
            free = (f"{variant}-{n}" for n in itertools.count() if f"{variant}-{n}" not in taken)
            return [
                known.get((variant, url)) or Replica(variant, next(free), url, clock, timeout, board, key)
                for url in present
            ]

        self.by_variant = {
            variant: Pool(
                variant,
                replicas(variant),
                POLICIES[config.gateway.policy](),
                config.gateway.max_in_flight,
            )
            for variant in config.served
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
