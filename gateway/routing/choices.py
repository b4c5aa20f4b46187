"""What may serve a request, by its role, its key and the ``model`` that it names.

================================  ==================================================================
nothing, a role, or the name of   the role's ladder, over all models that may serve it and that the
the role's first model            request's key may use
another model's name              that model's ladder alone: whoever names it wants no other one
``model:variant``                 that variant, if it is at least as precise as the first of its model
                                  that the role, or else the key, allows; then more precise ones of it
an adapter                        the ladder of its model alone, as far as engines have the adapter
a provider's model                the provider
================================  ==================================================================

A key that may not use the role's first model gets the ladder of the first one alone that it may use.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from gateway.config import Config, parts_of
from gateway.errors import ForbiddenError, PrecisionTooLowError, UnknownModelError, some_of
from gateway.identity import Caller, may_use
from gateway.routing.ladders import KV_TOKENS, Ladder, Ladders, precision
from quantize.card import Outcome


class Reason(StrEnum):
    CHEAPEST_IN_BUDGET = "cheapest_in_budget"
    EXPLICIT_VARIANT = "explicit_variant"
    REFERENCE_ONLY = "reference_only"
    CANARY = "canary"
    RAISED_POOL_DOWN = "raised_pool_down"
    RAISED_POOL_FULL = "raised_pool_full"
    RAISED_DEMOTED = "raised_demoted"
    """The watch, or a person, has taken the cheaper variant out of the role's choice."""
    RAISED_TOO_SLOW = "raised_too_slow"
    """The cheaper variant is not expected to answer within the role's target."""
    RAISED_NOT_SERVED = "raised_not_served"
    """The cheaper variant's engines do not serve such a request."""
    ESCALATED = "escalated"
    """A cheaper variant's answer failed a check; nobody got it."""
    PROVIDER = "provider"


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
    ladder: Ladder
    """Variants that may serve it, the first choice first."""
    reason: Reason
    considered: tuple[Step, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Choice:
    """What may serve a request. ``judged_by``: the model beside whose reference variants are judged."""

    ladder: Ladder
    reason: Reason
    models: tuple[str, ...]
    judged_by: str


class Choices:
    """Knows what may serve whom. Nothing of it depends on which pool is free."""

    def __init__(self, config: Config, ladders: Ladders, providers: Collection[str]) -> None:
        """``providers``: ids of their models."""
        self._config = config
        self._ladders = ladders
        self._providers = providers
        self._adapters = {
            name: parts_of(next(iter(adapter.variants or config.served)))[0]
            for name, adapter in config.adapters.items()
        }
        """To the model that each is of."""

    def known_models(self) -> list[str]:
        """Every model id that a request may name."""
        config = self._config
        return [*config.models, *config.roles, *config.served, *config.adapters, *self._providers]

    def variants_of(self, model: str) -> tuple[str, ...]:
        """Those that may serve a request which names ``model``, by whomever; none of a provider's."""
        config = self._config
        if model in self._ladders.cards:
            return (model,)
        if model in config.roles:
            return self._ladders.of_role(model)
        if (adapted := self._adapters.get(model)) is not None:
            return tuple(v for v in config.served if parts_of(v)[0] == adapted and self.has(v, model))
        firsts = [role for role in config.roles if config.models_of(role)[0] == model]
        chosen = [v for role in firsts for v in self._ladders.of_role(role)]
        own = [v for v in config.served if parts_of(v)[0] == model]
        return tuple(dict.fromkeys([*own, *chosen]))

    def choose(self, caller: Caller, model: str) -> Choice:
        """For a model that is no provider's. Raises UnknownModelError, PrecisionTooLowError or
        ForbiddenError."""
        role = caller.role
        if model in self._ladders.cards:
            return self._explicit(caller, model)
        mine, models = self._config.models_of(role), self._models(caller, model)
        if not models:
            raise ForbiddenError(
                f"model: this key may not use {model[:80]!r} as {role}, which {some_of(mine)} may serve",
                param="model",
            )
        judged_by = mine[0] if mine[0] in models else models[0]
        ladder = tuple(one for one in self._ladders.within(role, models) if self.has(one, model))
        if not ladder:
            raise self._unproven(model, role)
        reason = Reason.CHEAPEST_IN_BUDGET
        if self._raised(role, ladder[0], models, judged_by):
            reason = Reason.RAISED_DEMOTED
        elif ladder[0] == self._config.references[judged_by]:
            reason = Reason.REFERENCE_ONLY
        return Choice(ladder, reason, models, judged_by)

    def _models(self, caller: Caller, model: str) -> tuple[str, ...]:
        """Models that may serve a request: the role's, as far as its key may use them, or the one that it
        names. None: its key allows none of them."""
        config, key = self._config, caller.key
        mine = config.models_of(caller.role)
        if (adapted := self._adapters.get(model)) is not None:
            return (adapted,)
        if model in config.models and model != mine[0]:
            return (model,)
        if model not in config.models and model not in config.roles:
            barred = set(config.roles).difference(key.roles) if key is not None and key.roles else ()
            known = some_of(one for one in self.known_models() if one not in barred)
            raise UnknownModelError(
                f"model: {model[:80]!r} does not exist; use one of: {known}",
                param="model",
                internal="model: does not exist",
            )
        if key is None or caller.role in key.models:
            return mine
        allowed = tuple(one for one in mine if may_use(key, one, config))
        return allowed if mine[0] in allowed else allowed[:1]

    def _raised(self, role: str, first: str, models: Sequence[str], judged_by: str) -> bool:
        """Whether a cheaper variant would serve the role if it had not been demoted."""
        ladders = self._ladders
        return any(
            of == role
            and ladders.cost[variant] < ladders.cost[first]
            and parts_of(variant)[0] in models
            and ladders.verdict(variant, role, judged_by).outcome is Outcome.PASSED
            for variant, of in ladders.demoted
        )

    def has(self, variant: str, model: str) -> bool:
        """Whether its engines know the model: only of an adapter there is a doubt."""
        adapter = self._config.adapters.get(model)
        return adapter is None or not adapter.variants or variant in adapter.variants

    def _explicit(self, caller: Caller, asked: str) -> Choice:
        """The ladder of a variant that a client names: itself, then what is more precise and suits the
        role."""
        role, (model, _) = caller.role, parts_of(asked)
        ladder = self._ladders.within(role, (model,))
        lowest = caller.key.lowest if caller.key else None
        if lowest is not None and parts_of(lowest)[0] != model:
            lowest = None  # of another model it says nothing
        floor = lowest or next(iter(ladder), None)
        if floor is None:
            raise self._unproven(asked, role)
        above = self._ladders.above(ladder, asked) if ladder else ()
        if above and (asked, role) in self._ladders.demoted:
            return Choice(above, Reason.RAISED_DEMOTED, (model,), model)
        if precision(self._ladders.cards[asked]) < precision(self._ladders.cards[floor]):
            whose = f"role {role}" if lowest is None else "this key"
            raise PrecisionTooLowError(
                f"model: {asked} is less precise than {whose} allows; the cheapest that it may use is "
                f"{floor}",
                param="model",
            )
        return Choice((asked, *above), Reason.EXPLICIT_VARIANT, (model,), model)

    def _unproven(self, model: str, role: str) -> PrecisionTooLowError:
        """Of what a client names no served variant is known to be good enough, and there is no reference."""
        others = some_of(self._config.models_of(role))
        return PrecisionTooLowError(
            f"model: no variant of {model} that is served is known to be good enough for role {role}; name "
            f"the role, a model that may serve it ({others}), or another role",
            param="model",
        )

    def explain(self, caller: Caller, model: str) -> Explanation:
        """The same decision with all that was considered. Raises as ``route`` does, but NoReplicaError."""
        if model in self._providers:
            return Explanation(caller.role, model, (), Reason.PROVIDER)
        choice = self.choose(caller, model)
        ladders = self._ladders
        steps = []
        for variant in sorted(self._ladders.cards, key=lambda variant: ladders.cost[variant]):
            of, card = parts_of(variant)[0], self._ladders.cards[variant]
            if of not in choice.models:
                continue
            memory = card.memory_bytes(KV_TOKENS)
            speed = card.speed.tokens_per_s if card.speed else None
            verdict = ladders.verdict(variant, caller.role, choice.judged_by)
            said, why = verdict.outcome.value, verdict.reasons
            if (demoted := ladders.demoted.get((variant, caller.role))) is not None:
                said, why = "demoted", (demoted,)
            if variant == self._config.references[choice.judged_by]:
                said, why = "reference", ()
            steps.append(Step(variant, memory, speed, said, why))
        return Explanation(caller.role, model, choice.ladder, choice.reason, tuple(steps))
