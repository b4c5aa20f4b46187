"""Lines of a figure over steps that are named: bits, blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from quantize.report.figures import Scale, draw_line, draw_path, draw_text, svg
from quantize.report.page import PALETTE

LEAST = 1e-6
"""What is less, on a logarithmic axis, is drawn there."""


@dataclass(frozen=True)
class Line:
    """A name and a value for every step, with an interval where there is one; None where nothing is known."""

    name: str
    values: Sequence[float | None]
    intervals: Sequence[tuple[float, float] | None] = ()


@dataclass(frozen=True)
class Axis:
    """What goes up: its words, and ``low`` … ``high`` where it does not follow from the values."""

    words: str
    logarithmic: bool = False
    low: float | None = None
    high: float | None = None


def curves(
    steps: Sequence[str],
    lines: Sequence[Line],
    axis: Axis,
    below: str,
    width: int = 430,
    height: int = 300,
    level: tuple[str, float] | None = None,
) -> str:
    """Lines over ``steps`` from left to right; ``below`` says what steps are, ``level`` is a dashed line with
    its name. Empty where no value is known."""
    known = [value for line in lines for value in line.values if value is not None]
    if not known:
        return ""
    known += [level[1]] if level else []
    known += [end for line in lines for pair in line.intervals if pair for end in pair]
    y = _upwards(known, axis, height)
    x = Scale(0, max(1, len(steps) - 1), 58, width - 96)
    parts = _grid(steps, x, y, axis, below, height)
    if level:
        at = y(_clipped(level[1], y))
        parts.append(draw_line(x.start, at, x.end, at, "var(--muted)", 'stroke-dasharray="5 4"'))
        parts.append(draw_text(x.start + 4, at - 5, level[0]))
    for number, line in enumerate(lines):
        parts += _drawn(line, PALETTE[number % len(PALETTE)], steps, x, y)
    parts += _names(lines, x, y)
    ends = "; ".join(f"{line.name}: {_said(line.values)}" for line in lines)
    return svg(width, height, f"{axis.words} by {below}. {ends}", parts)


def _upwards(known: Sequence[float], axis: Axis, height: int) -> Scale:
    if axis.logarithmic:
        positive = [max(value, LEAST) for value in known]
        low, high = min(positive) / 1.4, max(positive) * 1.4
    else:
        spread = (max(known) - min(known)) or 1.0
        low, high = min(known) - 0.06 * spread, max(known) + 0.06 * spread
    low = axis.low if axis.low is not None else low
    high = axis.high if axis.high is not None else high
    return Scale(low, high, height - 48, 30, axis.logarithmic)


def _grid(steps: Sequence[str], x: Scale, y: Scale, axis: Axis, below: str, height: int) -> list[str]:
    parts = [draw_text(4, 14, axis.words)]
    for tick in y.ticks():
        parts.append(draw_line(x.start, y(tick), x.end, y(tick)))
        parts.append(draw_text(x.start - 8, y(tick) + 4, f"{tick:.3g}", "end"))
    every = max(1, -(-len(steps) // 10))
    for number, step in enumerate(steps):
        if number % every == 0:
            parts.append(draw_text(x(number), height - 30, step, "middle"))
    parts.append(draw_text((x.start + x.end) / 2, height - 10, below, "middle"))
    return parts


def _drawn(line: Line, colour: str, steps: Sequence[str], x: Scale, y: Scale) -> list[str]:
    parts: list[str] = []
    places = [
        (x(number), y(_clipped(value, y))) for number, value in enumerate(line.values) if value is not None
    ]
    if len(places) > 1:
        parts.append(draw_path(places, colour, 'stroke-width="2"'))
    for number, pair in enumerate(line.intervals):
        if pair is not None:
            low, high = (y(_clipped(end, y)) for end in pair)
            parts.append(
                draw_line(x(number), low, x(number), high, colour, 'stroke-width="1.2" opacity=".6"')
            )
    if len(steps) <= 12:
        for (px, py), (step, value) in zip(places, _known(steps, line), strict=True):
            words = f"<title>{escape(f'{line.name}, {step}: {value:.4g}')}</title>"
            parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{colour}">{words}</circle>')
    return parts


def _known(steps: Sequence[str], line: Line) -> list[tuple[str, float]]:
    return [(step, value) for step, value in zip(steps, line.values, strict=True) if value is not None]


def _names(lines: Sequence[Line], x: Scale, y: Scale) -> list[str]:
    """At the right end of each line, moved apart where they would cover each other."""
    ends = []
    for number, line in enumerate(lines):
        last = next((value for value in reversed(line.values) if value is not None), None)
        if last is not None:
            ends.append((y(_clipped(last, y)), number, line.name))
    parts, at = [], 0.0
    for place, number, name in sorted(ends):
        at = max(place + 4, at + 14)
        colour = PALETTE[number % len(PALETTE)]
        parts.append(
            f'<text x="{x.end + 9:.1f}" y="{at:.1f}" fill="{colour}" font-weight="600">{escape(name)}</text>'
        )
    return parts


def _clipped(value: float, y: Scale) -> float:
    return min(max(value, y.low), y.high)


def _said(values: Sequence[float | None]) -> str:
    known = [f"{value:.3g}" for value in values if value is not None]
    return ", ".join(known) if len(known) <= 12 else f"{known[0]} to {known[-1]}"
