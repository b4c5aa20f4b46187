"""The cards of the served variants, read once at start-up."""

from __future__ import annotations

import logging

from gateway.config import Config
from quantize.card import CARD_NAME, Card, CardError, read_card, refuse_broken
from quantize.versions import usable_version

logger = logging.getLogger(__name__)


def load_cards(config: Config) -> dict[str, Card]:
    """Card of every served variant, by variant name. Raises CardError when one cannot be used.

    In place of a version that its engine could not load, the newest one that passed a gate is used.
    """
    cards = {}
    for variant in config.serve:
        directory, sentence = usable_version(config.variants_dir, variant)
        if sentence:
            logger.warning(sentence)
        card = read_card(directory)
        if card.variant != variant:
            raise CardError(
                f"{directory / CARD_NAME}: is the card of {card.variant!r}, not {variant!r}; "
                "rename the directory or make the variant again"
            )
        if card.reference != config.reference:
            raise CardError(
                f"{directory / CARD_NAME}: was compared with {card.reference!r}, but the reference is "
                f"{config.reference!r}; make the variant again"
            )
        refuse_broken(card)
        cards[variant] = card
    return cards
