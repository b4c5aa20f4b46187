"""Advice for people: text with bars, and a page with the same in pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from deploy.advice.advise import Advice, ServingRow, TrainingRow
from quantize.check_costs import size
from quantize.report.figures import CHARACTER, draw_line, draw_text, svg
from quantize.report.page import PALETTE, document, table
from quantize.report.tables import align

BAR = 32
"""Characters of the longest bar."""
MOST_WIDTH = 118
_HIGH, _GAP, _LEFT, _WIDE = 22, 30, 12, 760
PARTS = ("weights", "gradients", "optimizer", "activations", "beside")


def format_advice(advice: Advice, tables: bool = True) -> str:
    """For a terminal: what to do and why, what to run, and what everything takes."""
    lines = [
        f"{advice.model}: {count_text(advice.parameters)} parameters, to {advice.goal} on {advice.hardware} "
        f"({advice.target}), {size(advice.memory)} of memory; contexts of {advice.context:,} tokens x "
        f"{advice.concurrency:,}; at most {advice.loss:g} % of right answers may be lost",
        *advice.assumed,
        "",
    ]
    for choice in advice.choices:
        cache = "16-bit" if choice.kv in ("auto", "F16") else choice.kv
        how = ", ".join(part for part in (choice.scheme, f"{cache} KV cache" if cache else "") if part)
        about = f" ({how}; {size(choice.bytes)})" if choice.bytes else ""
        lines += [f"=> {choice.technique}{about}", f"   because {choice.why}"]
        lines += [f"   {'then' if number else 'next'}: {text}" for number, text in enumerate(choice.commands)]
    lines += [f"measured of this model: {one}" for one in advice.cards]
    lines += ["", "not advised:", *(f"  {names}: {why}" for names, why in _together(advice.against))]
    if advice.measured:
        lines += ["", "measured here, beside what is usually said:"]
        lines += [
            f"  {'«' + one.textbook + '»: ' if one.textbook else ''}{one.here} ({one.document})"
            for one in advice.measured
        ]
    if tables:
        lines += ["", *_tables(advice)]
    return "\n".join(lines)


def _together(reasons: Mapping[str, str]) -> list[tuple[str, str]]:
    """Techniques with the same reason in one line."""
    same: dict[str, list[str]] = {}
    for name, why in reasons.items():
        same.setdefault(why, []).append(name)
    return [(", ".join(names), why) for why, names in same.items()]


def count_text(parameters: int) -> str:
    """Parameters for people."""
    return f"{parameters / 1e9:.3g} B" if parameters >= 1e9 else f"{parameters / 1e6:.3g} M"


def _tables(advice: Advice) -> list[str]:
    most = max(row.bytes for row in advice.weights)
    rows = [["weights", "bits", "bytes", ""]]
    rows += [[row.what, f"{row.bits:.4g}", size(row.bytes), _bar(row.bytes, most)] for row in advice.weights]
    lines = [align(rows), ""]
    rows = [["KV cache", "a token", f"{advice.context:,} x {advice.concurrency:,}", ""]]
    rows += [
        [row.kv, f"{row.bytes_per_token:,} B", size(row.bytes), f"no: {row.problem}" if row.problem else ""]
        for row in advice.kv
    ]
    lines += [align(rows), ""]
    if advice.serving:
        rows = [["served", "KV cache", "weights", "cache", "beside", "in all", ""]]
        rows += [
            [
                *(row.weights, row.kv),
                *map(size, (row.weight_bytes, row.kv_bytes, row.overhead, row.bytes)),
                _held(row),
            ]
            for row in advice.serving
        ]
        lines += [align(rows), ""]
    rows = [["trained", *PARTS, "in all", ""]]
    rows += [[row.way, *map(size, _parts(row)), size(row.bytes), _fits(row)] for row in advice.training]
    lines += [align(rows)]
    lines += [f"{row.way}: {row.what}" for row in advice.training]
    lines.append(
        f"activations: a micro-batch of {advice.training[0].tokens:,} tokens with gradient checkpointing; "
        "beside: libraries and a device's context"
    )
    return lines


def _held(row: ServingRow) -> str:
    """Whether it fits, on how many GPUs, and how often."""
    if row.problem:
        full = " needs " in row.problem and "GiB" in row.problem
        return "does not fit" if full else f"no: {row.problem}"[:MOST_WIDTH]
    split = f", on {row.gpus} GPUs" if row.gpus > 1 else ""
    return f"fits{split}" + (f", {row.replicas} times" if row.replicas > 1 else "")


def _fits(row: TrainingRow) -> str:
    return "" if row.fits is None else "fits" if row.fits else "does not fit"


def _parts(row: TrainingRow) -> tuple[int, int, int, int, int]:
    return row.weights, row.gradients, row.optimizer, row.activations, row.overhead


def _bar(value: int, most: int) -> str:
    return "█" * max(1, round(BAR * value / most))


def advice_page(advice: Advice) -> str:
    """The advice as one HTML page."""
    body = [f"<h1>Advice: {escape(advice.model)}</h1>", f"<p>{escape(_situation(advice))}</p>"]
    for choice in advice.choices:
        typed = "".join(f"<br><code>{escape(text)}</code>" for text in choice.commands)
        body.append(f"<h2>{escape(choice.technique)}</h2><p>Because {escape(choice.why)}.{typed}</p>")
    serving = [
        (f"{row.weights}, KV {row.kv}", (row.weight_bytes, row.kv_bytes, row.overhead))
        for row in advice.serving
    ]
    training = [(row.way, _parts(row)) for row in advice.training]
    weights = [(row.what, (row.bytes,)) for row in advice.weights]
    drawn: tuple[tuple[str, Sequence[str], Sequence[tuple[str, Sequence[int]]], int], ...] = (
        ("Memory of serving", ("weights", "KV cache", "beside"), serving, advice.memory),
        ("Memory of training", PARTS, training, advice.training_memory),
        ("Weights", ("weights",), weights, advice.memory),
    )
    for title, parts, bars, memory in drawn:
        if bars:
            body.append(f"<h2>{title}</h2><figure>{_stacked(title, parts, bars, memory)}</figure>")
    body.append(
        "<h2>Not advised</h2>" + table([["techniques", "why"], *map(list, _together(advice.against))])
    )
    if advice.measured:
        rows = [["usually said", "measured here", "document"]]
        rows += [[one.textbook or "-", one.here, one.document] for one in advice.measured]
        body.append("<h2>Measured here</h2>" + table(rows))
    return document(f"Advice: {advice.model}", "\n".join(body), "code { color: var(--ink); }")


def _situation(advice: Advice) -> str:
    return " ".join(
        [
            f"{count_text(advice.parameters)} parameters, to {advice.goal} on {advice.hardware} "
            f"({advice.target}), {size(advice.memory)}. {advice.context:,} tokens x {advice.concurrency:,}, "
            f"{advice.loss:g} % may be lost.",
            *(f"{one[0].upper()}{one[1:]}." for one in advice.assumed),
        ]
    )


def _stacked(title: str, names: Sequence[str], bars: Sequence[tuple[str, Sequence[int]]], memory: int) -> str:
    """A bar per row, its parts beside each other by ``names``, and a line where ``memory`` ends, if any."""
    most = max(memory, *(sum(parts) for _, parts in bars))
    scale = (_WIDE - _LEFT - 100) / most
    drawn, height = _legend(names), len(bars) * (_HIGH + _GAP) + 48
    for number, (name, parts) in enumerate(bars):
        y, x = number * (_HIGH + _GAP) + 46, float(_LEFT)
        drawn.append(draw_text(_LEFT, y - 5, name, colour="--ink"))
        for part, colour in zip(parts, PALETTE, strict=False):
            width = part * scale
            drawn.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_HIGH}" fill="{colour}"/>')
            x += width
        drawn.append(draw_text(x + 6, y + 15, size(sum(parts))))
    if memory:
        at, left = _LEFT + memory * scale, memory > most / 3
        place, anchor = (at - 4, "end") if left else (at + 4, "start")
        drawn.append(draw_line(at, 26, at, height, "var(--bad)", 'stroke-dasharray="4 4"'))
        drawn.append(draw_text(place, height - 4, f"memory, {size(memory)}", anchor, "--bad"))
    return svg(_WIDE, height, title, drawn)


def _legend(names: Sequence[str]) -> list[str]:
    drawn, x = list[str](), float(_LEFT)
    for name, colour in zip(names, PALETTE, strict=False):
        drawn.append(f'<rect x="{x:.0f}" y="4" width="12" height="12" fill="{colour}"/>')
        drawn.append(draw_text(x + 17, 14, name))
        x += 17 + CHARACTER * len(name) + 22
    return drawn
