"""``tiercel fleet plan``: which variants to serve where, by measured speeds and a traffic."""

from __future__ import annotations

import argparse
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from deploy.commands import add_command, add_json, file_to_write, print_json, say
from deploy.fleet.apply import apply
from deploy.fleet.choice import beside, candidates_of, ladders_of, targets, with_all_variants
from deploy.fleet.layouts import layouts
from deploy.fleet.plan import FleetPlan, rank
from deploy.fleet.show import format_plan, plan_as_json, plan_page
from deploy.fleet.traffic import (
    Traffic,
    TrafficError,
    default_traffic,
    read_traffic,
    traffic_from_metrics,
)
from deploy.machine import look
from deploy.placement import PlacementError
from gateway.config import Config, load_config

SESSIONS = 8
TIMEOUT_S = 10.0
"""For a gateway to tell its metrics."""


def add_fleet_plan(commands: Any) -> None:
    """The command, below ``tiercel fleet``."""
    planning = add_command(commands, "plan", plan, "which variants to serve where, by measured speeds")
    source = planning.add_mutually_exclusive_group()
    source.add_argument("--traffic", type=Path, help="a YAML file of what a session asks (docs/fleet.md)")
    source.add_argument("--from", dest="gateway", help="the URL of a gateway, whose traffic it is to be")
    planning.add_argument(
        "--sessions", type=int, help=f"at the same time (default: the traffic's, else {SESSIONS})"
    )
    planning.add_argument("--out", type=file_to_write, help="write a page with a picture, too")
    planning.add_argument("--apply", action="store_true", help="serve what was chosen: change the YAML file")
    add_json(planning)


def plan(options: argparse.Namespace) -> None:
    """Raises TrafficError, NoSpeedError, PlacementError, ConfigError or CardError."""
    config = load_config(options.config)
    traffic = _traffic(config, options)
    found, refused = best_layouts(config, traffic)
    if options.json:
        print_json(plan_as_json(found, traffic, refused))
    else:
        print(format_plan(found, traffic, refused))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(plan_page(found, traffic, refused), encoding="utf-8")
        say(f"written to {options.out}")
    if options.apply:
        served = found.chosen.layout.served
        for model, serve in apply(options.config, served).items():
            unused = (
                "" if any(one.startswith(f"{model}:") for one in served) else "; the plan has no use for it"
            )
            say(f"models.{model}.serve: {', '.join(serve)}{unused}")


def best_layouts(config: Config, traffic: Traffic) -> tuple[FleetPlan, dict[tuple[str, ...], str]]:
    """All layouts of the variants that are there, ranked, and why others do not fit."""
    everything = with_all_variants(config)
    ladders = {role: ladder for role, ladder in ladders_of(everything).items() if role in traffic.roles}
    fit, refused = layouts(candidates_of(everything), ladders, beside(everything), look(), traffic)
    if not fit:
        why = next(iter(refused.values()), "no variant passes for every role")
        raise PlacementError(f"nothing that serves every role fits on this machine: {why}")
    return rank(fit, traffic, targets(config)), refused


def _traffic(config: Config, options: argparse.Namespace) -> Traffic:
    if options.sessions is not None and options.sessions < 1:
        raise TrafficError(f"--sessions: {options.sessions} is less than 1; give how many run at a time")
    if options.traffic is not None:
        found = read_traffic(options.traffic, config.roles)
    elif options.gateway is not None:
        found = traffic_from_metrics(_metrics(options.gateway), config.roles, SESSIONS)
    else:
        found = default_traffic(config.roles, SESSIONS)
        one = next(iter(found.roles.values()))
        say(
            f"no traffic is given: one request of every role in a session, {one.prompt_tokens:.0f} tokens of "
            f"prompt and {one.answer_tokens:.0f} of answer (--traffic FILE, or --from URL, says otherwise)"
        )
    return found if options.sessions is None else found.model_copy(update={"sessions": options.sessions})


def _metrics(url: str) -> str:
    """What a gateway tells Prometheus. Raises TrafficError."""
    where = url.rstrip("/") + "/metrics"
    if not where.startswith(("http://", "https://")):
        raise TrafficError(f"--from: {url!r} is no URL of a gateway; give http://HOST:PORT")
    try:
        with urllib.request.urlopen(where, timeout=TIMEOUT_S) as answer:
            text: str = answer.read().decode()
    except (OSError, urllib.error.URLError, ValueError) as error:
        raise TrafficError(f"--from: {where} cannot be read: {error}") from None
    return text
