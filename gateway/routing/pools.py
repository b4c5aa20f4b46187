"""Pools and their replicas; the choice of a replica within a pool."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from gateway.config import Config
from gateway.routing.breaker import Breaker, Clock

PROVIDER = "provider"
"""The variant label of what LiteLLM serves, whose precision nobody here knows."""


class Replica:
    """One engine process, or one provider's model (then ``url`` is empty)."""

    def __init__(self, variant: str, name: str, url: str, clock: Clock) -> None:
        self.variant = variant
        self.name = name
        self.url = url
        self.breaker = Breaker(clock)
        self.in_flight = 0
        self.reachable: bool | None = None
        """What the last health probe found; None before the first."""

    def take(self) -> None:
        self.in_flight += 1

    def release(self) -> None:
        self.in_flight -= 1


class Pool:
    """The replicas that serve one variant."""

    def __init__(self, variant: str, replicas: Iterable[Replica]) -> None:
        self.variant = variant
        self.replicas = tuple(replicas)
        self._turn = -1

    @property
    def reachable(self) -> bool:
        return any(replica.reachable for replica in self.replicas)

    def pick(self) -> Replica | None:
        """The usable replica with the fewest requests in flight, ties in turn; None if none is usable."""
        self._turn = (self._turn + 1) % len(self.replicas)
        in_turn = self.replicas[self._turn :] + self.replicas[: self._turn]
        usable = [replica for replica in in_turn if replica.breaker.closed]
        return min(usable, key=lambda replica: replica.in_flight, default=None)


class Pools:
    """Every pool, by variant, and the models of providers, by model id."""

    def __init__(self, config: Config, clock: Clock) -> None:
        self.by_variant = {
            variant: Pool(
                variant,
                (
                    Replica(variant, f"{variant}-{index}", url, clock)
                    for index, url in enumerate(config.replicas(variant))
                ),
            )
            for variant in config.serve
        }
        self.providers = {
            provider.model: Replica(PROVIDER, provider.model, "", clock) for provider in config.providers
        }

    def replicas(self) -> Iterator[Replica]:
        """All engines of all pools."""
        for pool in self.by_variant.values():
            yield from pool.replicas
