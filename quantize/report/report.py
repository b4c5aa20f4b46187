"""The report on a model's variants as one HTML file: what each one costs, lost, and may serve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Protocol

from quantize.card import Card, Outcome
from quantize.core.files import write_whole
from quantize.report.distributions import Distributions
from quantize.report.figures import loss_against_bytes
from quantize.report.inside import SensitivityRow, before_and_after, heat_maps
from quantize.report.page import document, framed, row, section, table, verdict
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
table.heat a { color: inherit; }
.small figure { padding: .7rem; } figcaption { font-size: .8rem; color: var(--muted); }
details { margin: 0 0 .8rem; } summary { cursor: pointer; padding: .4rem 0; font-weight: 600; }
.layers { margin-top: .8rem; } .layers details { margin: 0; }
.layers summary { font-weight: 400; padding: .15rem 0; } .layers .small { margin: .3rem 0 .8rem; }
.broken { color: var(--bad); }
"""


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
    kept: Sequence[str] = ()
    """Sentences on what stays at 16 bits: :class:`quantize.check.KeptRow`."""
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
        heat_maps(report.sensitivity),
        *(before_and_after(figures) for figures in report.distributions.values()),
        _circumstances(report),
        "<footer>KL is the mean Kullback-Leibler divergence of a variant's next-token distribution from the "
        "reference's, in nats per token, on the same tokens, through the engine that serves. Intervals hold "
        "95 % of the time. MB are millions of bytes.</footer>",
    ]
    return document(f"Tiercel: variants of {report.model}", "\n".join(filter(None, sections)), STYLE)


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
    return section("Loss against bytes", text, drawn + _points(measured))


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
    return section(f"{found.variant} and its controls", text, _loss_figure(measured) + table(rows))


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
    kept = "".join(f" {escape(one[0].upper() + one[1:])}." for one in report.kept)
    said = f"Bits are per weight of the matrices in blocks, scales included.{kept}"
    return section("Variants", said, table(rows))


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
    return section("Gates: which role a variant may serve", text, framed(heads, lines))


def _plans(report: Report) -> str:
    mixed = [card for card in report.cards if len(set(card.schemes.values())) > 1]
    if not mixed:
        return ""
    rows = [["module group", *(card.variant for card in mixed)]]
    names = dict.fromkeys(name for card in mixed for name in card.schemes)
    rows += [[name, *(card.schemes.get(name, "bf16") for card in mixed)] for name in names]
    body = f"<details><summary>{len(rows) - 1} module groups</summary>{table(rows)}</details>"
    return section("Plans", "The scheme of every module group in variants that mix schemes.", body)


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
    return section("What was measured where", "Kernels differ between processors and settings.", body)
