"""The cards of the served variants, read at the start and at every reload."""

from __future__ import annotations

import logging

from gateway.config import Config, ModelConfig
from quantize.card import CARD_NAME, Card, CardError, read_card, refuse_broken
from quantize.versions import usable_version

logger = logging.getLogger(__name__)


def load_cards(config: Config) -> dict[str, Card]:
    """Card of every served variant, by ``model:variant``. Raises CardError when one cannot be used.

    In place of a version that its engine could not load, the newest one that passed a gate is used.
    """
    return {model.id(variant): _load(model, variant) for model in config.each() for variant in model.serve}


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
