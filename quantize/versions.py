"""Which of a variant's versions is used: one that loads, and that passed where another one did.

Light, since the gateway chooses by it as well. :class:`quantize.registry.Registry` changes what is in use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from quantize.card import VERSION, Card, CardError, read_card, variant_directory


def usable_version(variants_dir: Path, variant: str) -> tuple[Path, str]:
    """Where the version of ``variant`` lies that is to be served, and a sentence when it is not ``current``.

    A version in use that its engine could not load, or that is missing, is replaced by the newest one that
    passed a gate. Where there is none, it is the version in use, whatever its state. Raises CardError.
    """
    directory = variant_directory(variants_dir, variant)
    try:
        card = read_card(directory)
    except CardError as error:
        why = str(error)
    else:
        if card.state == "ready":
            return directory, ""
        why = f"its engine could not load it ({card.engine_words})"
    passing = [place for place in _versions(directory.parent) if place != directory]
    if not passing:
        return directory, ""
    newest = max(passing, key=lambda place: read_card(place).created)
    return (
        newest,
        f"{variant}: version {newest.name}, which passed, is used instead of {directory.name}: {why}",
    )


def _versions(directory: Path) -> list[Path]:
    """Versions of a variant that loaded and passed a gate."""
    found = []
    for place in directory.iterdir() if directory.is_dir() else ():
        if VERSION.fullmatch(place.name):
            with contextlib.suppress(CardError):
                card = read_card(place)
                if card.state == "ready" and card.passed:
                    found.append(place)
    return found


def stale(card: Card, identity: Mapping[str, str]) -> tuple[str, ...]:
    """How the engine that ``card`` was measured on differs from the one at hand, a text per difference.

    ``identity`` describes an engine in the same words as ``Evaluation.engine``. Empty without a measurement.
    """
    if card.evaluation is None:
        return ()
    measured = card.evaluation.engine
    return tuple(
        f"{name} {measured.get(name, 'unknown') or 'none'}, now {now or 'none'}"
        for name, now in identity.items()
        if measured.get(name, "") != now
    )


def is_proven(card: Card) -> bool:
    """A version that passed, of a variant or of the reference, which always does once it was measured."""
    return card.state == "ready" and bool(card.passed)


def why_kept(current: Card, card: Card) -> str:
    """Why ``current`` is kept in use beside a judged ``card``, or an empty string."""
    if not is_proven(current):
        return "it did not load" if card.state == "broken" and current.state == "ready" else ""
    if card.state == "broken":
        return "it did not load"
    lost = sorted(current.passed - card.passed)
    return f"it does not pass for {', '.join(lost)}, for which {current.version} passes" if lost else ""
