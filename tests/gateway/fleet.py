"""A fleet of two models: ``big``, by which roles are measured, and ``small``, which may serve some."""

from __future__ import annotations

from typing import Any

from gateway_stack import by_id, make_card

from quantize.card import Card, Paired

MODELS: dict[str, Any] = {
    "big": {"path": "big", "serve": ("bf16", "int8")},
    "small": {"path": "small", "serve": ("bf16", "int4"), "engine": {"max_model_len": 512}},
}
ROLES: dict[str, Any] = {
    "core": {},
    "writer": {"models": ("big", "small")},
    "tagger": {"models": ("small",)},
}


def paired(lost: int) -> Paired:
    """Of a thousand answers, of which the first model's reference has 950 right."""
    return Paired(
        items=1000,
        good=950 - lost,
        reference_good=950,
        flips_to_bad=lost,
        flips_to_good=0,
        mcnemar_p=1.0,
    )


def across(card: Card, lost: int) -> Card:
    """The card with what it loses, in the role ``writer``, against the reference of ``big``."""
    assert card.evaluation is not None
    role = card.evaluation.roles["writer"].model_copy(update={"across": {"big": paired(lost)}})
    roles = {**card.evaluation.roles, "writer": role}
    return card.model_copy(update={"evaluation": card.evaluation.model_copy(update={"roles": roles})})


def cards_of(lost: int | None = 0) -> dict[str, Card]:
    """``lost``: right answers of ``small`` that ``big`` would have got, of a thousand; None: not compared."""
    small = [
        make_card("bf16", model="small", passes=("writer", "tagger"), weight_bytes=2_000_000),
        make_card("int4", model="small", passes=("writer", "tagger"), weight_bits=4, weight_bytes=600_000),
    ]
    if lost is not None:
        small = [across(card, lost) for card in small]
    return by_id(
        make_card("bf16", model="big", weight_bytes=16_000_000),
        make_card("int8", model="big", passes=("writer",), weight_bits=8, weight_bytes=9_000_000),
        *small,
    )


QUANTIZED: dict[str, Any] = {
    "big": {"path": "big", "serve": ("int8", "int4")},
    "small": {"path": "small", "serve": ("int4",)},
}


def quantized(*passing: str) -> dict[str, Card]:
    cards = [
        make_card("int8", model="big", weight_bits=8, weight_bytes=9_000_000, passes=passing),
        make_card("int4", model="big", weight_bits=4, weight_bytes=5_000_000, passes=passing),
        make_card("int4", model="small", weight_bits=4, weight_bytes=600_000, passes=("tagger", "writer")),
    ]
    return by_id(*cards[:2], across(cards[2], 0))
