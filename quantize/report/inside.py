"""What is inside of variants: loss by layer and kind of module, weights and inputs before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Protocol

from quantize.report.distributions import OUTLIER, Distributions, GroupFigures
from quantize.report.figures import activations_before_and_after, weights_before_and_after
from quantize.report.page import section

Cell = tuple[float, str, str]
"""What colours a cell, what stands in it, and what is said to who points at it."""


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
    """A scheme: the colour is logarithmic over all schemes."""
    shown = {place: (value, f"{1000 * value:.3g}", "") for place, value in cells.items()}
    return layer_map(scheme, shown, low, high)


def layer_map(
    caption: str, cells: Mapping[tuple[int, str], Cell], low: float, high: float, to: str = ""
) -> str:
    """Layers down, kinds of module across. Layers are links to what ``to`` and their number name."""
    kinds = list(dict.fromkeys(kind for layer, kind in sorted(cells, key=lambda place: place[0] < 0)))
    lines = []
    for layer in sorted({layer for layer, _ in cells}, key=lambda layer: (layer < 0, layer)):
        name = _layer(layer)
        head = f'<a href="#{escape(to)}{layer}">{name}</a>' if to else name
        line = f'<tr><th scope="row">{head}</th>'
        for kind in kinds:
            found = cells.get((layer, kind))
            line += "<td></td>" if found is None else _heat_cell(found, low, high)
        lines.append(line + "</tr>")
    heads = "".join(f'<th scope="col">{escape(_short(kind))}</th>' for kind in kinds)
    return (
        f'<div class="scroll"><table class="heat"><caption>{escape(caption)}</caption>'
        f'<thead><tr><th scope="col"><span hidden>layer</span></th>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _layer(number: int) -> str:
    return f"layer {number}" if number >= 0 else "head"


def _short(kind: str) -> str:
    return kind.rpartition(".")[2].removesuffix("_proj")


def _heat_cell(cell: Cell, low: float, high: float) -> str:
    value, words, title = cell
    share = math.log(max(value, low) / low) / (math.log(high / low) or 1)
    colour = f"color-mix(in srgb, var(--hot) {5 + 60 * share:.0f}%, var(--card))"
    said = f' title="{escape(title)}"' if title else ""
    return f'<td style="background:{colour}"{said}>{words}</td>'


def before_and_after(figures: Distributions) -> str:
    """Weights and inputs of a variant beside the base model's: two maps of all layers, and each layer's
    drawings where somebody opens it."""
    to = f"{figures.variant}-layer-"
    body = f'<div class="heats">{_errors(figures, to)}{_outliers(figures, to)}</div>'
    layers: dict[int, list[GroupFigures]] = {}
    for group in sorted(figures.groups, key=lambda one: (one.layer < 0, one.layer)):
        layers.setdefault(group.layer, []).append(group)
    drawn = "".join(_drawn(layer, groups, to) for layer, groups in layers.items())
    body += f'<div class="layers">{drawn}</div>'
    text = (
        "How far weights are from the base model's, relative to their size, and how many channels of inputs "
        f"are outliers: their largest value, over {figures.tokens:,} tokens, is more than {OUTLIER:g} times "
        "the median channel's. A layer opens to its distributions, the base model in grey, the variant in "
        "blue, on logarithmic axes."
    )
    return section(f"Before and after: {figures.variant}", text, body)


def _errors(figures: Distributions, to: str) -> str:
    """The map of weights."""
    found = {}
    for group in figures.groups:
        error = 100 * group.weights.relative_error
        found[group.layer, group.kind] = (error, f"{error:.2g}", group.scheme)
    values = [error for error, _, _ in found.values() if error > 0]
    low, high = min(values, default=1.0), max(values, default=1.0)
    return layer_map("Error of weights, %", found, low, high, to)


def _outliers(figures: Distributions, to: str) -> str:
    """The map of inputs; empty without."""
    found = {}
    for group in figures.groups:
        if (seen := group.activations) is not None:
            before, after = seen.outlier_count_before, seen.outlier_count_after
            words = str(before) if before == after else f"{before} → {after}"
            title = f"largest {seen.before[0]:.3g} → {seen.after[0]:.3g} of {seen.channels} channels"
            found[group.layer, group.kind] = (1.0 + after, words, title)
    most = max((value for value, _, _ in found.values()), default=1.0)
    return layer_map("Outlier channels of inputs", found, 1.0, most, to) if found else ""


def _drawn(layer: int, groups: Sequence[GroupFigures], to: str) -> str:
    """The drawings of a layer's groups."""
    drawings = "".join(
        f"<figure>{drawing}<figcaption>{escape(words)}</figcaption></figure>"
        for group in groups
        for drawing, words in _pictures(group)
        if drawing
    )
    errors = ", ".join(f"{_short(one.kind)} {100 * one.weights.relative_error:.2g} %" for one in groups)
    return (
        f"<details><summary>{_layer(layer)}: {escape(errors)}</summary>"
        f'<div class="small" id="{escape(to)}{layer}">{drawings}</div></details>'
    )


def _pictures(group: GroupFigures) -> list[tuple[str, str]]:
    """Drawings of weights and of inputs, with what they show in figures."""
    name, seen = f"{_layer(group.layer)} {_short(group.kind)}", group.activations
    found = [(weights_before_and_after(group.weights, name), f"{name}, weights · {group.scheme}")]
    if seen is not None:
        which = f" ({', '.join(map(str, seen.outliers_before))})" if seen.outliers_before else ""
        count = f"{seen.outlier_count_before}{which} → {seen.outlier_count_after}"
        found.append((activations_before_and_after(seen, name), f"{name}, inputs · outlier channels {count}"))
    return found
