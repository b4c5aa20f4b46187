"""The report's pictures as SVG text. Colours are CSS variables of the page, so that they follow its theme.

Every picture has a title for those who do not see it, and labels that are text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from quantize.report.distributions import ActivationFigures, WeightFigures
from quantize.report.page import PALETTE
from quantize.report.tables import Point, kl_text, megabytes, pareto

CHARACTER = 6.4
"""Width of a label's character at 12 pixels."""
LINE = 15


@dataclass(frozen=True)
class Scale:
    """Values to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        how: Callable[[float], float] = math.log10 if self.logarithmic else float
        low, high = how(self.low), how(self.high)
        return self.start + (how(value) - low) / ((high - low) or 1) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.logarithmic:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            marks = [factor * 10.0**power for power in decades for factor in (1, 2, 5)]
            inside = [mark for mark in marks if self.low <= mark <= self.high]
            tens = [mark for mark in inside if round(math.log10(mark), 6).is_integer()]
            return tens if len(tens) >= 4 else inside
        step = 10 ** math.floor(math.log10((self.high - self.low) or 1))
        for finer in (1, 2, 5):
            if (self.high - self.low) / (step / finer) >= 4:
                step /= finer
                break
        first = math.ceil(self.low / step)
        return [step * number for number in range(first, math.floor(self.high / step) + 1)]


def svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}" '
        f'font-size="12" fill="var(--ink)"><title>{escape(title)}</title>{"".join(parts)}</svg>'
    )


def draw_text(x: float, y: float, words: str, anchor: str = "start", colour: str = "--muted") -> str:
    """With a seam of the background's colour, so that lines do not cross it."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="var({colour})" paint-order="stroke" '
        f'stroke="var(--card)" stroke-width="3">{escape(words)}</text>'
    )


def draw_line(x1: float, y1: float, x2: float, y2: float, colour: str = "var(--grid)", more: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" {more}/>'


def draw_path(places: Sequence[tuple[float, float]], colour: str, more: str = "") -> str:
    d = "M" + "L".join(f"{x:.4g} {y:.4g}" for x, y in places)
    return f'<path d="{d}" fill="none" stroke="{colour}" {more}/>'


def loss_against_bytes(
    measured: Sequence[Point],
    reference: tuple[str, int] | None = None,
    noise_floor: float | None = None,
    width: int = 760,
    height: int = 430,
) -> str:
    """Mean KL (logarithmic) over megabytes. Dots: variants; open diamonds: controls; line: Pareto front.

    ``reference`` is a name and bytes, drawn at its size because its loss of 0 has no place. Points without
    loss are left out as well.
    """
    shown = [point for point in measured if point.kl > 0]
    if not shown:
        return ""
    losses = [value for p in shown for value in (p.kl, p.low, p.high) if value is not None and value > 0]
    losses += [noise_floor] if noise_floor else []
    sizes = [p.bytes / 1e6 for p in shown] + ([reference[1] / 1e6] if reference else [])
    margin = 0.06 * (max(sizes) - min(sizes) or max(sizes))
    x = Scale(min(sizes) - margin, max(sizes) + 2 * margin, 62, width - 12)
    y = Scale(min(losses) / 1.5, max(losses) * 1.5, height - 46, 28, logarithmic=True)
    parts = _axes(x, y, width, height)
    if reference:
        at = x(reference[1] / 1e6)
        parts.append(draw_line(at, 28, at, y.start, "var(--muted)", 'stroke-dasharray="3 4"'))
        parts.append(draw_text(at - 5, y.end + 12, f"{reference[0]}, loss 0", "end"))
    if noise_floor:
        at = y(noise_floor)
        parts.append(draw_line(x.start, at, x.end, at, "var(--muted)", 'stroke-dasharray="6 4"'))
        parts.append(draw_text(x.start + 4, at - 5, "noise floor: the reference against itself"))
    front = [(x(p.bytes / 1e6), y(p.kl)) for p in pareto(shown)]
    steps = [front[0]]
    for place in front[1:]:
        steps += [(place[0], steps[-1][1]), place]
    parts.append(draw_path(steps, "var(--muted)", 'stroke-width="1.5" opacity=".7"'))
    return svg(width, height, _front_title(shown), parts + _marks(shown, x, y))


def _front_title(shown: Sequence[Point]) -> str:
    best = ", ".join(f"{p.name} {megabytes(p.bytes)} at {kl_text(p.kl)}" for p in pareto(shown))
    return f"Mean KL divergence against bytes of weights; on the Pareto front: {best}"


def _axes(x: Scale, y: Scale, width: int, height: int) -> list[str]:
    parts = []
    for tick in y.ticks():
        parts += [
            draw_line(x.start, y(tick), x.end, y(tick)),
            draw_text(x.start - 8, y(tick) + 4, f"{tick:g}", "end"),
        ]
    for tick in x.ticks():
        parts += [
            draw_line(x(tick), y.start, x(tick), y.start + 4),
            draw_text(x(tick), y.start + 18, f"{tick:g}", "middle"),
        ]
    parts.append(draw_text((x.start + x.end) / 2, height - 6, "weights, MB", "middle"))
    parts.append(draw_text(4, 14, "mean KL, nats per token (logarithmic)"))
    return parts


def _marks(shown: Sequence[Point], x: Scale, y: Scale) -> list[str]:
    """Intervals, symbols, and labels where they cover no other."""
    parts: list[str] = []
    places = [(x(p.bytes / 1e6), y(p.kl)) for p in shown]
    taken = [(px - 7, py - 7, px + 7, py + 7) for px, py in places]
    variants = [p.name for p in shown if not p.control]
    controls_first = sorted(zip(shown, places, strict=True), key=lambda pair: not pair[0].control)
    for point, (px, py) in controls_first:
        colour = "var(--muted)" if point.control else PALETTE[variants.index(point.name) % len(PALETTE)]
        if point.low is not None and point.high is not None:
            low, high = y(max(point.low, y.low)), y(point.high)
            parts.append(draw_line(px, low, px, high, colour, 'stroke-width="2"'))
        if point.control:
            parts.append(
                f'<path d="M{px:.1f} {py - 6:.1f}l6 6-6 6-6-6z" fill="var(--card)" stroke="{colour}" '
                f'stroke-width="1.5"><title>{escape(_hover(point))}</title></path>'
            )
        else:
            parts.append(
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="6" fill="{colour}">'
                f"<title>{escape(_hover(point))}</title></circle>"
            )
    order = sorted(range(len(shown)), key=lambda index: shown[index].control)
    for index in order:
        point, (px, py) = shown[index], places[index]
        box = _free(px, py, CHARACTER * len(point.name), taken, x)
        if box is not None:
            taken.append(box)
            parts.append(
                draw_text(box[0], box[3] - 4, point.name, colour="--muted" if point.control else "--ink")
            )
    return parts


def _hover(point: Point) -> str:
    return f"{point.name}: {megabytes(point.bytes)}, KL {kl_text(point.kl)}" + " (control)" * point.control


Box = tuple[float, float, float, float]


def _free(px: float, py: float, wide: float, taken: Sequence[Box], x: Scale) -> Box | None:
    """Room for a label beside, above or below a point; None where there is none: the table tells."""
    half = LINE / 2
    corners = [(px + 10, py - half), (px - 10 - wide, py - half)]
    corners += [(px - wide / 2, py - LINE - half - 1), (px - wide / 2, py + LINE - half + 1)]
    corners += [(px + 6, py - LINE - half), (px + 6, py + LINE - half)]
    corners += [(px - 6 - wide, py - LINE - half), (px - 6 - wide, py + LINE - half)]
    for left, top in corners:
        box = (left, top, left + wide, top + LINE)
        inside = box[0] >= x.start and box[2] <= x.end + 4 and top > 20
        if inside and not any(_overlap(box, other) for other in taken):
            return box
    return None


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def weights_before_and_after(figures: WeightFigures, title: str, width: int = 260, height: int = 130) -> str:
    """Both histograms over the same bins; shares on a logarithmic axis, so that the tails are seen."""
    shares = [share for share in (*figures.before, *figures.after) if share > 0]
    x = Scale(-figures.largest, figures.largest, 6, width - 6)
    y = Scale(min(shares) / 2, max(shares) * 1.3, height - 22, 8, logarithmic=True)
    bins = len(figures.before)

    def outline(counts: Sequence[float]) -> str:
        """Steps from the left end of the axis to the right one."""
        steps = f"M{x.start:.4g} {y.start:.4g}"
        for number, share in enumerate(counts):
            right = -figures.largest + 2 * figures.largest * (number + 1) / bins
            steps += f"V{y(share) if share > 0 else y.start:.4g}H{x(right):.4g}"
        return steps

    words = f"{title}: weights before and after, relative error {100 * figures.relative_error:.1f} %"
    return svg(
        width,
        height,
        words,
        [
            f'<path d="{outline(figures.before)}V{y.start:.4g}z" fill="var(--muted)" opacity=".35"/>',
            f'<path d="{outline(figures.after)}" fill="none" stroke="var(--after)" stroke-width="1.3"/>',
            draw_line(x.start, y.start, x.end, y.start),
            draw_text(x.start, height - 6, f"{-figures.largest:.3g}"),
            draw_text((x.start + x.end) / 2, height - 6, "0", "middle"),
            draw_text(x.end, height - 6, f"{figures.largest:.3g}", "end"),
        ],
    )


def activations_before_and_after(
    figures: ActivationFigures, title: str, width: int = 260, height: int = 130
) -> str:
    """Largest absolute input per channel, sorted, on a logarithmic axis."""
    values = [value for value in (*figures.before, *figures.after) if value > 0]
    if not values:
        return ""
    x = Scale(0, 1, 38, width - 6)
    y = Scale(min(values) / 1.2, max(values) * 1.2, height - 22, 8, logarithmic=True)

    def curve(points: Sequence[float]) -> list[tuple[float, float]]:
        last = max(1, len(points) - 1)
        return [(x(number / last), y(max(value, y.low))) for number, value in enumerate(points)]

    words = (
        f"{title}: largest input per channel, {figures.before[0]:.3g} before, {figures.after[0]:.3g} after; "
        f"outlier channels {figures.outlier_count_before} before, {figures.outlier_count_after} after"
    )
    parts = []
    for tick in y.ticks()[:: max(1, len(y.ticks()) // 4)]:
        parts += [
            draw_line(x.start, y(tick), x.end, y(tick)),
            draw_text(x.start - 6, y(tick) + 4, f"{tick:g}", "end"),
        ]
    parts += [
        draw_path(curve(figures.before), "var(--muted)", 'stroke-width="2.5" opacity=".6"'),
        draw_path(curve(figures.after), "var(--after)", 'stroke-width="1.5"'),
        draw_text(x.start, height - 6, "largest"),
        draw_text(x.end, height - 6, f"{figures.channels} channels", "end"),
    ]
    return svg(width, height, words, parts)
