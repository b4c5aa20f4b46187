"""The route of a request: role → variant → replica, with its reason.

The variant is the cheapest whose gate passed for the role. A client may ask for more precision by
``model:variant``, never for less. When the pool of the chosen variant is down the route goes up in
precision, never down, and ends at the reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from gateway.config import Config
from gateway.errors import NoReplicaError, PrecisionTooLowError, UnknownModelError
from gateway.routing.pools import Pools, Replica
from quantize.card import Card, Outcome
from quantize.gate import judge

KV_TOKENS = 65_536
"""Tokens in the KV cache at which the memory of variants is compared: a busy engine."""


class Reason(StrEnum):
    CHEAPEST_IN_BUDGET = "cheapest_in_budget"
    EXPLICIT_VARIANT = "explicit_variant"
    REFERENCE_ONLY = "reference_only"
    RAISED_POOL_DOWN = "raised_pool_down"
    PROVIDER = "provider"


@dataclass(frozen=True)
class Route:
    """The decision for one request."""

    role: str
    variant: str
    replica: Replica
    reason: Reason


def precision(card: Card) -> tuple[bool, int, int]:
    """Sort key, higher is more precise: the reference, then weight bits, then bits of the KV cache."""
    kv = card.kv
    kv_bits = 4 if "int4" in kv or "fp4" in kv else 8 if "8" in kv else 16
    return card.variant == card.reference, card.weight_bits, kv_bits


class Router:
    """Chooses. Which variants suit a role is fixed by the cards; which replica is free is not."""

    def __init__(self, config: Config, cards: Mapping[str, Card], pools: Pools) -> None:
        self._config = config
        self._cards = cards
        self._pools = pools
        self._ladders = {role: self._ladder(role) for role in config.roles}

    def ladder(self, role: str) -> tuple[str, ...]:
        """Variants that may serve ``role``, the cheapest first, the reference last."""
        return self._ladders[role]

    def known_models(self) -> list[str]:
        """Every model id that a request may name."""
        name = self._config.model.name
        variants = [f"{name}:{variant}" for variant in self._config.serve]
        return [name, *self._config.roles, *variants, *self._pools.providers]

    def route(self, role: str, model: str) -> Route:
        """Decide. Raises UnknownModelError, PrecisionTooLowError or NoReplicaError."""
        if provider := self._pools.providers.get(model):
            return Route(role, provider.variant, provider, Reason.PROVIDER)
        name, _, variant = model.partition(":")
        if variant and name == self._config.model.name and variant in self._cards:
            return self._climb(role, self._ladder_from(role, variant), Reason.EXPLICIT_VARIANT)
        if model != self._config.model.name and model not in self._config.roles:
            known = ", ".join(self.known_models())
            raise UnknownModelError(
                f"model: {model[:80]!r} does not exist; use one of: {known}", param="model"
            )
        ladder = self._ladders[role]
        alone = ladder == (self._config.reference,)
        return self._climb(role, ladder, Reason.REFERENCE_ONLY if alone else Reason.CHEAPEST_IN_BUDGET)

    def _ladder(self, role: str) -> tuple[str, ...]:
        budget = self._config.roles[role].budget
        reference = self._config.reference
        cost = {variant: card.memory_bytes(KV_TOKENS) for variant, card in self._cards.items()}
        passed = [
            variant
            for variant, card in self._cards.items()
            if cost[variant] < cost[reference] and judge(card, role, budget).outcome is Outcome.PASSED
        ]
        return (*sorted(passed, key=lambda variant: cost[variant]), reference)

    def _ladder_from(self, role: str, asked: str) -> tuple[str, ...]:
        """The ladder of an explicit variant: itself, then what is more precise and suits the role."""
        ladder = self._ladders[role]
        cheapest = ladder[0]
        least = precision(self._cards[asked])
        if least < precision(self._cards[cheapest]):
            name = self._config.model.name
            raise PrecisionTooLowError(
                f"model: {name}:{asked} is less precise than role {role} allows; the cheapest that it may "
                f"use is {name}:{cheapest}",
                param="model",
            )
        higher = [v for v in ladder if v != asked and precision(self._cards[v]) >= least]
        return (asked, *higher)

    def _climb(self, role: str, ladder: tuple[str, ...], reason: Reason) -> Route:
        for variant in ladder:
            if replica := self._pools.by_variant[variant].pick():
                raised = variant != ladder[0]
                return Route(role, variant, replica, Reason.RAISED_POOL_DOWN if raised else reason)
        raise NoReplicaError(
            f"No replica can take a request of role {role} now; try again in a second.",
            internal=f"tried the pools {', '.join(ladder)}",
        )
