"""The agents benchmark's picture: sessions per second, and each role's times, of every arrangement."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.agents.traces import AUXILIARY, CORE
from deploy.report_figure import STYLE
from quantize.report.page import GRID, MUTED, PALETTE, PAPER

WIDTH = 12.0
SIGNS = "bars and lines: medians of the repeats; small marks: each repeat; open: p50, filled: p95"
LABELS = 2.6
"""Inches for the arrangements' names."""
Results = Sequence[Mapping[str, Any]]


def draw(document: Mapping[str, Any], path: Path) -> None:
    titles: Mapping[str, str] = document["titles"]
    found = {name: [one for one in document["results"] if one["arrangement"] == name] for name in titles}
    tall = 0.42 * len(found)
    height = tall + 1.3
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), dpi=130, facecolor=PAPER)
        figure.text(0.02, 1 - 0.32 / height, "Agents' sessions, replayed", size=15, weight="bold")
        figure.text(0.29, 1 - 0.31 / height, SIGNS, color=MUTED)
        each = (WIDTH - LABELS - 0.3) / 3
        panels = ("sessions per second", "core: p50 and p95 of an answer, s", "auxiliary: p50 and p95, s")
        for number, title in enumerate(panels):
            left = (LABELS + number * each) / WIDTH
            axes = figure.add_axes((left, 0.5 / height, (each - 0.35) / WIDTH, tall / height))
            if number:
                _times(axes, found, (CORE, AUXILIARY)[number - 1])
            else:
                _rates(axes, found)
            axes.set_title(title, loc="left", size=10)
            _rows(axes, list(titles.values()) if number == 0 else [""] * len(found))
        figure.savefig(path)


def _rates(axes: Axes, found: Mapping[str, Results]) -> None:
    for row, results in enumerate(found.values()):
        rates = [one["sessions_per_s"] for one in results]
        axes.barh(row, statistics.median(rates), color=_colour(row), height=0.55, alpha=0.85)
        axes.plot(rates, [row] * len(rates), "o", color="white", mec=_colour(row), ms=4)
        axes.annotate(
            f"{statistics.median(rates):.2f}",
            (max(rates), row),
            (6, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_xlim(0, 1.18 * max(one["sessions_per_s"] for results in found.values() for one in results))


def _times(axes: Axes, found: Mapping[str, Results], role: str) -> None:
    longest = 0.0
    for row, results in enumerate(found.values()):
        p50, p95 = (
            statistics.median(one["roles"][role]["total_s"][share] for one in results)
            for share in ("p50", "p95")
        )
        ends = [one["roles"][role]["total_s"]["p95"] for one in results]
        axes.plot([p50, p95], [row, row], color=_colour(row), lw=3, solid_capstyle="round")
        axes.plot(p50, row, "o", color="white", mec=_colour(row), ms=6)
        axes.plot(p95, row, "o", color=_colour(row), ms=6)
        axes.plot(ends, [row + 0.25] * len(ends), "|", color=_colour(row), ms=5)
        axes.annotate(f"{p95:.1f}", (max(p95, *ends), row), (6, 0), textcoords="offset points", va="center")
        longest = max(longest, *ends)
    axes.set_xlim(0, 1.18 * longest)


def _rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(length=0)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", labelcolor=MUTED)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _colour(row: int) -> str:
    return PALETTE[row % len(PALETTE)]
