"""Ladders: which variants may serve a role, the first choice first.

The ladder of a role has every variant, of all models that may serve the role, that is known to be good enough
for it: of the role's first model by its own gate, of another model by right answers to the same items as the
first model's reference. The cheapest comes first; last comes the first model's reference or, where that is
not served, the most precise variant that passes. A request goes up a ladder and never down.

A ladder of one model alone is for requests that may not, or do not want to, be served by the role's first
model: variants of that model that pass the role's budget beside their own reference, which comes last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from gateway.config import Config, ConfigError, Cost, parts_of
from quantize.card import Card, Outcome, Verdict
from quantize.gate.judgement import judge_across

KV_TOKENS = 65_536
"""Tokens in the KV cache at which the memory of variants is compared: a busy engine."""

Ladder = tuple[str, ...]
"""Variants by ``model:variant``."""


def precision(card: Card) -> tuple[bool, int, int]:
    """Sort key among the variants of one model, higher is more precise: the reference, then weight bits, then
    bits of the KV cache."""
    kv = card.kv
    kv_bits = 4 if "int4" in kv or "fp4" in kv else 8 if "8" in kv else 16
    return card.variant == card.reference, card.weight_bits, kv_bits


def costs(cards: Mapping[str, Card], by: Cost) -> dict[str, float]:
    """What serving with each variant costs: bytes, or bytes times seconds per token.

    A variant that nobody has timed counts as slow as the slowest that was, so that it is never chosen for its
    speed; where none was timed, bytes alone decide (:func:`untimed`).
    """
    memory = {variant: float(card.memory_bytes(KV_TOKENS)) for variant, card in cards.items()}
    rates = {variant: card.speed.tokens_per_s for variant, card in cards.items() if card.speed}
    if by is Cost.MEMORY or not rates:
        return memory
    slowest = min(rates.values())
    return {variant: memory[variant] / rates.get(variant, slowest) for variant in cards}


def untimed(cards: Mapping[str, Card], by: Cost) -> str:
    """Of which variants no time is known where it is to count, as a sentence; empty where there are none."""
    unknown = sorted(variant for variant, card in cards.items() if card.speed is None)
    if by is Cost.MEMORY or not unknown:
        return ""
    count = (
        "bytes alone decide" if len(unknown) == len(cards) else "the slowest known speed is taken for them"
    )
    return (
        f"gateway.cost: memory_time: the speed of {', '.join(unknown)} was not measured, {count}; "
        "`tiercel quantize measure` measures it where the engine's context holds its requests"
    )


class Ladders:
    """All ladders of a configuration. ``cards``: of every served variant, by ``model:variant``."""

    def __init__(self, config: Config, cards: Mapping[str, Card]) -> None:
        """Raises ConfigError for a role that no served variant is known to be good enough for."""
        self._config = config
        self.cards = cards
        self.cost = costs(cards, config.gateway.cost)
        self.demoted: Mapping[tuple[str, str], str] = {}
        """(variant, role) to why it must not serve the role."""
        self._verdicts: dict[tuple[str, str, str], Verdict] = {}
        self._of_roles = {role: self._of_role(role) for role in config.roles}
        for role, ladder in self._of_roles.items():
            if not ladder:
                raise ConfigError(self._unserved(role))

    def avoid(self, demoted: Mapping[tuple[str, str], str]) -> bool:
        """Leave variants out; whether that changes anything. The last one that passes for a role stays."""
        known = {key: why for key, why in demoted.items() if key[0] in self.cards}
        if known == self.demoted:
            return False
        self.demoted = known
        self._of_roles = {role: self._of_role(role) for role in self._config.roles}
        return True

    def of_role(self, role: str) -> Ladder:
        """Never empty."""
        return self._of_roles[role]

    def within(self, role: str, models: Sequence[str]) -> Ladder:
        """The ladder for a request that only ``models`` may serve: the role's own, as far as it is of these,
        if the role's first model is among them; else that of ``models[0]`` alone. It is empty where the
        reference is not served and no variant passes."""
        if self._config.models_of(role)[0] in models:
            ladder = tuple(one for one in self._of_roles[role] if parts_of(one)[0] in models)
            if ladder:
                return ladder
        return self.alone(role, models[0])

    def alone(self, role: str, model: str) -> Ladder:
        """The ladder of one model alone."""
        return self._ladder(role, (model,), lambda variant: self.verdict(variant, role, model))

    def verdict(self, variant: str, role: str, first: str | None = None) -> Verdict:
        """Whether a variant is good enough beside the reference of a model; default: the role's first."""
        first = first or self._config.models_of(role)[0]
        known = self._verdicts.get((variant, role, first))
        if known is None:
            budget = self._config.roles[role].budget
            known = self._verdicts[variant, role, first] = judge_across(
                self.cards[variant], role, budget, first
            )
        return known

    def above(self, ladder: Ladder, first: str, *, strictly: bool = False) -> Ladder:
        """What a request goes up to from a variant, which need not be on the ladder: of its own model what is
        at least as precise (``strictly``: more precise), of other models what costs more, and the last."""
        least, model = precision(self.cards[first]), parts_of(first)[0]

        def higher(variant: str) -> bool:
            if parts_of(variant)[0] != model:
                return variant == ladder[-1] or self.cost[variant] > self.cost[first]
            found = precision(self.cards[variant])
            return found > least if strictly else found >= least

        return tuple(variant for variant in ladder if variant != first and higher(variant))

    def _of_role(self, role: str) -> Ladder:
        models = self._config.models_of(role)
        return self._ladder(role, models, lambda variant: self.verdict(variant, role))

    def _ladder(self, role: str, models: Sequence[str], verdict: Callable[[str], Verdict]) -> Ladder:
        """Of ``models``, of which the first one's reference comes last."""
        reference = self._config.references[models[0]]
        passing = [
            variant
            for variant in self.cards
            if variant != reference
            and parts_of(variant)[0] in models
            and verdict(variant).outcome is Outcome.PASSED
        ]
        healthy = [variant for variant in passing if (variant, role) not in self.demoted]
        if reference in self.cards:
            last = reference
        elif passing:
            last = max(healthy or passing, key=lambda one: self._order(one, models))
        else:
            return ()
        cheaper = [v for v in healthy if v != last and self.cost[v] < self.cost[last]]
        return (*sorted(cheaper, key=lambda variant: self.cost[variant]), last)

    def _order(self, variant: str, models: Sequence[str]) -> tuple[int, tuple[bool, int, int]]:
        """The most precise one where no reference is served: of the earliest model that has any."""
        return -models.index(parts_of(variant)[0]), precision(self.cards[variant])

    def _unserved(self, role: str) -> str:
        models = self._config.models_of(role)
        reference = self._config.references[models[0]]
        model, short = parts_of(reference)
        return (
            f"roles.{role}: the reference {reference} is not served, and no other variant is known to be "
            f"good enough ({'; '.join(self._failures(role, models))}); run `tiercel quantize` so that one "
            f"passes, change the role's budget, or add {short} to models.{model}.serve"
        )

    def _failures(self, role: str, models: Sequence[str]) -> list[str]:
        return [
            f"{variant}: {self.verdict(variant, role).reasons[0]}"
            for variant in self.cards
            if parts_of(variant)[0] in models
        ]
