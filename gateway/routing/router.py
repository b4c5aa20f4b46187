"""The route of a request: role → variant → replica, with its reason.

The variant is the cheapest whose gate passed for the role. A client may ask for more precision by
``model:variant``, never for less than its role's budget or its key allows. When the pool of the chosen
variant is down or full the route goes up in precision, waits, or is refused, as the role says; it never goes
down.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec

from gateway.config import Canary, Config, ConfigError, Cost, WhenFull
from gateway.errors import NoReplicaError, PrecisionTooLowError, UnknownModelError
from gateway.identity import Caller
from gateway.proxy.body import Body
from gateway.proxy.endpoints import Endpoint
from gateway.routing.hedging import Hedging, Kind
from gateway.routing.policies import PickQuery, RoundRobin
from gateway.routing.pools import PROVIDER, Pool, Pools
from gateway.routing.prefixes import Buffer
from gateway.routing.replicas import Replica
from quantize.card import Card, Outcome
from quantize.gate.judgement import judge

KV_TOKENS = 65_536
"""Tokens in the KV cache at which the memory of variants is compared: a busy engine."""


MOST_PLANS = 4096


class Reason(StrEnum):
    CHEAPEST_IN_BUDGET = "cheapest_in_budget"
    EXPLICIT_VARIANT = "explicit_variant"
    REFERENCE_ONLY = "reference_only"
    CANARY = "canary"
    RAISED_POOL_DOWN = "raised_pool_down"
    RAISED_POOL_FULL = "raised_pool_full"
    RAISED_DEMOTED = "raised_demoted"
    """The watch, or a person, has taken the cheaper variant out of the role's choice."""
    ESCALATED = "escalated"
    """A cheaper variant's answer failed a check; nobody got it."""
    PROVIDER = "provider"


class Route(msgspec.Struct, frozen=True):
    """The decision for one request. ``work``: blocks that it adds to the replica's queue."""

    role: str
    variant: str
    replica: Replica
    reason: Reason
    work: float = 0.0
    hedge_after_s: float | None = None
    kind: Kind | None = None
    """As one of which its time is kept, for the hedging of later ones; None: it is not."""


class _Plan(msgspec.Struct, frozen=True):
    """What is the same for all requests of a role for a model. ``simple``: the route of nearly all."""

    pool: Pool
    ladder: tuple[str, ...]
    reason: Reason
    canary: Canary | None = None
    simple: Route | None = None
    provider: Route | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One variant that was considered, for whoever asks why."""

    variant: str
    memory_bytes: int
    tokens_per_s: float | None
    """Written by its engine when it was measured; None when it never was."""
    verdict: str
    why: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a request goes where it goes, without sending it there."""

    role: str
    model: str
    ladder: tuple[str, ...]
    """Variants that may serve it, the first choice first."""
    reason: Reason
    considered: tuple[Step, ...] = field(default=())


def precision(card: Card) -> tuple[bool, int, int]:
    """Sort key, higher is more precise: the reference, then weight bits, then bits of the KV cache."""
    kv = card.kv
    kv_bits = 4 if "int4" in kv or "fp4" in kv else 8 if "8" in kv else 16
    return card.variant == card.reference, card.weight_bits, kv_bits


def _costs(cards: Mapping[str, Card], by: Cost) -> dict[str, float]:
    """What serving with each variant costs: bytes, or bytes times seconds per token. Raises ConfigError when
    the speed of one is not known: those of the others would say nothing beside it."""
    memory = {variant: float(card.memory_bytes(KV_TOKENS)) for variant, card in cards.items()}
    if by is Cost.MEMORY:
        return memory
    if unknown := sorted(variant for variant, card in cards.items() if card.speed is None):
        raise ConfigError(
            f"gateway.cost: memory_time needs the speed of every variant, and nobody has measured that of "
            f"{', '.join(unknown)}; run `tiercel quantize`, or set it to memory"
        )
    return {v: memory[v] / card.speed.tokens_per_s for v, card in cards.items() if card.speed}


class Router:
    """Chooses. Which variants suit a role is fixed by the cards; which replica is free is not."""

    def __init__(
        self,
        config: Config,
        cards: Mapping[str, Card],
        pools: Pools,
        hedging: Hedging | None = None,
        missed: Callable[[str, str], None] = lambda role, variant: None,
    ) -> None:
        """``missed`` is told the role and the variant of a request whose pool could not take it."""
        self._missed = missed
        self._config = config
        self._cards = cards
        self._pools = pools
        self._hedging = hedging or Hedging()
        self._cost = _costs(cards, config.gateway.cost)
        self._demoted: Mapping[tuple[str, str], str] = {}
        self._ladders = {role: self._ladder(role) for role in config.roles}
        self._plans: dict[tuple[str, str, str | None], _Plan] = {}
        self._variants = {f"{config.model.name}:{variant}": variant for variant in config.serve}

    def ladder(self, role: str) -> tuple[str, ...]:
        """Variants that may serve ``role``, the cheapest first, the reference last."""
        return self._ladders[role]

    def avoid(self, demoted: Mapping[tuple[str, str], str]) -> None:
        """Choose no variant for a role in whose service it has been found harmed: (variant, role) to why."""
        known = {key: why for key, why in demoted.items() if key[0] in self._cards}
        if known == self._demoted:
            return
        self._demoted = known
        self._ladders = {role: self._ladder(role) for role in self._config.roles}
        self._plans.clear()

    def higher(self, route: Route) -> Route | None:
        """The same request at the next more precise variant of its role; None when there is none to be
        had."""
        least = precision(self._cards[route.variant]) if route.variant in self._cards else None
        for variant in self._ladders[route.role]:
            if least is None or precision(self._cards[variant]) <= least:
                continue
            usable = self._pools.by_variant[variant].usable()
            if usable:
                replica = min(usable, key=lambda one: one.in_flight)
                return Route(route.role, variant, replica, Reason.ESCALATED)
        return None

    def known_models(self) -> list[str]:
        """Every model id that a request may name."""
        config = self._config
        return [
            config.model.name,
            *config.roles,
            *self._variants,
            *config.adapters,
            *self._pools.providers,
        ]

    def route(self, caller: Caller, body: Body, endpoint: Endpoint) -> Route:
        """Decide. Raises UnknownModelError, PrecisionTooLowError or NoReplicaError."""
        model = body.fields.model or self._config.model.name
        key = caller.key
        asked = (caller.role, model, None if key is None else key.lowest)
        plan = self._plans.get(asked)
        if plan is None:
            plan = self._plan(caller, model)
            if len(self._plans) < MOST_PLANS:
                self._plans[asked] = plan
        if (simple := plan.simple) is not None:
            pool = plan.pool
            if (pool.limit is None and simple.replica.breaker.no_failures) or pool.free(simple.replica):
                return simple
        if (provider := plan.provider) is not None:
            return provider
        ladder, reason = plan.ladder, plan.reason
        canary = plan.canary
        if canary is not None and _in_share(caller, canary.percent):
            ladder, reason = self._above(ladder, canary.variant), Reason.CANARY
        adapter = model if model in self._config.adapters else ""
        query = PickQuery(caller.session, caller.cache_salt, _prompt(body, endpoint), adapter)
        route = self._climb(caller, ladder, reason, query)
        if not self._config.roles[caller.role].hedge:
            return route
        kind = (caller.role, route.variant, endpoint.path, bool(body.fields.stream))
        after_s = self._hedging.delay(kind, self._config.gateway.hedge_share)
        return msgspec.structs.replace(route, hedge_after_s=after_s, kind=kind)

    def _plan(self, caller: Caller, model: str) -> _Plan:
        if provider := self._pools.providers.get(model):
            route = Route(caller.role, provider.variant, provider, Reason.PROVIDER)
            pool = Pool(PROVIDER, (provider,), RoundRobin())
            return _Plan(pool, (), Reason.PROVIDER, provider=route)
        ladder, reason = self._choice(caller, model)
        role = self._config.roles[caller.role]
        pool = self._pools.by_variant[ladder[0]]
        canary = role.canary if reason in (Reason.CHEAPEST_IN_BUDGET, Reason.REFERENCE_ONLY) else None
        if canary is not None and (
            canary.variant == ladder[0]
            or (canary.variant, caller.role) in self._demoted
            or not self._has(canary.variant, model)
        ):
            canary = None
        simple = None
        if canary is None and len(pool.replicas) == 1 and not role.hedge:
            simple = Route(caller.role, pool.variant, pool.replicas[0], reason)
        return _Plan(pool, ladder, reason, canary, simple)

    def explain(self, caller: Caller, model: str) -> Explanation:
        """The same decision with all that was considered. Raises as ``route`` does, but NoReplicaError."""
        if model in self._pools.providers:
            return Explanation(caller.role, model, (), Reason.PROVIDER)
        ladder, reason = self._choice(caller, model)
        budget = self._config.roles[caller.role].budget
        steps = []
        for variant in sorted(self._cards, key=lambda variant: self._cost[variant]):
            card = self._cards[variant]
            memory = card.memory_bytes(KV_TOKENS)
            speed = card.speed.tokens_per_s if card.speed else None
            if variant == card.reference:
                steps.append(Step(variant, memory, speed, "reference"))
            else:
                verdict = judge(card, caller.role, budget)
                said, why = verdict.outcome.value, verdict.reasons
                if (demoted := self._demoted.get((variant, caller.role))) is not None:
                    said, why = "demoted", (demoted,)
                steps.append(Step(variant, memory, speed, said, why))
        return Explanation(caller.role, model, ladder, reason, tuple(steps))

    def another(self, route: Route, busy: Replica) -> Replica | None:
        """A second replica for a hedged request: of the same variant, and not full."""
        pool = self._pools.by_variant[route.variant]
        free = [replica for replica in pool.usable() if replica is not busy]
        if pool.limit is not None:
            free = [replica for replica in free if replica.in_flight < pool.limit]
        return min(free, key=lambda replica: replica.in_flight, default=None)

    def _choice(self, caller: Caller, model: str) -> tuple[tuple[str, ...], Reason]:
        role = caller.role
        asked = self._variants.get(model)
        if asked is not None and (asked, role) in self._demoted:
            least = precision(self._cards[asked])
            higher = tuple(v for v in self._ladders[role] if precision(self._cards[v]) >= least)
            return higher, Reason.RAISED_DEMOTED
        if asked is not None:
            return self._ladder_from(caller, asked), Reason.EXPLICIT_VARIANT
        config = self._config
        if model != config.model.name and model not in config.roles and model not in config.adapters:
            known = ", ".join(self.known_models())
            raise UnknownModelError(
                f"model: {model[:80]!r} does not exist; use one of: {known}",
                param="model",
                internal="model: does not exist",
            )
        ladder = tuple(variant for variant in self._ladders[role] if self._has(variant, model))
        cheaper = [v for v, of in self._demoted if of == role and self._cost[v] < self._cost[ladder[0]]]
        if cheaper and any(self._passes(variant, role) for variant in cheaper):
            return ladder, Reason.RAISED_DEMOTED
        alone = ladder == (config.reference,)
        return ladder, Reason.REFERENCE_ONLY if alone else Reason.CHEAPEST_IN_BUDGET

    def _has(self, variant: str, model: str) -> bool:
        """Whether its engines know the model: only of an adapter there is a doubt."""
        adapter = self._config.adapters.get(model)
        return adapter is None or not adapter.variants or variant in adapter.variants

    def _passes(self, variant: str, role: str) -> bool:
        budget = self._config.roles[role].budget
        return judge(self._cards[variant], role, budget).outcome is Outcome.PASSED

    def _ladder(self, role: str) -> tuple[str, ...]:
        reference = self._config.reference
        cost = self._cost
        passed = [
            variant
            for variant in self._cards
            if cost[variant] < cost[reference]
            and (variant, role) not in self._demoted
            and self._passes(variant, role)
        ]
        return (*sorted(passed, key=lambda variant: cost[variant]), reference)

    def _ladder_from(self, caller: Caller, asked: str) -> tuple[str, ...]:
        """The ladder of an explicit variant: itself, then what is more precise and suits the role."""
        floor = caller.key.lowest if caller.key and caller.key.lowest else self._ladders[caller.role][0]
        if precision(self._cards[asked]) < precision(self._cards[floor]):
            name = self._config.model.name
            whose = f"role {caller.role}" if not (caller.key and caller.key.lowest) else "this key"
            raise PrecisionTooLowError(
                f"model: {name}:{asked} is less precise than {whose} allows; the cheapest that it may "
                f"use is {name}:{floor}",
                param="model",
            )
        return self._above(self._ladders[caller.role], asked)

    def _above(self, ladder: tuple[str, ...], first: str) -> tuple[str, ...]:
        least = precision(self._cards[first])
        return (first, *(v for v in ladder if v != first and precision(self._cards[v]) >= least))

    def _climb(self, caller: Caller, ladder: tuple[str, ...], reason: Reason, query: PickQuery) -> Route:
        role = self._config.roles[caller.role]
        full = False
        for variant in ladder:
            pool = self._pools.by_variant[variant]
            if picked := pool.pick(query, last=variant == ladder[-1]):
                replica, work = picked
                if variant != ladder[0]:
                    self._missed(caller.role, ladder[0])
                    reason = Reason.RAISED_POOL_FULL if full else Reason.RAISED_POOL_DOWN
                return Route(caller.role, variant, replica, reason, work)
            if pool.usable():
                full = True
                if role.when_full is not WhenFull.RAISE:
                    break
        self._missed(caller.role, ladder[0])
        if full and role.when_full is WhenFull.REFUSE:
            raise NoReplicaError(
                f"All replicas of {variant} are full; try again in a second.", may_wait=False
            )
        raise NoReplicaError(
            f"No replica can take a request of role {caller.role} now; try again in a second.",
            internal=f"tried the pools {', '.join(ladder)}",
        )


def _prompt(body: Body, endpoint: Endpoint) -> Callable[[], Sequence[Buffer]]:
    def prompt() -> Sequence[Buffer]:
        return [part for name in endpoint.prompt if (part := body.view(name))]

    return prompt


def _in_share(caller: Caller, percent: float) -> bool:
    """Whether a session is in the share; the same session always is, or never. Without one, by chance."""
    if caller.session is None:
        return random.random() * 100 < percent
    digest = hashlib.blake2s(f"canary\0{caller.role}\0{caller.session}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") < percent / 100 * (1 << 32)
