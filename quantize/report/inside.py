"""What is inside of variants: loss by layer and kind of module, weights and inputs before and after."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Protocol

from quantize.report.distributions import OUTLIER, Distributions, GroupFigures
from quantize.report.figures import activations_before_and_after, weights_before_and_after
from quantize.report.page import section, table
from quantize.report.tables import NOTHING


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


def heat_maps(sensitivity: Sequence[SensitivityRow]) -> str:
    """What each group loses at each scheme; empty without rows."""
    found: dict[str, dict[tuple[int, str], float]] = {}
    by_kl = any(one.kl is not None for one in sensitivity)
    for one in sensitivity:
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
    return section("Sensitivity", text, f'<div class="heats">{body}</div>')


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


def before_and_after(figures: Distributions) -> str:
    """Weights and inputs of a variant beside the base model's: three layers drawn, all in a table."""
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
    return section(f"Before and after: {figures.variant}", text, body)


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
