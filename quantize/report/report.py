"""The report on a model's variants as one HTML file: what each one costs, lost, and may serve."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Protocol

from quantize.card import Card, Outcome
from quantize.core.files import write_whole
from quantize.report.distributions import OUTLIER, Distributions, GroupFigures
from quantize.report.figures import activations_before_and_after, loss_against_bytes, weights_before_and_after
from quantize.report.page import document, framed, row, table, verdict
from quantize.report.tables import (
    NOTHING,
    Point,
    accuracy_text,
    checks_of,
    kl_text,
    making_text,
    mean_kl_text,
    megabytes,
    noise_floor,
    paired_text,
    pareto,
    points,
    served_text,
    state_text,
)

SHOWN_LAYERS = 3
"""Layers whose distributions are drawn: first, middle and last; the table has all."""

STYLE = """
:root { --hot: #d55e00; --after: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --after: #56b4e9; } }
dd { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
.narrow { display: none; }
@media (max-width: 34rem) { .narrow { display: block; } .wide { display: none; } }
section > p { margin: 0 0 .8rem; max-width: 60rem; }
.heats { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: .8rem; }
table.heat caption { text-align: left; padding: .6rem .8rem .2rem; font-weight: 600; }
table.heat { font-size: .82rem; }
table.heat thead { position: static; clip-path: none; }
table.heat th, table.heat td { display: table-cell; padding: .3rem .5rem; text-align: right; }
table.heat tr { display: table-row; } table.heat tbody { display: table-row-group; }
table.heat td::before { content: none; }
table.heat thead th { font-size: .75rem; overflow-wrap: anywhere; }
table.heat th[scope=row] { font-weight: 500; color: var(--muted); width: 1%; }
.small { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: .8rem; }
.small figure { padding: .7rem; } figcaption { font-size: .8rem; color: var(--muted); }
details { margin: 0 0 .8rem; } summary { cursor: pointer; padding: .4rem 0; font-weight: 600; }
h3 { margin: 1rem 0 .5rem; }
.broken { color: var(--bad); }
"""


class SensitivityRow(Protocol):
    """What one module group loses at one scheme; :class:`quantize.plan.sensitivity.Row` is one."""

    @property
    def group(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def layer(self) -> int: ...
    @property
    def scheme(self) -> str: ...
    @property
    def kl(self) -> float | None: ...
    @property
    def fisher(self) -> float | None: ...


class ComparedRow(Protocol):
    """A planned variant, or a plan made without a planner: :class:`quantize.plan.controls.Compared`."""

    @property
    def label(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def kl(self) -> float: ...
    @property
    def half(self) -> float: ...
    @property
    def ratio(self) -> float | None: ...
    @property
    def low(self) -> float | None: ...
    @property
    def high(self) -> float | None: ...


class Comparison(Protocol):
    """A planned variant beside its controls; :class:`quantize.plan.controls.Controls` is one."""

    @property
    def variant(self) -> str: ...
    @property
    def measured_on(self) -> str: ...
    @property
    def conversations(self) -> int: ...
    @property
    def rows(self) -> Sequence[ComparedRow]: ...


@dataclass(frozen=True)
class Report:
    """Everything that the page shows. Only the cards are needed."""

    model: str
    cards: Sequence[Card]
    controls: Comparison | None = None
    sensitivity: Sequence[SensitivityRow] = ()
    distributions: Mapping[str, Distributions] = field(default_factory=dict)
    created: datetime = field(default_factory=lambda: datetime.now(UTC))


def write_report(report: Report, path: Path) -> None:
    """Write the page; a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, render_report(report))


def render_report(report: Report) -> str:
    """The page as text. Raises ValueError without cards."""
    if not report.cards:
        raise ValueError("a report needs at least one variant; make one with `tiercel quantize`")
    sections = [
        _header(report),
        _front(report),
        _controls(report),
        _variants(report),
        _gates(report),
        _plans(report),
        _heat_maps(report),
        *(_distributions(figures) for figures in report.distributions.values()),
        _circumstances(report),
        "<footer>KL is the mean Kullback-Leibler divergence of a variant's next-token distribution from the "
        "reference's, in nats per token, on the same tokens, through the engine that serves. Intervals hold "
        "95 % of the time. MB are millions of bytes.</footer>",
    ]
    return document(f"Tiercel: variants of {report.model}", "\n".join(filter(None, sections)), STYLE)


def _section(title: str, text: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n<p>{text}</p>\n{body}\n</section>"


def _reference(report: Report) -> Card | None:
    return next((card for card in report.cards if card.variant == card.reference), None)


def _header(report: Report) -> str:
    reference = _reference(report)
    serving = [card for card in report.cards if any(v.outcome == Outcome.PASSED for v in card.gate.values())]
    smallest = min(serving, key=lambda card: card.weight_bytes, default=None)
    tiles = {"variants": str(len(report.cards))}
    if reference:
        tiles["reference"] = f"{reference.variant}, {megabytes(reference.weight_bytes)}"
    if smallest:
        tiles["smallest that passed a gate"] = f"{smallest.variant}, {megabytes(smallest.weight_bytes)}"
    if (floor := noise_floor(report.cards)) is not None:
        tiles["noise floor, KL"] = kl_text(floor)
    body = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in tiles.items()
    )
    return (
        f"<header><h1>What each variant of {escape(report.model)} costs, and what it lost</h1>"
        f"<p>Written {report.created:%Y-%m-%d %H:%M} UTC.</p></header><dl>{body}</dl>"
    )


def _front(report: Report) -> str:
    reference = _reference(report)
    measured = points(report.cards)
    drawn = _loss_figure(
        measured,
        (reference.variant, reference.weight_bytes) if reference else None,
        noise_floor(report.cards) or None,
    )
    if not drawn:
        return ""
    text = "Dots are variants. The line is the Pareto front: no measured point is better in both."
    if any(point.low is not None for point in measured):
        text += " Bars are 95 % confidence intervals."
    return _section("Loss against bytes", text, drawn + _points(measured))


def _loss_figure(
    measured: Sequence[Point], reference: tuple[str, int] | None = None, noise: float | None = None
) -> str:
    """The picture in two widths, of which a page shows the one that fits; empty without points."""
    wide, narrow = (
        loss_against_bytes(measured, reference, noise, *size) for size in ((760, 430), (360, 420))
    )
    if not wide:
        return ""
    return f'<figure><div class="wide">{wide}</div><div class="narrow">{narrow}</div></figure>'


def _controls(report: Report) -> str:
    """The planned variant beside plans that were made without a planner, all on the same conversations."""
    found = report.controls
    if found is None:
        return ""
    measured = [
        Point(one.label, one.bytes, one.kl, one.kl - one.half, one.kl + one.half, one.kind != "planned")
        for one in found.rows
    ]
    rows = [["plan", "kind", "weights", "KL", f"KL of {found.variant} over it, 95 % interval"]]
    rows += [
        [
            one.label,
            one.kind,
            megabytes(one.bytes),
            f"{kl_text(one.kl)} ± {kl_text(one.half)}",
            NOTHING if one.ratio is None else f"{one.ratio:.2f} ({one.low:.2f} to {one.high:.2f})",
        ]
        for one in found.rows
    ]
    text = (
        f"Open diamonds are plans of at most the same bytes that were made without a planner. Measured on "
        f"{found.conversations} {escape(found.measured_on)}; other figures on this page are of other tokens."
    )
    return _section(f"{found.variant} and its controls", text, _loss_figure(measured) + table(rows))


def _points(measured: Sequence[Point]) -> str:
    """The picture as a table, by bytes: every label has a place there."""
    best = {point.name for point in pareto(measured)}
    rows = [["plan", "weights", "KL", "95 % interval", "Pareto front"]]
    rows += [
        [
            point.name,
            megabytes(point.bytes),
            kl_text(point.kl),
            NOTHING if point.low is None else f"{kl_text(point.low)} to {kl_text(point.high)}",
            "yes" if point.name in best else "no",
        ]
        for point in sorted(measured, key=lambda point: point.bytes)
    ]
    return f"<details><summary>The same as a table</summary>{table(rows)}</details>"


def _variants(report: Report) -> str:
    heads = [
        "variant",
        "scheme",
        "method",
        "weights",
        "bits",
        "KV/token",
        "KL",
        "99 % KL",
        "perplexity",
        "state",
    ]
    rows = [heads]
    for card in report.cards:
        text = card.evaluation.text if card.evaluation else None
        made_elsewhere = ", made elsewhere" if card.origin == "registered" else ""
        rows.append(
            [
                card.variant,
                card.scheme + (f", KV {card.kv}" if card.kv != "auto" else ""),
                card.method,
                megabytes(card.weight_bytes),
                f"{card.bits_per_weight:.2f}" if card.bits_per_weight else str(card.weight_bits),
                f"{card.kv_bytes_per_token:,} B",
                mean_kl_text(card),
                kl_text(text.kl_p99) if text else NOTHING,
                f"{text.perplexity:.4f}" if text else NOTHING,
                state_text(card) + made_elsewhere,
            ]
        )
    return _section("Variants", "Bits are per weight of the linear modules, scales included.", table(rows))


def _gates(report: Report) -> str:
    heads = ("variant", "role", "verdict", "right answers, 95 % interval", "other checks", "because")
    lines = [
        row(
            (
                escape(card.variant),
                escape(role),
                verdict(judged.outcome),
                escape(accuracy_text(card, role)),
                "<br>".join(
                    escape(f"{name}: {paired_text(found)}") for name, found in checks_of(card, role).items()
                )
                or NOTHING,
                escape("; ".join(judged.reasons)),
            ),
            heads,
        )
        for card in report.cards
        for role, judged in card.gate.items()
    ]
    if not lines:
        return ""
    text = "On held-out items, paired with the reference's answers to the same items."
    return _section("Gates: which role a variant may serve", text, framed(heads, lines))


def _plans(report: Report) -> str:
    mixed = [card for card in report.cards if len(set(card.schemes.values())) > 1]
    if not mixed:
        return ""
    rows = [["module group", *(card.variant for card in mixed)]]
    names = dict.fromkeys(name for card in mixed for name in card.schemes)
    rows += [[name, *(card.schemes.get(name, "bf16") for card in mixed)] for name in names]
    body = f"<details><summary>{len(rows) - 1} module groups</summary>{table(rows)}</details>"
    return _section("Plans", "The scheme of every module group in variants that mix schemes.", body)


def _heat_maps(report: Report) -> str:
    found: dict[str, dict[tuple[int, str], float]] = {}
    by_kl = any(one.kl is not None for one in report.sensitivity)
    for one in report.sensitivity:
        loss = getattr(one, "loss", one.kl) if by_kl else one.fisher
        if loss is not None:
            cells = found.setdefault(one.scheme, {})
            cells[one.layer, one.kind] = min(loss, cells.get((one.layer, one.kind), math.inf))
    if not found:
        return ""
    values = [value for cells in found.values() for value in cells.values() if value > 0]
    low, high = min(values, default=1.0), max(values, default=1.0)
    body = "\n".join(_heat_map(name, cells, low, high) for name, cells in found.items())
    what = "Mean KL" if by_kl else "Second-order estimate of the mean KL"
    text = (
        f"{what}, in thousandths of a nat, when one module group alone is quantized; "
        "by the best method where several were tried."
    )
    return _section("Sensitivity", text, f'<div class="heats">{body}</div>')


def _heat_map(scheme: str, cells: Mapping[tuple[int, str], float], low: float, high: float) -> str:
    """A scheme: layers down, kinds of module across; the colour is logarithmic over all schemes."""
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    lines = []
    for layer in sorted({layer for layer, _ in cells}):
        line = f'<tr><th scope="row">layer {layer}</th>'
        for kind in kinds:
            value = cells.get((layer, kind))
            line += "<td></td>" if value is None else _heat_cell(value, low, high)
        lines.append(line + "</tr>")
    heads = "".join(f'<th scope="col">{escape(_short(kind))}</th>' for kind in kinds)
    return (
        f'<div class="scroll"><table class="heat"><caption>{escape(scheme)}</caption>'
        f'<thead><tr><th scope="col"><span hidden>layer</span></th>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _short(kind: str) -> str:
    return kind.rpartition(".")[2].removesuffix("_proj")


def _heat_cell(value: float, low: float, high: float) -> str:
    share = math.log(max(value, low) / low) / (math.log(high / low) or 1)
    colour = f"color-mix(in srgb, var(--hot) {5 + 60 * share:.0f}%, var(--card))"
    return f'<td style="background:{colour}">{1000 * value:.3g}</td>'


def _distributions(figures: Distributions) -> str:
    layers = sorted({group.layer for group in figures.groups})
    places = {0, len(layers) // 2, len(layers) - 1}
    shown = [group for group in figures.groups if group.layer in {layers[place] for place in places}]
    weights = _small((group, weights_before_and_after(group.weights, _name(group))) for group in shown)
    body = "<h3>Weights</h3>" + weights
    seen = [(group, group.activations) for group in shown if group.activations]
    if seen:
        body += f"<h3>Activations: largest input of every channel, {figures.tokens:,} tokens</h3>"
        body += _small((group, activations_before_and_after(found, _name(group))) for group, found in seen)
    body += (
        f"<details><summary>All {len(figures.groups)} module groups</summary>{_figures(figures)}</details>"
    )
    text = (
        "The base model in grey, the variant in blue; "
        f"axes are logarithmic. Drawn: layers {', '.join(str(layers[place]) for place in sorted(places))}."
    )
    return _section(f"Before and after: {figures.variant}", text, body)


def _name(group: GroupFigures) -> str:
    return f"layer {group.layer} {_short(group.kind)}"


def _small(drawings: Iterable[tuple[GroupFigures, str]]) -> str:
    body = "".join(
        f"<figure>{drawing}<figcaption>{escape(_name(group))} · {escape(group.scheme)}</figcaption></figure>"
        for group, drawing in drawings
        if drawing
    )
    return f'<div class="small">{body}</div>'


def _figures(figures: Distributions) -> str:
    heads = ["module group", "scheme", "relative error", "largest weight"]
    rows = [[*heads, "largest input", "outlier channels", "which"]]
    for group in figures.groups:
        line = [group.group, group.scheme, f"{100 * group.weights.relative_error:.2f} %"]
        line.append(f"{group.weights.largest:.3g}")
        found = group.activations
        if found is None:
            line += [NOTHING] * 3
        else:
            line.append(f"{found.before[0]:.3g} → {found.after[0]:.3g}")
            line.append(f"{found.outlier_count_before} → {found.outlier_count_after}")
            line.append(", ".join(map(str, found.outliers_before)) or NOTHING)
        rows.append(line)
    note = f"<p>An outlier channel's largest input is more than {OUTLIER:g} times the median channel's.</p>"
    return note + table(rows)


def _circumstances(report: Report) -> str:
    heads = ["variant", "engine", "served as", "made with", "made in", "calibration", "version"]
    rows = [heads]
    for card in report.cards:
        engine = card.evaluation.engine if card.evaluation else {}
        used = card.calibration
        rows.append(
            [
                card.variant,
                ", ".join(f"{name} {value}" for name, value in engine.items() if value) or NOTHING,
                served_text(card.account) if card.account else NOTHING,
                ", ".join(f"{name} {value}" for name, value in card.versions.items()) or NOTHING,
                making_text(card),
                f"{used.source}, {used.samples:,} samples, {used.tokens:,} tokens" if used else NOTHING,
                card.version,
            ]
        )
    notes = "".join(
        f"<li>{escape(card.variant)}: {escape(note)}</li>"
        for card in report.cards
        for note in (*card.doubts, *card.notes)
    )
    body = table(rows) + (f"<ul>{notes}</ul>" if notes else "")
    return _section("What was measured where", "Kernels differ between processors and settings.", body)
