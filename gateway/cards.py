"""The cards of the served variants: read at the start, at every reload, and when they have changed.

Whoever makes, measures or chooses versions writes cards and moves the link ``current``. The gateway looks at
both every few seconds, by what the file system says of them, and takes over what has become of them as it
does another configuration: whole, or not at all.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from gateway.config import Config, ConfigError, ModelConfig
from gateway.routing.ladders import untimed
from gateway.telemetry.logs import EVENTS
from quantize.card import CARD_NAME, CURRENT, Card, CardError, read_card, refuse_broken
from quantize.versions import usable_version

LOOK_EVERY_S = 3.0

Read = Callable[[], tuple[Config, Mapping[str, Card]]]
"""Reads a configuration and its cards. Raises ConfigError or CardError."""

logger = logging.getLogger(__name__)


def load_cards(config: Config) -> dict[str, Card]:
    """Card of every served variant, by ``model:variant``. Raises CardError when one cannot be used.

    In place of a version that its engine could not load, the newest one that passed a gate is used.
    """
    cards = {model.id(variant): _load(model, variant) for model in config.each() for variant in model.serve}
    if sentence := untimed(cards, config.gateway.cost):
        logger.warning("%s", sentence)
    return cards


def _load(model: ModelConfig, variant: str) -> Card:
    directory, sentence = usable_version(model.variants_dir, variant)
    if sentence:
        logger.warning("%s: %s", model.name, sentence)
    card = read_card(directory)
    path = directory / CARD_NAME
    if card.variant != variant:
        raise CardError(
            f"{path}: is the card of {card.variant!r}, not {variant!r}; rename the directory or make the "
            "variant again"
        )
    if card.model != model.name:
        raise CardError(
            f"{path}: is of the model {card.model!r}, not {model.name!r}; call the model so in the "
            "configuration, or make the variant again"
        )
    if card.reference != model.reference:
        raise CardError(
            f"{path}: was compared with {card.reference!r}, but the reference of {model.name} is "
            f"{model.reference!r}; make the variant again"
        )
    refuse_broken(card)
    return card


class CardWatch:
    """Looks whether cards have changed, and has them taken over."""

    def __init__(
        self,
        present: Callable[[], tuple[Config, Mapping[str, Card]]],
        apply: Callable[[Read], Awaitable[None]],
    ) -> None:
        """``present``: what is in use. ``apply`` reads and takes over; raises ConfigError or CardError, and
        then nothing has changed."""
        self._present = present
        self._apply = apply
        self._seen: Marks | None = None
        self._events = logging.getLogger(EVENTS)

    async def look(self) -> None:
        """Once. Cards that cannot be used are said once, and those before stay in use."""
        config, cards = self._present()
        marks = await asyncio.to_thread(marks_of, config)
        if marks == self._seen:
            return
        self._seen = marks  # taken before they are read: what is written meanwhile is seen the next time
        try:
            changed = await asyncio.to_thread(_changed, config, cards)
            if changed:
                await self._apply(self._read)
        except (ConfigError, CardError) as error:
            self._events.error("the cards have changed and cannot be used; those before stay: %s", error)
        else:
            if changed:
                self._events.info("the cards were read anew: %s", ", ".join(changed))

    def _read(self) -> tuple[Config, Mapping[str, Card]]:
        config, _ = self._present()
        return config, load_cards(config)


Marks = Mapping[str, tuple[object, ...]]
"""Variant to what the file system says of its versions and of the one in use."""


def marks_of(config: Config) -> Marks:
    """They are others whenever a card has been written or a link has been moved."""
    return {
        model.id(variant): _marks(model.variants_dir / variant)
        for model in config.each()
        for variant in model.serve
    }


def _marks(directory: Path) -> tuple[object, ...]:
    try:
        link: object = os.readlink(directory / CURRENT)
    except OSError:
        link = _mark(directory / CURRENT / CARD_NAME)
    try:
        names = sorted(entry.name for entry in os.scandir(directory))
    except OSError:
        names = []
    return (link, *((name, mark) for name in names if (mark := _mark(directory / name / CARD_NAME))))


def _mark(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _changed(config: Config, cards: Mapping[str, Card]) -> list[str]:
    """Variants whose cards are others by now, with their versions. Raises CardError."""
    return [
        f"{variant} {card.version}"
        for variant, card in load_cards(config).items()
        if card != cards.get(variant)
    ]
