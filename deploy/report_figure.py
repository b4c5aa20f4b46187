"""The report's charts. Each panel draws one question on one axes; the picture puts all side by side.

The page shows the same panels as separate drawings, so that they can stand below each other on a
phone. Its colours come from CSS; :func:`render_svg` writes the names of CSS variables where
:data:`INK`, :data:`MUTED` and :data:`GRID` are.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import MaxNLocator

from deploy.report_data import DemoReport, memory, milliseconds, number, percent
from quantize.report.page import GRID, INK, MUTED, OUTCOMES, PALETTE, PAPER

FIRST, WHOLE = "#9aa4af", INK
"""First token and whole answer: greys, because colours stand for variants."""
CSS_NAMES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)"}
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "xtick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "tiercel",
}

WIDTH = 12.0
"""Of the picture, in inches."""

Panel = Callable[[Axes, DemoReport], None]


def render_png(report: DemoReport) -> bytes:
    """The whole picture, 1920 pixels wide: a row of panels on roles, one on variants, the gates."""
    roles, variants = 0.52 * len(report.roles), 0.52 * len(report.variants)
    # Inches from the top edge: where each row's axes start, below room for its titles.
    tops = (1.75, 1.75 + roles + 1.5, 1.75 + roles + 1.5 + variants + 1.05)
    height = tops[2] + roles + 0.55
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), dpi=160, facecolor=PAPER)

        def axes(left: float, top: float, width: float, tall: float) -> Axes:
            return figure.add_axes((left / WIDTH, 1 - (top + tall) / height, width / WIDTH, tall / height))

        figure.text(0.028, 1 - 0.55 / height, "Every agent at the precision it needs", size=19, weight="bold")
        subtitle = f"{report.headline} · {report.circumstances}"
        figure.text(0.028, 1 - 0.85 / height, subtitle, color=MUTED, size=10.5)
        for index, panel in enumerate(PANELS.values()):
            on_roles = panel in ROLE_PANELS
            left = 1.35 + 3.8 * (index % 3)
            panel(axes(left, tops[0 if on_roles else 1], 2.55, roles if on_roles else variants), report)
        draw_gates(axes(1.35, tops[2], 10.2, roles), report)
        return _saved(figure, "png")


def render_svg(panel: Panel, report: DemoReport, name: str) -> str:
    """One panel as an SVG element for an HTML page; ``name`` keeps its ids apart from other panels'."""
    with matplotlib.rc_context(STYLE):
        svg = _saved(_alone(panel, report), "svg").decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would style the whole page
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", "inherit", svg)
    for colour, variable in CSS_NAMES.items():
        svg = svg.replace(colour, variable)
    return re.sub(r'^<svg height="[^"]*"|(?<=^<svg) width="[^"]*" height="[^"]*"', "<svg", svg)


def _alone(panel: Panel, report: DemoReport) -> Figure:
    """A panel on a transparent figure of its own, in inches; labels of the same width line panels up."""
    on_roles = panel in ROLE_PANELS
    tall = 0.45 * len(report.roles if on_roles else report.variants)
    width, bottom = 3.7, 0.55 if on_roles else 0.1
    height = bottom + tall + 0.35
    figure = Figure(figsize=(width, height))
    figure.patch.set_alpha(0)
    axes = figure.add_axes((1.2 / width, bottom / height, 2.3 / width, tall / height))
    axes.patch.set_alpha(0)
    panel(axes, report)
    axes.set_title("", loc="left")  # the page has a heading
    return figure


def _saved(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def variant_colours(report: DemoReport) -> dict[str, str]:
    return {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(report.variants)}


def draw_served(axes: Axes, report: DemoReport) -> None:
    colours = variant_colours(report)
    for row, role in enumerate(report.roles.values()):
        start, total = 0.0, sum(role.variant_counts.values()) or 1
        for name in report.variants:
            share = 100 * role.variant_counts.get(name, 0) / total
            axes.barh(row, share, left=start, color=colours[name], height=0.5)
            if share >= 18:
                middle = start + share / 2
                axes.text(middle, row, name, ha="center", va="center", color=_on(colours[name]), size=8.5)
            start += share
    used = [name for name in report.variants if any(name in r.variant_counts for r in report.roles.values())]
    handles = [Line2D([], [], marker="s", ls="", color=colours[name], label=name) for name in used]
    _rows(axes, list(report.roles), "Which variant answered", "share of answers, %")
    _legend(axes, handles)
    axes.set_xlim(0, 100)


def draw_accuracy(axes: Axes, report: DemoReport) -> None:
    colours = variant_colours(report)
    for row, role in enumerate(report.roles.values()):
        low, high = 100 * role.accuracy_low, 100 * role.accuracy_high
        counts = role.variant_counts
        colour = colours[max(counts, key=lambda name: counts[name])] if counts else MUTED
        axes.plot([low, high], [row, row], color=colour, lw=2, solid_capstyle="round")
        axes.plot(100 * role.accuracy, row, "o", color=colour, ms=7)
        axes.annotate(
            percent(role.accuracy),
            (100 * role.accuracy, row),
            (0, 8),
            textcoords="offset points",
            ha="center",
        )
    lowest = min(100 * role.accuracy_low for role in report.roles.values())
    _rows(axes, list(report.roles), "Task accuracy", "right answers, % · line: 95 % interval")
    axes.set_xlim(max(0.0, 5 * (lowest // 5) - 5), 101.5)


def draw_latency(axes: Axes, report: DemoReport) -> None:
    longest = 0.0
    for row, role in enumerate(report.roles.values()):
        for p50, p95, colour, shift in (
            (role.ttft_p50_s, role.ttft_p95_s, FIRST, -0.14),
            (role.latency_p50_s, role.latency_p95_s, WHOLE, 0.14),
        ):
            if p50 is None or p95 is None:
                continue
            longest = max(longest, p95)
            axes.plot([p50, p95], [row + shift] * 2, color=colour, lw=2)
            axes.plot(p50, row + shift, "o", color=colour, ms=6)
            axes.plot(p95, row + shift, "|", color=colour, ms=9, mew=2)
            axes.annotate(
                milliseconds(p95), (p95, row + shift), (6, 0), textcoords="offset points", va="center", size=8
            )
    _rows(axes, list(report.roles), "Latency at the client", "dot: p50 · bar and figure: p95")
    _legend(
        axes,
        [
            Line2D([], [], marker="o", color=FIRST, label="first token"),
            Line2D([], [], marker="o", color=WHOLE, label="whole answer"),
        ],
    )
    axes.set_xlim(0, 1.28 * longest or 1)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(lambda seconds, _: milliseconds(seconds) if seconds else "0")


def draw_memory(axes: Axes, report: DemoReport) -> None:
    _bars(
        axes,
        report,
        {name: variant.engine_memory_bytes for name, variant in report.variants.items()},
        memory,
        "Engine memory",
        "memory of the engine's processes",
    )


def draw_weights(axes: Axes, report: DemoReport) -> None:
    _bars(
        axes,
        report,
        {name: variant.weight_bytes for name, variant in report.variants.items()},
        memory,
        "Weights",
        "bytes of the weights as stored",
    )


def draw_divergence(axes: Axes, report: DemoReport) -> None:
    _bars(
        axes,
        report,
        {name: variant.kl_mean for name, variant in report.variants.items()},
        lambda value: number(value, 4) if value is not None else "reference",
        "Divergence from the reference",
        "mean KL, nats per token",
    )


def draw_gates(axes: Axes, report: DemoReport) -> None:
    """A tile per variant and role: the gate's outcome and the accuracy on held-out items."""
    roomy = len(report.variants) <= 3
    for row, role in enumerate(report.roles):
        for column, variant in enumerate(report.variants.values()):
            verdict = variant.gate.get(role)
            sign, words, tile, colour = OUTCOMES[verdict.outcome] if verdict else ("", "no gate", GRID, MUTED)
            shape = FancyBboxPatch(
                (column + 0.03, row - 0.36),
                0.94,
                0.72,
                boxstyle="round,pad=0,rounding_size=0.05",
                fc=tile,
                lw=0,
            )
            axes.add_patch(shape)
            label = f"{sign} {words}" if roomy else sign
            axes.text(column + 0.07, row, label, va="center", color=colour, weight="bold")
            if role in variant.accuracy:
                accuracy = percent(variant.accuracy[role]) + " right" * roomy
                axes.text(column + 0.93, row, accuracy, va="center", ha="right", color=colour)
    _rows(
        axes,
        list(report.roles),
        "Which role a variant may serve",
        "by its gate, on held-out items · ✓ passed  ✕ failed  ? not enough evidence",
    )
    axes.set_xlim(0, len(report.variants))
    axes.set_xticks([column + 0.5 for column in range(len(report.variants))], list(report.variants))
    axes.tick_params(axis="x", labelcolor=INK)
    axes.grid(visible=False)


def _bars(
    axes: Axes,
    report: DemoReport,
    values: Mapping[str, float | None],
    label: Callable[[float | None], str],
    title: str,
    unit: str,
) -> None:
    """One labelled bar per variant. The labels carry the values, so there are no tick labels."""
    colours = variant_colours(report)
    for row, (name, value) in enumerate(values.items()):
        axes.barh(row, value or 0, color=colours[name], height=0.5)
        axes.annotate(label(value), (value or 0, row), (5, 0), textcoords="offset points", va="center")
    _rows(axes, list(values), title, unit)
    axes.set_xlim(0, 1.3 * max(value or 0 for value in values.values()) or 1)
    axes.set_xticklabels([])


def _rows(axes: Axes, names: Sequence[str], title: str, unit: str) -> None:
    """What all panels share: a row per name from the top down, a light grid, a title on the left."""
    axes.set_title(title, loc="left", weight="bold", pad=22)
    axes.annotate(
        unit, (0, 1), (0, 7), xycoords="axes fraction", textcoords="offset points", color=MUTED, size=8.5
    )
    axes.set_yticks(range(len(names)), [name if len(name) <= 17 else f"{name[:16]}…" for name in names])
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.tick_params(length=0)
    axes.grid(axis="x", color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)


def _legend(axes: Axes, handles: Sequence[Line2D]) -> None:
    axes.legend(
        handles=list(handles),
        loc="upper left",
        bbox_to_anchor=(0, -0.5 / axes.get_ylim()[0]),
        ncols=len(handles),
        frameon=False,
        fontsize=8.5,
        handletextpad=0.4,
        columnspacing=1.2,
        handlelength=1.0,
        borderpad=0,
        borderaxespad=0,
    )


def _on(colour: str) -> str:
    """Text colour that can be read on ``colour``."""
    red, green, blue = (int(colour[index : index + 2], 16) for index in (1, 3, 5))
    return "#fefefe" if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else "#15181c"


PANELS: dict[str, Panel] = {
    "Which variant answered": draw_served,
    "Task accuracy": draw_accuracy,
    "Latency at the client": draw_latency,
    "Engine memory": draw_memory,
    "Weights": draw_weights,
    "Divergence from the reference": draw_divergence,
}
"""Title to panel, in reading order; the picture adds the tiles of the gates."""
ROLE_PANELS = (draw_served, draw_accuracy, draw_latency)
