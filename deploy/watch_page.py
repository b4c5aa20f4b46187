"""What the watch knows as a page and as text: charts over time with intervals, events, every check's
figures."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from typing import Any

from gateway.quality.rates import ENGINE
from quantize.gate.judgement import wilson_interval
from quantize.report.figures import Scale, draw_line, draw_path, draw_text, svg
from quantize.report.page import PALETTE, document, table
from quantize.report.tables import align

MOST_POINTS = 60
VALUES = ("signals", "divergence")
"""Checks that have values instead of failures."""
WIDTH, HEIGHT = 760, 260
EVENT_COLOURS = {"demoted": "var(--bad)", "restored": "var(--good)", "failed_probation": "var(--bad)"}

STYLE = """
.wide { overflow-x: auto; } .wide svg { min-width: 34rem; }
figure { margin-bottom: .8rem; }
section > p { margin: 0 0 .8rem; max-width: 60rem; }
"""


@dataclass(frozen=True)
class Share:
    """So many of so many within a stretch of time. Seconds from the chart's beginning."""

    at: float
    part: int
    whole: int

    @property
    def value(self) -> float:
        return self.part / self.whole


@dataclass(frozen=True)
class Mark:
    """Something that happened."""

    at: float
    what: str
    colour: str = "var(--muted)"


def gathered(points: Sequence[Share], most: int = MOST_POINTS) -> list[Share]:
    """Neighbours added up until at most ``most`` are left; stretches without anything are left out."""
    points = sorted((point for point in points if point.whole), key=lambda point: point.at)
    step = max(1, -(-len(points) // most))
    made = []
    for first in range(0, len(points), step):
        some = points[first : first + step]
        made.append(
            Share(some[len(some) // 2].at, sum(one.part for one in some), sum(one.whole for one in some))
        )
    return made


def over_time(
    lines: Mapping[str, Sequence[Share]], marks: Sequence[Mark], title: str, unit: str, width: int = WIDTH
) -> str:
    """Shares over time with their 95 % intervals (Wilson) as bands; events as upright lines."""
    lines = {name: gathered(points) for name, points in lines.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    times = [point.at for points in lines.values() for point in points] + [mark.at for mark in marks]
    x = Scale(min(times), max(*times, min(times) + 1), 46, width - 12)
    y = Scale(0, 1, HEIGHT - 46, 30)
    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts += [draw_line(x.start, y(tick), x.end, y(tick))]
        parts += [draw_text(x.start - 8, y(tick) + 4, f"{100 * tick:.0f} %", "end")]
    for tick in x.ticks():
        parts.append(draw_text(x(tick), y.start + 18, f"{tick:g}", "middle"))
    parts.append(draw_text((x.start + x.end) / 2, HEIGHT - 6, f"time, {unit}", "middle"))
    for number, mark in enumerate(sorted(marks, key=lambda mark: mark.at)):
        at = x(mark.at)
        parts.append(draw_line(at, y.end, at, y.start, mark.colour, 'stroke-dasharray="4 3"'))
        left = at < width * 0.7  # words on the side where there is room
        height = y.end + 12 + 14 * (number % 4)
        parts.append(draw_text(at + 4 if left else at - 4, height, mark.what, "start" if left else "end"))
    step = (width - 70) / max(4, len(lines))
    for number, (name, points) in enumerate(lines.items()):
        colour = PALETTE[number % len(PALETTE)]
        for run in _runs(points):
            bands = [wilson_interval(point.part, point.whole) for point in run]
            edge = [(x(p.at), y(high)) for p, (_, high) in zip(run, bands, strict=True)]
            edge += [(x(p.at), y(low)) for p, (low, _) in reversed(list(zip(run, bands, strict=True)))]
            d = "M" + " L".join(f"{px:.1f} {py:.1f}" for px, py in edge) + "z"
            parts.append(f'<path d="{d}" fill="{colour}" stroke="{colour}" opacity=".18"/>')
            parts.append(draw_path([(x(p.at), y(p.value)) for p in run], colour, 'stroke-width="2"'))
            if len(run) == 1:
                parts.append(
                    f'<circle cx="{x(run[0].at):.1f}" cy="{y(run[0].value):.1f}" r="3" fill="{colour}"/>'
                )
        parts.append(
            f'<rect x="{60 + step * number:.0f}" y="6" width="12" height="12" rx="2" fill="{colour}"/>'
            + draw_text(77 + step * number, 16, name, colour="--ink")
        )
    return svg(width, HEIGHT, title, parts)


def _runs(points: Sequence[Share]) -> list[list[Share]]:
    """Stretches without a gap of more than four times what is common between neighbours."""
    gaps = sorted(b.at - a.at for a, b in itertools.pairwise(points))
    common = gaps[len(gaps) // 2] if gaps else 0.0
    runs = [[points[0]]]
    for before, point in itertools.pairwise(points):
        if point.at - before.at > 4 * common:
            runs.append([])
        runs[-1].append(point)
    return runs


def charts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Per variant and role with outcomes: a title, and the share of bad answers by check over time."""
    made = []
    for cell in report["cells"]:
        who = (cell["variant"], cell["version"], cell["role"])
        mine = [b for b in report["buckets"] if (b["variant"], b["version"], b["role"]) == who]
        if not mine:
            continue
        now = report["time"]
        lines: dict[str, list[Share]] = {}
        if cell["role"] == ENGINE:
            continue
        for bucket in mine:
            if bucket["check"] not in VALUES:
                minutes = (bucket["start"] - now) / 60
                lines.setdefault(bucket["check"], []).append(Share(minutes, bucket["bad"], bucket["answers"]))
        marks = [
            Mark((event["time"] - now) / 60, event["kind"], EVENT_COLOURS.get(event["kind"], "var(--muted)"))
            for event in report["events"]
            if (event["variant"], event["version"], event["role"]) == who
            and event["time"] >= mine[0]["start"]
        ]
        title = f"{cell['variant']} as {cell['role']}: share of answers that fail, by check"
        drawn = over_time(lines, marks, title, "minutes from now")
        made.append((title, drawn))
    return made


def render_watch(report: Mapping[str, Any], more: str = "") -> str:
    """The page as text; ``more`` is HTML that comes before the table."""
    drawn = "".join(
        f'<figure class="wide"><h3>{escape(title)}</h3>{picture}</figure>'
        for title, picture in charts(report)
    )
    happened = [["time (UTC)", "what", "variant", "role", "why"]] + [
        [
            datetime.fromtimestamp(event["time"], UTC).strftime("%Y-%m-%d %H:%M:%S"),
            event["kind"].replace("_", " "),
            event["variant"],
            event["role"],
            event["why"],
        ]
        for event in report["events"]
    ]
    body = f"""<header><h1>Do the quantized agents still tell the truth?</h1>
<p>{datetime.fromtimestamp(report["time"], UTC):%Y-%m-%d %H:%M} UTC. Two checks must agree before a variant is
taken out of a role's choice; one alone is not enough evidence.</p></header>
{more}
<section><h2>Over time</h2><p>Bands are 95 % intervals of each stretch of time.</p>{
        drawn or "<p>No answers yet.</p>"
    }</section> <section><h2>Now</h2>{table(rows(report))}</section>
<section><h2>Events</h2>{table(happened) if len(happened) > 1 else "<p>Nothing has happened.</p>"}</section>
<footer>Shares hold at all times together with 95 % (confidence sequences, corrected for the number of
variants and roles). Evidence is the CUSUM's, in nats; at the alarm's level a check alarms.</footer>"""
    return document("Tiercel: the watch", body, STYLE)


def rows(report: Mapping[str, Any]) -> list[list[str]]:
    """A line per variant, role and check that has been looked at."""
    made = [
        ["variant", "role", "verdict", "check", "answers", "fail", "95 %, always", "tolerated", "evidence"]
    ]
    for cell in report["cells"]:
        shown = {name: one for name, one in cell["checks"].items() if one["answers"]} or {"": None}
        for name, one in shown.items():
            line = [cell["variant"], cell["role"], cell["verdict"], name or "-"]
            if one is None:
                made.append([*line, "0", "-", "-", "-", "-"])
                continue
            limit = "-" if one["tolerated"] is None else f"{100 * one['tolerated']:.1f} %"
            grown = "-" if one["alarm"] is None else f"{one['evidence']:.1f} of {one['alarm']:.1f}"
            between = f"{100 * one['low']:.1f} to {100 * one['high']:.1f} %"
            made.append([*line, str(one["answers"]), f"{100 * one['share']:.1f} %", between, limit, grown])
    return made


def format_watch(report: Mapping[str, Any]) -> str:
    """For a terminal."""
    lines = [align(rows(report))]
    for event in report["events"][:20]:
        when = datetime.fromtimestamp(event["time"], UTC).strftime("%Y-%m-%d %H:%M:%S")
        kind = event["kind"].replace("_", " ")
        lines.append(f"{when}  {event['variant']} as {event['role']}: {kind}: {event['why']}")
    return "\n".join(lines)
