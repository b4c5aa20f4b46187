"""``tiercel fleet``: where everything would run that ``tiercel up`` starts, before anything is started."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from deploy.commands import add_command, add_json, print_json, say
from deploy.commands.fleet_plan import add_fleet_plan
from deploy.engine import EngineSpec, command, need_of
from deploy.fleet.engines import placed_specs, served_here, without_ours
from deploy.machine import look
from gateway.config import load_config, shown_url
from gateway.config.section import Secret
from quantize.report.tables import align

COMMANDS = ("show", "plan", "-h", "--help")


def add_fleet(commands: Any) -> None:
    """``tiercel fleet`` alone shows; see :func:`with_placement`."""
    text = "where engines would run that `up` starts; which variants to serve where"
    kinds = commands.add_parser("fleet", help=text, description=text).add_subparsers(
        required=True, metavar="command"
    )
    text = "where every engine would run that `up` starts: device, memory, context, arguments; starts nothing"
    add_json(add_command(kinds, "show", fleet, text))
    add_fleet_plan(kinds)


def with_placement(arguments: Sequence[str]) -> list[str]:
    """``tiercel fleet`` is short for ``tiercel fleet show``."""
    given = list(arguments)
    if given[:1] == ["fleet"] and (len(given) == 1 or given[1] not in COMMANDS):
        given.insert(1, "show")
    return given


def fleet(options: argparse.Namespace) -> None:
    """Refuses what `up` refuses: a variant that is missing or broken, engines that do not fit."""
    config = load_config(options.config)
    versions = served_here(config, say)
    specs = placed_specs(config, versions, without_ours(look(), config.run_dir)) if versions else []
    elsewhere = {name: [shown_url(url) for url in config.pools[name]] for name in config.pools}
    if options.json:
        print_json({"engines": [described(spec) for spec in specs], "elsewhere": elsewhere})
    else:
        print(format_fleet(specs, elsewhere))


def described(spec: EngineSpec) -> dict[str, Any]:
    """One engine. Of its environment what its place gives it; what the configuration sets may be secret."""
    card, settings = spec.card, spec.settings
    return {
        "variant": spec.id,
        "version": card.version,
        "url": spec.url,
        "where": spec.placed.where,
        "gpus": list(spec.placed.gpus),
        "cores": list(spec.placed.cores),
        "memory_bytes": spec.placed.memory,
        "weight_bytes": card.weight_bytes,
        "kv_cache_bytes": need_of(card, spec.directory, settings).kv_bytes,
        "context": settings.context(card.max_model_len, card.kv_bytes_per_token),
        "env": dict(spec.placed.env),
        "arguments": list(Secret.OPTIONS.hide(tuple(command(spec)[2:]))),
        "log": str(spec.log),
    }


def format_fleet(specs: list[EngineSpec], elsewhere: dict[str, list[str]]) -> str:
    """A line per engine, then its arguments, then pools that are not started here."""
    rows = [["variant", "where", "memory", "weights", "KV cache", "context", "address", "version"]]
    arguments = []
    for one in map(described, specs):
        each = " on each" if len(one["gpus"]) > 1 else ""
        figures = [
            f"{one[name] / 2**30:.1f} GiB" for name in ("memory_bytes", "weight_bytes", "kv_cache_bytes")
        ]
        figures[0] += each
        rows.append(
            [one["variant"], one["where"], *figures, f"{one['context']:,}", one["url"], one["version"]]
        )
        env = " ".join(f"{name}={value}" for name, value in one["env"].items())
        arguments.append(f"{one['variant']}: {' '.join(filter(None, [env, *one['arguments']]))}")
    parts = (
        [align(rows), *arguments] if specs else ["no engine is started here: all served variants have pools"]
    )
    parts += [f"{name}: elsewhere, {', '.join(urls)}" for name, urls in elsewhere.items()]
    return "\n\n".join(parts)
