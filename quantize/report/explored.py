"""What an exploration found, as one HTML file: bits against loss and invention, then layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from quantize.core.files import write_whole
from quantize.explore.found import WHATS, WORDS, ErrorRow, Exploration, PointFound, RoleAnswers, What
from quantize.gate.paired import mcnemar_p
from quantize.gate.shares import wilson_interval
from quantize.report.curves import Axis, Line, curves
from quantize.report.distributions import Distributions
from quantize.report.inside import before_and_after, layer_map
from quantize.report.page import document, section, table
from quantize.report.report import STYLE

LINES: dict[What, str] = {"nothing": "16 bits", "weights": "weights", "inputs": "inputs", "kv": "KV cache"}
SIMULATED = (
    "Simulated in 32-bit arithmetic, one thing rounded at a time: this explains a model, and accepts "
    "nothing. A variant is judged by its gate, on the engine that serves it."
)
MORE_STYLE = """
.curves { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
pre.answer { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0 .8rem; font-size: .85rem; }
"""


def write_exploration(found: Exploration, path: Path) -> None:
    """Write the page; a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, render_exploration(found))


def render_exploration(found: Exploration) -> str:
    sections = [
        _header(found),
        _bits(found),
        _invention(found),
        _samples(found),
        _depth(found),
        _errors(found, "weights", "Error of weights by layer and format"),
        _errors(found, "inputs", "Error of inputs by layer and format"),
        _scales(found),
        before_and_after(
            Distributions(
                variant="weights-at-4-bits",
                version="",
                tokens=found.layers.tokens,
                groups=found.layers.groups,
            )
        ),
        f"<footer>{SIMULATED}</footer>",
    ]
    title = f"Tiercel: {found.model} from inside"
    return document(title, "\n".join(filter(None, sections)), STYLE + MORE_STYLE)


def _header(found: Exploration) -> str:
    reference = found.reference()
    tiles = {
        "parameters": f"{found.parameters:,}",
        "loss at 16 bits, nats per token": f"{reference.loss:.3f}",
        "tokens scored": f"{reference.tokens:,}",
        "answers per point": f"{sum(found.items.values()):,}",
    }
    body = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in tiles.items())
    return (
        f"<header><h1>What precision does to {escape(found.model)}</h1><p>{SIMULATED}</p></header>"
        f"<dl>{body}</dl>"
    )


def _steps(found: Exploration) -> list[int]:
    """Bits that were looked at, falling."""
    return sorted({point.bits for point in found.points if point.what != "nothing"}, reverse=True)


def _line(
    found: Exploration,
    what: What,
    value: Callable[[PointFound], float],
    interval: Callable[[PointFound], tuple[float, float]] | None = None,
) -> Line:
    by_bits = {point.bits: point for point in found.of(what)}
    points = [by_bits.get(bits) for bits in _steps(found)]
    return Line(
        LINES[what],
        [None if point is None else value(point) for point in points],
        [] if interval is None else [None if point is None else interval(point) for point in points],
    )


def _figures(drawn: Sequence[str]) -> str:
    return '<div class="curves">' + "".join(f"<figure>{one}</figure>" for one in drawn if one) + "</div>"


def _bits(found: Exploration) -> str:
    reference = found.reference()
    steps = [str(bits) for bits in _steps(found)]

    def drawn(axis: Axis, value: Callable[[PointFound], float], level: float | None = None) -> str:
        at = None if level is None else (LINES["nothing"], level)
        return curves(steps, [_line(found, what, value) for what in WHATS], axis, "bits", level=at)

    pictures = [
        drawn(Axis("mean KL to 16 bits, nats per token", logarithmic=True), lambda point: point.kl),
        drawn(Axis("loss, nats per token"), lambda point: point.loss, reference.loss),
        drawn(Axis("same first choice, %", low=0, high=100), lambda point: 100 * point.agreement),
    ]
    text = (
        "Weights: integers with a scale per 64 inputs, below 6 bits at the range of "
        "least error; at one bit their signs. "
        "Inputs: integers with a range per token. KV cache: the same per token and head. Scored are the "
        "tokens of right answers in their conversations."
    )
    rows = [["what", "bits", "quantizer", "loss", "KL", "same first choice"]]
    rows += [
        [
            WORDS[point.what],
            str(point.bits),
            point.quantizer or "–",
            f"{point.loss:.4f}",
            f"{point.kl:.3g}",
            f"{100 * point.agreement:.1f} %",
        ]
        for point in found.points
    ]
    return section("What bits do", text, _figures(pictures) + _closed("The same as a table", table(rows)))


def _bits_text(bits: int) -> str:
    return f"{bits} bit" + "s" * (bits != 1)


def _closed(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def share(flags: Sequence[bool]) -> float:
    return sum(flags) / max(1, len(flags))


def _interval(flags: Sequence[bool]) -> tuple[float, float]:
    low, high = wilson_interval(sum(flags), max(1, len(flags)))
    return 100 * low, 100 * high


def more_invented(before: RoleAnswers, after: RoleAnswers) -> tuple[int, int, float]:
    """Answers that invent values and did not at 16 bits, the reverse, and McNemar's p."""
    pairs = list(zip(before.values, after.values, strict=True))
    worse = sum(new and not old for old, new in pairs)
    better = sum(old and not new for old, new in pairs)
    return worse, better, mcnemar_p(worse, better)


def _invention(found: Exploration) -> str:
    steps = [str(bits) for bits in _steps(found)]
    reference, pictures = found.reference(), []

    def drawn(axis: Axis, role: str, flags: Callable[[RoleAnswers], tuple[bool, ...]]) -> str:
        lines = [
            _line(
                found,
                what,
                lambda point: 100 * share(flags(point.roles[role])),
                lambda point: _interval(flags(point.roles[role])),
            )
            for what in WHATS
        ]
        level = (LINES["nothing"], 100 * share(flags(reference.roles[role])))
        return curves(steps, lines, axis, "bits", level=level)

    for role in found.items:
        words = f"{role}: answers with an invented value, %"
        pictures.append(drawn(Axis(words, low=0, high=100), role, lambda one: one.values))
        pictures.append(drawn(Axis(f"{role}: right, %", low=0, high=100), role, lambda one: one.right))
    text = (
        "An answer invents a value when it states a number, an identifier or a name that its grounds do not "
        "hold. Bars are 95 % intervals. An answer of noise may hold no value at all, and then invents none: "
        "read it beside the share that is right."
    )
    return section("Does it invent more?", text, _figures(pictures) + table(_invention_rows(found)))


def _invention_rows(found: Exploration) -> list[list[str]]:
    heads = ["what", "role", "right", "invents a value", "invents any word", "more than at 16 bits"]
    rows = [heads]
    reference = found.reference()
    for point in found.points:
        for role, answers in point.roles.items():
            worse, better, p = more_invented(reference.roles[role], answers)
            beside = "–" if point.what == "nothing" else f"{worse} more, {better} fewer; p {p:.2g}"
            of = len(answers.right)
            name = WORDS[point.what] + ("" if point.what == "nothing" else f", {_bits_text(point.bits)}")
            rows.append(
                [
                    name,
                    role,
                    f"{sum(answers.right)} of {of}",
                    f"{sum(answers.values)} of {of}",
                    f"{sum(answers.invented)} of {of}",
                    beside,
                ]
            )
    return rows


def _samples(found: Exploration) -> str:
    """The first answer of each role, bit by bit."""
    parts = []
    for role in found.items:
        for what in (one for one in WHATS if found.of(one)):
            lines = []
            for point in (found.reference(), *found.of(what)):
                text = next(iter(point.roles[role].samples), "")
                name = LINES["nothing"] if point.what == "nothing" else _bits_text(point.bits)
                lines.append(f'<h3>{name}</h3><pre class="answer">{escape(text) or "(nothing)"}</pre>')
            parts.append(_closed(f"{role}, {WORDS[what]}", "".join(lines)))
    return section("What it wrote", "The first item of each role, answered greedily.", "".join(parts))


def _depth(found: Exploration) -> str:
    pictures = []
    for what in WHATS:
        points = found.of(what)
        blocks = max((len(point.depth) for point in points), default=0)
        if blocks:
            lines = [Line(_bits_text(point.bits), list(point.depth)) for point in points]
            steps = [str(number) for number in range(1, blocks + 1)]
            axis = Axis(f"relative error, {WORDS[what]} rounded", logarithmic=True)
            pictures.append(curves(steps, lines, axis, "block"))
    text = (
        "How far the hidden state is from the one at 16 bits, relative to its size, after each block when "
        "all blocks are rounded: the median over tokens. Errors of blocks add to what comes in, and residual "
        "streams that grow make them small again."
    )
    return section("How error travels through depth", text, _figures(pictures))


def _errors(found: Exploration, what: What, title: str) -> str:
    rows = [row for row in found.layers.errors if row.what == what]
    if not rows:
        return ""
    by_format: dict[str, list[ErrorRow]] = {}
    for row in rows:
        by_format.setdefault(row.quantizer, []).append(row)
    values = [row.error for row in rows if row.error > 0]
    low, high = min(values, default=1.0), max(values, default=1.0)
    maps = []
    heads = [["format", "mean", "best group", "worst group"]]
    for name, mine in by_format.items():
        cells = {(row.layer, row.kind): (row.error, f"{100 * row.error:.2g}", row.group) for row in mine}
        maps.append(layer_map(f"{name}, %", cells, low, high))
        least, most = min(mine, key=lambda row: row.error), max(mine, key=lambda row: row.error)
        mean = sum(row.error for row in mine) / len(mine)
        heads.append(
            [
                name,
                f"{100 * mean:.2f} %",
                f"{100 * least.error:.2f} %, {least.group}",
                f"{100 * most.error:.2f} %, {most.group}",
            ]
        )
    text = "|x̂ - x| / |x|, in per cent; colours are logarithmic, over all formats."
    body = table(heads) + _closed("By layer", f'<div class="heats">{"".join(maps)}</div>')
    return section(title, text, body)


def _scales(found: Exploration) -> str:
    maps = []
    for what, caption in (("weights", "weights at 4 bits"), ("inputs", "inputs at 8 bits, per token")):
        rows = [row for row in found.layers.scales if row.what == what]
        for words, value in (("median scale", "median"), ("largest over median", "ratio")):
            cells = {}
            for row in rows:
                ratio = row.largest / max(row.median, 1e-12)
                shown = row.median if value == "median" else ratio
                cells[row.layer, row.kind] = (shown, f"{shown:.2g}", f"{row.least:g} to {row.largest:g}")
            if cells:
                values = [cell[0] for cell in cells.values() if cell[0] > 0]
                low, high = min(values, default=1.0), max(values, default=1.0)
                maps.append(layer_map(f"{words}, {caption}", cells, low, high))
    text = (
        "A scale is the distance between neighbouring numbers. Where the largest is many times the median, a "
        "few groups or tokens hold outliers, which a scale for all would have to cover."
    )
    return section("Scales", text, f'<div class="heats">{"".join(maps)}</div>')
