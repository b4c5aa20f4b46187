"""``tiercel quantize robustness`` and ``soak``: variants under what items are not. Both report and gate "
"nothing."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from deploy.commands import NOT_WELL, add_command, add_json, add_model, print_json, run_engines, say
from deploy.models import one_model, variant_of
from gateway.config import load_config
from quantize.evaluate.perturb import KINDS
from quantize.evaluate.tasks import TaskError


def add_stress(commands: Any) -> None:
    """The commands, below ``tiercel quantize``."""
    text = (
        "ask items with typos, noise, another domain around them, empty and extreme ones; what is lost more"
    )
    robust = add_command(commands, "robustness", robustness, text)
    add_model(robust)
    robust.add_argument("variants", nargs="*", help="which (default: those that are served)")
    robust.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of changes (default: all)"
    )
    robust.add_argument(
        "--role", action="append", default=[], help="of which role, repeatable (default: all)"
    )
    robust.add_argument("--items", type=int, default=60, help="of each role (60)")
    robust.add_argument("--seed", type=int, default=0, help="of the changes (0)")
    add_json(robust)

    text = "run one variant's engine for a while: does it become slower, larger, or answer otherwise?"
    long = add_command(commands, "soak", soak, text)
    add_model(long)
    long.add_argument("variant", help="model:variant, or its name where one model alone has such")
    long.add_argument("--minutes", type=float, default=10.0, help="how long (10)")
    add_json(long)


def robustness(options: argparse.Namespace) -> None:
    from deploy.robustness import format_robustness, measure_robustness

    model = one_model(load_config(options.config), options.model)
    if options.items < 1:
        raise TaskError(f"--items {options.items}: give 1 or more")
    variants = options.variants or [one for one in model.serve if one != model.reference]
    if not set(variants) - {model.reference, model.id(model.reference)}:
        raise TaskError(
            f"nothing but the reference {model.reference} would be asked; name variants that it is "
            "compared with"
        )
    found = run_engines(
        measure_robustness(
            model,
            [name.rpartition(":")[2] for name in variants],
            options.kinds,
            say,
            roles=options.role,
            count=options.items,
            seed=options.seed,
        )
    )
    if options.json:
        print_json(found)
    else:
        print(format_robustness(found))


def soak(options: argparse.Namespace) -> None:
    from deploy.soaking import format_soak, soak_variant

    model, variant = variant_of(load_config(options.config), options.variant, options.model)
    if not 0 < options.minutes <= 24 * 60:
        raise TaskError(f"--minutes {options.minutes:g}: give more than 0, and a day at most")
    found = run_engines(soak_variant(model, variant, options.minutes, say))
    if options.json:
        print_json(found)
    else:
        print(format_soak(found))
    if not found.well:
        sys.exit(NOT_WELL)
