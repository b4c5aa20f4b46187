"""What of a variant's answers is tolerated: who is watched, by which rates, since which gate."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from gateway.config import Config, parts_of
from gateway.quality.cells import CellKey, DemotionPolicy
from gateway.quality.sequential import threshold
from quantize.card import Card

DEFAULT_RATES: Mapping[str, tuple[float, float]] = {
    "shadow": (0.05, 0.2),
    "regenerated": (0.1, 0.3),
    "signals": (0.1, 0.35),
    "rules": (0.02, 0.12),
    "judge": (0.1, 0.3),
}
"""Check to the tolerated and the alarming share, where neither the role nor the card says another one. The
rules for grounded answers have none: how often they are wrong depends on the role, which its card knows."""
BY_REFERENCE = ("shadow", "regenerated")
"""Checks that ask the reference."""

ENGINE = "(engine)"
"""What stands for the role in the cells of engines themselves."""
SAID: Mapping[str, tuple[float, float]] = {
    "first_token": (0.1, 0.5),
    "token_gap": (0.1, 0.5),
    "memory": (0.1, 0.5),
    "kv_cache": (0.1, 0.5),
    "preemptions": (0.1, 0.5),
}
"""Seconds to the first token and between tokens, bytes of an engine's processes, share of its KV cache, and
requests thrown out of it: a change for the worse is said, and nobody is demoted for it."""


@dataclass(frozen=True, slots=True)
class Watched:
    """What a configuration makes of the watch."""

    config: Config
    keys: Mapping[tuple[str, str], CellKey]
    """Of every variant in every role, but for the reference that the role's others are measured against."""
    engines: Mapping[str, CellKey]
    """Of every variant's engines."""
    policies: Mapping[CellKey, DemotionPolicy]
    gates: Mapping[str, str]
    """Variant to what changes whenever it has been judged anew."""

    @classmethod
    def of(cls, config: Config, cards: Mapping[str, Card]) -> Watched:
        """``cards``: of every served variant, by ``model:variant``, as which a cell's variant is named."""
        keys = {
            (variant, role): CellKey(variant=variant, version=card.version, role=role)
            for variant, card in cards.items()
            for role in config.roles
            if not _measures(config, variant, role)
        }
        engines = {
            variant: CellKey(variant=variant, version=card.version, role=ENGINE)
            for variant, card in cards.items()
        }
        policies = {key: policy_of(config, cards[variant], role) for (variant, role), key in keys.items()}
        policies |= dict.fromkeys(engines.values(), _policy(config, SAID, frozenset(SAID)))
        return cls(
            config, keys, engines, policies, {variant: gate_of(card) for variant, card in cards.items()}
        )


def _measures(config: Config, variant: str, role: str) -> bool:
    """Whether a variant is the reference to whose answers a role's others are held. That of a model which is
    not the role's first, and may serve it, is watched as others are, but not compared with itself."""
    model = parts_of(variant)[0]
    return variant == config.references[model] and model not in config.models_of(role)[1:]


def gate_of(card: Card) -> str:
    """Changes whenever a card has been evaluated and judged anew."""
    if card.evaluation is None:
        return ""
    return hashlib.sha256(card.evaluation.model_dump_json().encode()).hexdigest()[:16]


def policy_of(config: Config, card: Card, role: str) -> DemotionPolicy:
    """What is tolerated of a variant in a role: what the role says, else what the gate accepted, else a
    default.

    The gate has counted how many of the variant's answers differ from the reference's on held-out items. The
    watch asks less of an answer than to be the same, so that share is tolerated, and 15 points more alarms.
    """
    compared = config.watch.compares and card.variant != card.reference
    rates = {name: one for name, one in DEFAULT_RATES.items() if compared or name not in BY_REFERENCE}
    figures = card.evaluation.roles.get(role) if card.evaluation else None
    if figures is not None:
        for check in BY_REFERENCE if compared else ():
            rates[check] = _wider(rates[check], 1 - figures.agreement)
        if figures.grounded is not None:
            lowest = (0.05, 0.2)
            rates["grounded"] = _wider(lowest, 1 - figures.grounded.good / figures.grounded.items)
    own = config.roles[role].rates
    rates.update({name: one for name, one in own.items() if compared or name not in BY_REFERENCE})
    return _policy(config, rates, compared=compared)


def _wider(least: tuple[float, float], accepted: float) -> tuple[float, float]:
    tolerated = min(0.5, max(least[0], accepted))
    return tolerated, max(least[1], min(0.9, tolerated + 0.15))


def _policy(
    config: Config,
    rates: Mapping[str, tuple[float, float]],
    said: frozenset[str] = frozenset(),
    *,
    compared: bool = False,
) -> DemotionPolicy:
    settings = config.watch
    return DemotionPolicy(
        alarm=threshold(settings.answers_per_false_alarm, len(rates)),
        agree=settings.agree,
        rates=rates,
        compared=compared,
        said=said,
        probation_after_s=settings.probation_after_s,
        alpha=0.05,
        beta=0.01,
    )
