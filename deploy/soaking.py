"""``tiercel quantize soak``: one variant's engine for a while, alone on the machine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import psutil

from deploy.making import role_tasks
from deploy.models import registry_of
from deploy.unlabelled import ask_reference, variant_engine
from gateway.config import ModelConfig
from gateway.telemetry.engines import resident_bytes
from quantize.evaluate.client import EngineClient
from quantize.evaluate.robustness import chosen_items
from quantize.evaluate.soak import DRIFT, LEAK, Slope, Soak, soak

Say = Callable[[str], None]
PROBES = 8
"""Items, of all roles together, that are asked again and again."""


async def soak_variant(model: ModelConfig, variant: str, minutes: float, say: Say) -> Soak:
    """Raises CardError, TaskError, EngineStartError and PlacementError."""
    registry = registry_of(model, say)
    card = registry.card(variant)
    await ask_reference(model, say)
    tasks = role_tasks(model)
    each = max(1, PROBES // len(tasks))
    probes = [item for items in tasks.values() for item in chosen_items(items, each)][:PROBES]
    async with (
        registry.measuring(),
        variant_engine(model, card, say) as spec,
        EngineClient(spec.url, card.model) as client,
    ):
        pid = _pid_of(str(spec.port))
        say(f"{card.id}: {minutes:g} minutes")
        return await soak(
            client, probes, card.id, 60 * minutes, lambda: resident_bytes(pid) if pid is not None else None
        )


def _pid_of(port: str) -> int | None:
    """The engine among this process's children: the one that was told the port."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if port in child.cmdline():
                return int(child.pid)
    return None


def format_soak(found: Soak) -> str:
    """What was seen, a line each, and whether anything drifts."""
    lines = [
        f"{found.variant}: {found.seconds / 60:.1f} minutes, {found.rounds} rounds, {found.tokens:,} tokens "
        "written",
        _line("a round", found.round_s, 1.0, "s", DRIFT),
        _line("memory", found.memory, 1e6, "MB", LEAK),
    ]
    asked = found.probes * found.passes
    if asked:
        lines.append(f"probes: {found.changed} of {asked} answers were not those of the first pass")
    else:
        lines.append("probes: asked once, so nothing is known of changes; run for longer")
    lines.append("nothing drifts" if found.well else "something drifts")
    return "\n".join(lines)


def _line(what: str, slope: Slope | None, unit: float, name: str, least: float) -> str:
    if slope is None:
        return f"{what}: too few rounds for a slope, or not to be read; run for longer"
    rate = (
        f"{slope.per_hour / unit:+.3g} {name} an hour ({slope.low / unit:+.3g} to {slope.high / unit:+.3g})"
    )
    shown = f"; grows by {100 * slope.over_run:.1f} % over the run" if slope.shows(least) else ""
    return f"{what}: {slope.median / unit:.4g} {name}, {rate}{shown}"
