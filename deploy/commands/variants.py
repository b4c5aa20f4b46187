"""``tiercel variants``: list, show, compare, use, delete, report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.commands import NOT_WELL, add_command, add_json, add_model, file_to_write, print_json, say
from deploy.models import checkpoint_of, one_model, registry_of, some_models, variant_of
from gateway.config import ModelConfig, load_config, variant_id
from quantize.card import Card, CardError, has_seal, read_card
from quantize.registry import Registry
from quantize.report.distributions import Distributions

COMMANDS = ("list", "show", "compare", "use", "delete", "report", "-h", "--help")
NAMED = "model:variant, or its name where one model alone has such"
DISTRIBUTION_SAMPLES = 8
"""Calibration conversations that activation distributions are taken from."""


def add_variants(parser: argparse.ArgumentParser) -> None:
    """The commands of ``tiercel variants``; ``list`` is the one when none is named."""
    commands = parser.add_subparsers(required=True, metavar="command")
    listing = add_command(commands, "list", list_variants, "every variant with its figures and verdicts")
    add_json(listing)
    showing = add_command(commands, "show", show, "one variant: what it is, what it lost, its versions")
    showing.add_argument("variant", help=NAMED)
    add_json(showing)
    comparing = add_command(commands, "compare", compare, "variants side by side")
    comparing.add_argument("variants", nargs="+", help=NAMED)
    add_json(comparing)
    using = add_command(commands, "use", use, "choose a version: roll back, or forward again")
    using.add_argument("variant", help=NAMED)
    using.add_argument("version", help="twelve hex digits, as `show` lists them")
    deleting = add_command(commands, "delete", delete, "delete a version, or a whole variant")
    deleting.add_argument("variant", help=NAMED)
    deleting.add_argument("version", nargs="?")
    reporting = add_command(commands, "report", report, "write one HTML file with pictures of all variants")
    reporting.add_argument("--out", type=file_to_write, default=Path("var/variants.html"))
    reporting.add_argument("--no-distributions", dest="distributions", action="store_false")
    add_model(listing, "all")
    for command in (showing, comparing, using, deleting, reporting):
        add_model(command)


def with_list(arguments: list[str]) -> list[str]:
    """``tiercel variants`` is short for ``tiercel variants list``."""
    if arguments[:1] == ["variants"] and (len(arguments) == 1 or arguments[1] not in COMMANDS):
        arguments.insert(1, "list")
    return arguments


def card_as_json(card: Card) -> dict[str, Any]:
    """The card with its version, which follows from its files."""
    return {"version": card.version, **card.model_dump(mode="json")}


def list_variants(options: argparse.Namespace) -> None:
    """Of all models, one after the other, unless one is named."""
    config = load_config(options.config)
    models = [(one, registry_of(one, say)) for one in some_models(config, options.model)]
    if not any(registry.variants() for _, registry in models):
        raise CardError(
            f"{models[0][0].variants_dir if len(models) == 1 else config.variants_dir} holds no variants; "
            "make them with `tiercel quantize`"
        )
    if options.json:
        print_json([one for model, registry in models for one in _listed(model, registry.cards())])
        return
    tables = [_table(model, registry, len(config.models) > 1) for model, registry in models]
    print("\n\n".join(text for text, _ in tables))
    for _, error in tables:
        for sentence in error:
            say(sentence)
    if any(error for _, error in tables):
        sys.exit(NOT_WELL)


def _listed(model: ModelConfig, cards: Sequence[Card]) -> list[dict[str, Any]]:
    old = stale_variants(model, cards)
    return [card_as_json(card) | {"stale": old[card.variant]} for card in cards]


def _table(model: ModelConfig, registry: Registry, several: bool) -> tuple[str, list[str]]:
    """The variants of a model whose cards can be read, and what is wrong with the others, a sentence each."""
    from quantize.report.tables import format_variants

    cards: list[Card] = []
    wrong = []
    for variant in registry.variants():
        try:
            cards.append(registry.card(variant))
        except CardError as error:
            wrong.append(str(error))
    named = f"{model.name}\n" if several else ""
    if not cards:
        none = "no variants" if not wrong else "no variants that can be read"
        return f"{named}{none}; make them with `tiercel quantize --model {model.name}`", wrong
    counts = {card.variant: len(registry.versions(card.variant)) for card in cards}
    table = format_variants(cards, counts, stale_variants(model, cards))
    return named + "\n".join(
        [table, *unsealed_lines(registry, cards), *waiting_lines(registry, cards)]
    ), wrong


def unsealed_lines(registry: Registry, cards: Sequence[Card]) -> list[str]:
    """Cards of which nobody can tell whether they were edited, a sentence each."""
    return [
        f"{card.variant}: its card has no seal, as older versions of Tiercel wrote none, so that nothing "
        f"shows whether it was edited; `tiercel quantize measure {card.variant}` judges it anew and seals it"
        for card in cards
        if card.evaluation is not None and not has_seal(registry.path(card.variant, card.version))
    ]


def stale_variants(model: ModelConfig, cards: Sequence[Card]) -> dict[str, tuple[str, ...]]:
    """Per variant how the engine that it was measured on differs from the one of this configuration.

    Empty where this machine has no engine environment: then nothing is measured here. Where its GPUs cannot
    be asked, which is said, nothing is known of it.
    """
    from deploy.identity import identity, identity_of
    from deploy.machine import look
    from quantize.core.gpus import GpuError
    from quantize.versions import stale

    try:
        machine = look()
    except GpuError as error:
        say(f"whether measurements are stale is not known: {error}")
        return {card.variant: () for card in cards}
    if "engine" not in identity(model, machine):
        return {card.variant: () for card in cards}
    return {card.variant: stale(card, identity_of(card, model, machine)) for card in cards}


def waiting_lines(registry: Registry, cards: Sequence[Card]) -> list[str]:
    """Newer versions that are not in use, a sentence each."""
    lines = []
    for card in cards:
        newest = registry.versions(card.variant)[-1]
        if read_card(registry.path(card.variant, newest)).created > card.created:
            lines.append(
                f"{card.variant}: a newer version {newest} is not in use; "
                f"`tiercel variants use {card.variant} {newest}` puts it to use"
            )
    return lines


def show(options: argparse.Namespace) -> None:
    from quantize.report.tables import format_card

    model, variant = variant_of(load_config(options.config), options.variant, options.model)
    registry = registry_of(model, say)
    card = registry.card(variant)
    versions, old = registry.versions(variant), stale_variants(model, [card])[variant]
    if options.json:
        print_json(card_as_json(card) | {"all_versions": versions, "stale": old})
    else:
        print(format_card(card, versions, old))


def compare(options: argparse.Namespace) -> None:
    from quantize.report.tables import format_comparison

    config = load_config(options.config)
    found = [variant_of(config, name, options.model) for name in options.variants]
    cards = [registry_of(model, say).card(variant) for model, variant in found]
    if options.json:
        print_json([card_as_json(card) for card in cards])
        return
    if len({card.model for card in cards}) > 1:  # then a variant's own name does not tell which it is
        whole = [{"variant": card.id, "reference": variant_id(card.model, card.reference)} for card in cards]
        cards = [card.model_copy(update=names) for card, names in zip(cards, whole, strict=True)]
    print(format_comparison(cards))


def use(options: argparse.Namespace) -> None:
    model, variant = variant_of(load_config(options.config), options.variant, options.model)
    card = registry_of(model, say).use(variant, options.version)
    say(f"{model.id(variant)} is now version {card.version}; a running `tiercel up` takes it over")


def delete(options: argparse.Namespace) -> None:
    model, variant = variant_of(load_config(options.config), options.variant, options.model)
    say(str(registry_of(model, say).delete(variant, options.version)))


def report(options: argparse.Namespace) -> None:
    from deploy.planning import known_controls, known_sensitivity
    from quantize.report.report import Report, write_report

    model = one_model(load_config(options.config), options.model)
    registry = registry_of(model, say)
    cards = registry.cards()
    if not cards:
        raise CardError(f"{model.variants_dir} holds no variants; make them with `tiercel quantize`")
    found = known_sensitivity(model)
    page = Report(
        model=model.name,
        cards=cards,
        controls=known_controls(model, cards),
        sensitivity=found.rows if found else (),
        distributions=_distributions(model, registry, cards) if options.distributions else {},
        kept=_kept(model, cards),
    )
    write_report(page, options.out)
    say(f"written to {options.out}")


def _kept(model: ModelConfig, cards: tuple[Card, ...]) -> tuple[str, ...]:
    """What no variant, or only a planned one, has below 16 bits."""
    from quantize.check import kept_rows
    from quantize.core.modules import read_modules
    from quantize.core.targets import detect, target

    modules = read_modules(checkpoint_of(model, say))
    least = min(card.weight_bytes for card in cards)
    return tuple(map(str, kept_rows(modules, target(detect()), least)))


def _distributions(
    model: ModelConfig, registry: Registry, cards: tuple[Card, ...]
) -> dict[str, Distributions]:
    """Of every variant whose layout is known; computed once per version."""
    from deploy.unlabelled import calibration_for
    from quantize.core.modules import read_modules
    from quantize.report.distributions import (
        Inputs,
        compute_distributions,
        load_distributions,
        save_distributions,
    )

    checkpoint = checkpoint_of(model, say)
    shown = [card for card in cards if card.schemes and card.variant != card.reference]
    modules = read_modules(checkpoint).holding({name for card in shown for name in card.schemes})
    made: dict[str, Distributions] = {}
    inputs = None
    for card in shown:
        path = registry.distributions_path(card)
        figures = load_distributions(path)
        if figures is None:
            say(f"{card.variant}: distributions of weights and activations")
            if inputs is None:
                version = registry.path(model.reference).name
                sequences = calibration_for(model, checkpoint, version).sequences
                inputs = Inputs(checkpoint, modules, sequences[:DISTRIBUTION_SAMPLES])
            figures = compute_distributions(
                checkpoint,
                modules,
                registry.path(card.variant),
                card.schemes,
                inputs,
                variant=card.variant,
                version=card.version,
            )
            save_distributions(figures, path)
        made[card.variant] = figures
    return made
