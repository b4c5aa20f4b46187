"""One frame of ``tiercel top``: tables of roles and of replicas, as wide as there is room."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deploy.commands.asking import GatewayClient, NoAnswerError
from deploy.commands.readings import (
    DEMOTED,
    KV_CACHE,
    MEMORY,
    QUEUE,
    Flow,
    Reading,
    bytes_text,
    comparable,
    flows,
    parse,
    percentiles_text,
    share_text,
)
from deploy.commands.status import state_text
from gateway.config import parts_of, variant_id

AROUND = 8
"""Lines of a frame that are neither roles nor replicas."""
BAD = {"DOWN", "FAILING"}
PAIRS, PAIR = ("p50/p95", "TTFT"), 11
"""Columns of two percentiles, and how wide they are."""


@dataclass(frozen=True)
class Look:
    """One look at the gateway."""

    reading: Reading
    pools: Mapping[str, Any]


def look(gateway: GatewayClient) -> Look:
    """Raises NoAnswerError or RefusedError."""
    text = gateway.text("/metrics")
    at = time.monotonic()
    pools = gateway.ask("/readiness", also=503).get("pools", {})
    try:
        return Look(parse(text, at), pools)
    except ValueError:
        raise NoAnswerError(f"{gateway.url}/metrics is no gateway's; give --url") from None


def frame(
    url: str, now: Look, before: Look | None, trouble: str = "", width: int = 80, height: int | None = None
) -> RenderableType:
    """What is shown at one moment. ``height``: lines that there is room for; the busiest roles are shown."""
    replicas = [(v, name, one) for v, pool in now.pools.items() for name, one in pool["replicas"].items()]
    models = {parts_of(variant)[0] for variant in now.pools}
    known = f"{models.pop()}:" if len(models) == 1 else ""
    found = None
    if before is not None and comparable(before.reading, now.reading):
        found = flows(before.reading, now.reading)
    parts: list[RenderableType] = [_head(url, found, width)]
    if trouble:
        parts.append(Text(trouble, style="bold red"))
    if found is None:
        why = "the gateway was started anew" if before is not None else "rates need a second one"
        parts += [Text(f"waiting for the next reading: {why}", style="yellow"), Text()]
    else:
        room = None if height is None else max(3, height - AROUND - len(replicas))
        parts += [*_roles(found, room, known), Text()]
    parts += [_replicas(replicas, now.reading, known), *_demoted(now.reading)]
    return Group(*parts)


def _head(url: str, found: Sequence[Flow] | None, width: int) -> Text:
    text = Text(f"tiercel top  {url}  {time.strftime('%H:%M:%S')}", style="bold")
    if found is not None:
        asked, errors = sum(one.requests for one in found), sum(one.errors for one in found)
        share = errors / asked if asked else 0.0
        text.append(f"  {asked:.1f} requests/s, ")
        text.append(f"{100 * share:.1f} % errors", style="bold red" if errors else "bold")
    text.truncate(width, overflow="ellipsis")
    return text


def _table(*numbers: str, names: Sequence[str]) -> Table:
    """Names to the left, which give way where there is no room, and numbers to the right."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    for name in names:
        table.add_column(name, overflow="ellipsis")
    for number in numbers:
        # As wide as most figures are, so that columns do not move from frame to frame.
        table.add_column(number, justify="right", no_wrap=True, min_width=PAIR if number in PAIRS else None)
    return table


def _name(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _roles(found: Sequence[Flow], room: int | None, known: str) -> Iterator[RenderableType]:
    """``known``: what names of variants begin with that need not be said."""
    busiest = sorted(found, key=lambda one: -one.requests)[:room]
    table = _table("req/s", "4xx/s", "5xx/s", "p50/p95", "TTFT", "tokens/s", names=("role", "variant"))
    for one in sorted(busiest, key=lambda one: (one.role, one.variant)):
        table.add_row(
            _name(one.role),
            _name(one.variant.removeprefix(known)),
            f"{one.requests:.1f}",
            f"{one.refused:.1f}",
            Text(f"{one.errors:.1f}", style="red" if one.errors else ""),
            percentiles_text(one.duration),
            percentiles_text(one.first_token),
            f"{one.tokens:.0f}",
            style="" if one.requests else "dim",
        )
    yield table if busiest else Text("no request has come yet")
    if left := len(found) - len(busiest):
        yield Text(f"… and {left} quieter", style="dim")


def _replicas(replicas: Sequence[tuple[str, str, Mapping[str, Any]]], reading: Reading, known: str) -> Table:
    table = _table("in flight", "queue", "KV cache", "memory", names=("replica", "state", "address"))
    for variant, name, one in replicas:
        queue, state = reading.of_replica(QUEUE, variant, name), state_text(one)
        table.add_row(
            _name(name.removeprefix(known)),
            _name(state, "red" if state in BAD else "green"),
            _name(one["url"]),
            str(one["in_flight"]),
            "-" if queue is None else f"{queue:.0f}",
            share_text(reading.of_replica(KV_CACHE, variant, name)),
            bytes_text(reading.of_replica(MEMORY, variant, name)),
        )
    return table


def _demoted(reading: Reading) -> Iterator[Text]:
    out = [dict(labels) for labels, value in reading.samples.get(DEMOTED, {}).items() if value]
    if out:
        names = ", ".join(f"{variant_id(one['model'], one['variant'])} as {one['role']}" for one in out)
        yield Text(f"demoted: {names} (tiercel watch says why)", style="yellow")
