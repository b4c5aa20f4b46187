"""What the cards say of each variant for each role: quality beside speed."""

from __future__ import annotations

from typing import Any

from benchmarks.agents.traces import AUXILIARY, CORE
from deploy.models import registry_of
from gateway.config import Config
from quantize.card import Card


def quality_of(config: Config) -> dict[str, dict[str, dict[str, Any]]]:
    """By variant of the first model and role: KL (nats per token), the share of tokens whose first choice is
    the reference's, and whether the role's gate was passed. The reference has a KL of 0 by definition."""
    registry = registry_of(next(iter(config.each())))
    return {
        name: {role: _of(registry.card(name), role) for role in (CORE, AUXILIARY)}
        for name in registry.variants()
    }


def _of(card: Card, role: str) -> dict[str, Any]:
    if card.variant == card.reference:
        return {"kl": 0.0, "first_choice_agreement": 1.0, "outcome": "reference", "reasons": []}
    evaluated = card.evaluation.roles.get(role) if card.evaluation else None
    verdict = card.gate.get(role)
    return {
        "kl": evaluated.text.kl_mean if evaluated else None,
        "first_choice_agreement": evaluated.text.top1_agreement if evaluated else None,
        "outcome": verdict.outcome.value if verdict else "not judged",
        "reasons": list(verdict.reasons) if verdict else [],
    }
