"""Rows of a comparison for what gates nothing: tests, likeness of texts, distances of distributions."""

from __future__ import annotations

from collections.abc import Sequence

from quantize.card import Card, RoleEvaluation
from quantize.core.reported_figures import Beside

NOTHING = "-"


def reported_rows(cards: Sequence[Card], role: str) -> list[list[str]]:
    """The head of each row, then a text for each card; rows of which no card knows anything are left out."""
    figures = [card.evaluation.roles.get(role) if card.evaluation else None for card in cards]
    own = [card.variant == card.reference for card in cards]
    texts = dict.fromkeys(name for one in figures if one and one.reported for name in one.reported.texts)
    rows = [
        ["McNemar p", *(NOTHING if mine else _mcnemar(one) for one, mine in zip(figures, own, strict=True))],
        ["log-probability", *(_scores(one, mine) for one, mine in zip(figures, own, strict=True))],
        *(
            [name, *(_text(one, name, mine) for one, mine in zip(figures, own, strict=True))]
            for name in texts
        ),
        [
            "distances",
            *(NOTHING if mine else _distances(one) for one, mine in zip(figures, own, strict=True)),
        ],
    ]
    return [[f"{role}: {head}", *cells] for head, *cells in rows if any(cell != NOTHING for cell in cells)]


def _mcnemar(one: RoleEvaluation | None) -> str:
    return NOTHING if one is None else _p(one.mcnemar_p)


def _scores(one: RoleEvaluation | None, own: bool) -> str:
    return NOTHING if one is None or one.reported is None else _beside(one.reported.scores, own)


def _text(one: RoleEvaluation | None, name: str, own: bool) -> str:
    found = one.reported.texts.get(name) if one and one.reported else None
    return NOTHING if found is None else _beside(found, own)


def _beside(found: Beside, own: bool) -> str:
    """The variant's mean, the reference's, and both tests' p."""
    if own:
        return f"{found.reference:.3f}"
    tests = [("Wilcoxon", found.wilcoxon_p), ("t", found.t_p)]
    told = ", ".join(f"{name} {_p(p)}" for name, p in tests if p is not None)
    return f"{found.variant:.3f}, reference {found.reference:.3f}" + (f" (p: {told})" if told else "")


def _distances(one: RoleEvaluation | None) -> str:
    if one is None or one.reported is None:
        return NOTHING
    found = one.reported
    return (
        f"answers JS {found.js_answers:.3f}, scores W {found.wasserstein_scores:.3g} nats, "
        f"words W {found.wasserstein_words:.3g}"
    )


def _p(p: float) -> str:
    return f"{p:.2g}" if p >= 1e-4 else "< 0.0001"
