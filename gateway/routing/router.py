"""The route of a request: role → model and variant → replica, with its reason.

Which variants may serve, and in which order, say the ladders (``ladders.py``) and what a request names
(``choices.py``); which one of them is free, the pools; which is fast enough, where the role has a target,
what was seen of them lately (``pace.py``). A request that a variant's engines do not serve (``serving.py``)
passes it by. When the pool of the chosen variant is down or full the route goes up, waits, or is refused, as
the role says; it never goes down.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Mapping
from functools import partial

import msgspec

from gateway.config import Canary, Config, Target, WhenFull, parts_of
from gateway.errors import NoReplicaError
from gateway.identity import Caller
from gateway.proxy.body import Body
from gateway.proxy.endpoints import Endpoint
from gateway.routing.choices import Choices, Explanation, Reason
from gateway.routing.hedging import Hedging, Kind
from gateway.routing.ladders import Ladder, Ladders
from gateway.routing.pace import Paces
from gateway.routing.policies import PickQuery, RoundRobin
from gateway.routing.pools import PROVIDER, Pool, Pools
from gateway.routing.replicas import Replica
from gateway.routing.serving import serves
from quantize.card import Card

MOST_PLANS = 4096


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
    ladder: Ladder = ()
    """What it may go up to, should the answer not be good enough."""


class _Plan(msgspec.Struct, frozen=True):
    """What is the same for all requests of a role for a model. ``simple``: the route of nearly all."""

    pool: Pool
    ladder: Ladder
    reason: Reason
    canary: Canary | None = None
    simple: Route | None = None
    provider: Route | None = None
    target: Target | None = None
    partly: bool = False
    """Some of the variants' engines do not serve all requests."""


class Router:
    """Chooses. Which variants suit a role is fixed by the cards; which replica is free is not."""

    def __init__(
        self,
        config: Config,
        cards: Mapping[str, Card],
        pools: Pools,
        hedging: Hedging | None = None,
        missed: Callable[[str, str, str], None] = lambda role, model, variant: None,
        paces: Paces | None = None,
    ) -> None:
        """``missed`` is told the role of a request whose pool could not take it, and the model and the
        variant that it should have had."""
        self._missed = missed
        self._config = config
        self._pools = pools
        self._hedging = hedging or Hedging()
        self._paces = paces or Paces(time.monotonic)
        self._ladders = Ladders(config, cards)
        self._choices = Choices(config, self._ladders, pools.providers)
        self._plans: dict[tuple[str, str, tuple[str | None, tuple[str, ...]] | None], _Plan] = {}

    def ladder(self, role: str) -> Ladder:
        """Variants that may serve ``role``, the cheapest first, the most precise last."""
        return self._ladders.of_role(role)

    def known_models(self) -> list[str]:
        """Every model id that a request may name."""
        return self._choices.known_models()

    def variants_of(self, model: str) -> Ladder:
        """Those that may serve a request which names ``model``, by whomever; none of a provider's."""
        return self._choices.variants_of(model)

    def expected(self, role: str) -> dict[str, tuple[float | None, float | None]]:
        """Variants of a role's ladder to the seconds until one more request would have its first token, and
        all of its answer; None where nothing is known."""
        pools = self._pools.by_variant
        return {one: self._paces.expected(pools[one], role) for one in self._ladders.of_role(role)}

    def explain(self, caller: Caller, model: str) -> Explanation:
        """The decision with all that was considered. Raises as ``route`` does, but NoReplicaError."""
        return self._choices.explain(caller, model)

    def avoid(self, demoted: Mapping[tuple[str, str], str]) -> None:
        """Choose no variant for a role in whose service it has been found harmed: (variant, role) to why."""
        if self._ladders.avoid(demoted):
            self._plans.clear()

    def higher(self, route: Route) -> Route | None:
        """The same request at the next more precise variant that may serve it; None when there is none to be
        had."""
        for variant in self._ladders.above(route.ladder, route.variant, strictly=True):
            usable = self._pools.by_variant[variant].usable()
            if usable:
                replica = min(usable, key=lambda one: one.in_flight)
                return Route(route.role, variant, replica, Reason.ESCALATED, ladder=route.ladder)
        return None

    def route(self, caller: Caller, body: Body, endpoint: Endpoint) -> Route:
        """Decide. Raises UnknownModelError, PrecisionTooLowError or NoReplicaError."""
        model = body.fields.model or caller.role
        key = caller.key
        asked = (caller.role, model, None if key is None else (key.lowest, key.models))
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
            above = self._ladders.above(ladder, canary.variant)
            ladder, reason = (canary.variant, *above), Reason.CANARY
        if plan.partly:
            ladder, reason = self._serving(ladder, reason, endpoint, body)
        order, usual = ladder, reason
        if plan.target is not None and reason is not Reason.CANARY:
            at = self._first_in_time(ladder, caller.role, plan.target)
            if at:
                order, reason = (*ladder[at:], *ladder[:at]), Reason.RAISED_TOO_SLOW
        adapter = model if model in self._config.adapters else ""
        prompt = partial(body.prompt, endpoint.prompt)
        query = PickQuery(caller.session, caller.cache_salt, prompt, adapter, caller.parent)
        route = self._climb(caller, order, reason, query)
        if order is not ladder:  # what is too slow is still better than nothing
            reason = usual if route.variant == ladder[0] else route.reason
            route = msgspec.structs.replace(route, reason=reason, ladder=ladder)
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
        choice = self._choices.choose(caller, model)
        ladder, reason = choice.ladder, choice.reason
        role = self._config.roles[caller.role]
        pool = self._pools.by_variant[ladder[0]]
        canary = role.canary if reason in (Reason.CHEAPEST_IN_BUDGET, Reason.REFERENCE_ONLY) else None
        if canary is not None and (
            canary.variant == ladder[0]
            or (canary.variant, caller.role) in self._ladders.demoted
            or parts_of(canary.variant)[0] not in choice.models
            or not self._choices.has(canary.variant, model)
        ):
            canary = None
        target = role.target if reason is not Reason.EXPLICIT_VARIANT and len(ladder) > 1 else None
        every = (*ladder, canary.variant) if canary is not None else ladder
        partly = [one for one in every if serves(self._ladders.cards[one]) is not None]
        usual = canary is None and target is None and ladder[0] not in partly
        simple = None
        if usual and len(pool.replicas) == 1 and not role.hedge:
            simple = Route(caller.role, pool.variant, pool.replicas[0], reason, ladder=ladder)
        return _Plan(pool, ladder, reason, canary, simple, target=target, partly=bool(partly))

    def _serving(
        self, ladder: Ladder, reason: Reason, endpoint: Endpoint, body: Body
    ) -> tuple[Ladder, Reason]:
        """The variants whose engines serve a request, and the reason for the first. All where none does:
        then the engine says so."""
        cards = self._ladders.cards
        able = tuple(
            one for one in ladder if (what := serves(cards[one])) is None or what.takes(endpoint, body)
        )
        if not able:
            return ladder, reason
        return able, reason if able[0] == ladder[0] else Reason.RAISED_NOT_SERVED

    def _first_in_time(self, ladder: Ladder, role: str, target: Target) -> int:
        """The place of the first variant that is expected to answer within a target; 0 where none is, or
        where nothing before it is slow but only down."""
        slow = False
        for place, variant in enumerate(ladder):
            pool = self._pools.by_variant[variant]
            if not pool.usable():
                continue
            if self._paces.in_time(pool, role, target):
                return place if slow else 0
            slow = True
        return 0

    def another(self, route: Route, busy: Replica) -> Replica | None:
        """A second replica for a hedged request: of the same variant, and not full."""
        pool = self._pools.by_variant[route.variant]
        free = [replica for replica in pool.usable() if replica is not busy]
        if pool.limit is not None:
            free = [replica for replica in free if replica.in_flight < pool.limit]
        return min(free, key=lambda replica: replica.in_flight, default=None)

    def _climb(self, caller: Caller, ladder: Ladder, reason: Reason, query: PickQuery) -> Route:
        role = self._config.roles[caller.role]
        full = False
        for variant in ladder:
            pool = self._pools.by_variant[variant]
            if picked := pool.pick(query, last=variant == ladder[-1]):
                replica, work = picked
                if variant != ladder[0]:
                    self._missed(caller.role, *parts_of(ladder[0]))
                    reason = Reason.RAISED_POOL_FULL if full else Reason.RAISED_POOL_DOWN
                return Route(caller.role, variant, replica, reason, work, ladder=ladder)
            if pool.usable():
                full = True
                if role.when_full is not WhenFull.RAISE:
                    break
        self._missed(caller.role, *parts_of(ladder[0]))
        if full and role.when_full is WhenFull.REFUSE:
            raise NoReplicaError(
                f"All replicas of {variant} are full; try again in a second.", may_wait=False
            )
        raise NoReplicaError(
            f"No replica can take a request of role {caller.role} now; try again in a second.",
            internal=f"tried the pools {', '.join(ladder)}",
        )


def _in_share(caller: Caller, percent: float) -> bool:
    """Whether a session is in the share; the same session always is, or never. Without one, by chance."""
    if caller.session is None:
        return random.random() * 100 < percent
    digest = hashlib.blake2s(f"canary\0{caller.role}\0{caller.session}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") < percent / 100 * (1 << 32)
