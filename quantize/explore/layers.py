"""Layer by layer: distributions of weights and inputs, their errors in every format, their scales, and how
far hidden states come from what they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from quantize.core.modules import Group
from quantize.explore.found import ErrorRow, Layers, ScaleRow
from quantize.explore.rounded import RoundedModel, weights_at
from quantize.make.linears import decoder_layers, observing
from quantize.make.statistics import first_of
from quantize.make.threads import side_by_side
from quantize.numerics.codebooks import k_means
from quantize.numerics.quantizers import quantizer
from quantize.report.distributions import GroupFigures, activation_figures, weight_figures

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT_FORMATS = (
    "int8", "int8-g64", "e4m3", "e5m2", "mxfp8", "int4", "int4-g64", "int4-g64-mse", "int4-g64-asym", "nf4",
    "e2m1-g16", "mxfp4", "log4-g64", "power4-g64", "kmeans4", "int3-g64-mse", "int2-g64-mse", "ternary-g64",
    "binary-g64",
)  # fmt: skip
"""``kmeans4`` has a codebook of 16 numbers per matrix."""
INPUT_FORMATS = ("int8-asym", "int8-narrow", "int8-tensor", "e4m3", "e5m2", "mxfp8", "int4-asym", "mxfp4")
SAMPLE = 1 << 17
"""Weights of a matrix that are looked at: whole rows at even distances."""
TOKENS = 512
"""Tokens that pass through for what is said of inputs and hidden states."""


def look(rounded: RoundedModel, sequences: Sequence[Sequence[int]], done: Callable[[int], object]) -> Layers:
    """Everything that is drawn by layer. ``done`` is told one more group as each is finished."""
    chosen = first_tokens(sequences, TOKENS)
    before = _inputs(rounded, chosen, lambda x: x.clone())
    with rounded.rounded("weights", 4):
        after = _inputs(rounded, chosen, lambda x: x.abs().amax(0, keepdim=True))
    errors: list[ErrorRow] = []
    scales: list[ScaleRow] = []

    def of(group: Group) -> tuple[list[ErrorRow], list[ScaleRow], GroupFigures]:
        weights = [_sampled(rounded.weight(member.name)) for member in group.members]
        rows = [_weight_error(group, weights, name) for name in WEIGHT_FORMATS]
        four = quantizer(weights_at(4))
        found = [_scale_row("weights", group, [four.scales(weight)[0] for weight in weights])]
        inputs = [before[name] for name in _firsts(group) if name in before]
        if inputs:
            rows += [_input_error(group, inputs, name) for name in INPUT_FORMATS]
            found.append(_scale_row("inputs", group, [quantizer("int8-asym").scales(x)[0] for x in inputs]))
        first = _firsts(group)[0]
        drawn = first in before and not group.kind.endswith("experts")
        activations = activation_figures(_largest(before[first]), _largest(after[first])) if drawn else None
        figures = GroupFigures(
            group=group.name,
            kind=group.kind,
            layer=group.layer,
            scheme=four.name,
            weights=weight_figures(_flat(weights), _flat([four.fake(weight) for weight in weights])),
            activations=activations,
        )
        done(1)
        return rows, found, figures

    made = side_by_side(of, list(rounded.modules))
    for more_errors, more_scales, _ in made:
        errors += more_errors
        scales += more_scales
    return Layers(
        errors=tuple(errors),
        scales=tuple(scales),
        groups=tuple(figures for _, _, figures in made),
        tokens=sum(map(len, chosen)),
    )


def first_tokens(sequences: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """Sequences in order until there are so many tokens; the last one is cut."""
    found: list[list[int]] = []
    left = tokens
    for sequence in sequences:
        if left <= 1:
            break
        found.append(list(sequence[:left]))
        left -= len(found[-1])
    return found


def _flat(parts: Sequence[Tensor]) -> Tensor:
    import torch

    return torch.cat([part.flatten() for part in parts])


def _firsts(group: Group) -> list[str]:
    """Linears whose inputs stand for all of the group's."""
    return list(dict.fromkeys(first_of(group, member.name) for member in group.members))


def _sampled(weight: Tensor) -> Tensor:
    """Rows at even distances, at most ``SAMPLE`` weights of them but one row at least."""
    rows = max(1, SAMPLE // weight.shape[1])
    return weight[:: max(1, -(-len(weight) // rows))]


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax(0)


def _inputs(
    rounded: RoundedModel, sequences: Sequence[Sequence[int]], kept: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """What goes into the first linear of those that share inputs, (tokens, K), or what is ``kept`` of it."""
    import torch

    wanted = {name for group in rounded.modules for name in _firsts(group)}
    seen: dict[str, list[Tensor]] = {}

    def see(name: str, x: Tensor) -> None:
        if name in wanted:
            seen.setdefault(name, []).append(kept(x.flatten(0, -2)))

    with observing(rounded.places, see), torch.inference_mode():
        for sequence in sequences:
            rounded.model(torch.tensor([list(sequence)]), use_cache=False)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def _weight_error(group: Group, weights: Sequence[Tensor], name: str) -> ErrorRow:
    if name == "kmeans4":
        import torch

        one = torch.tensor(1.0)
        rounded = [k_means(weight, 4).fake(weight, one) for weight in weights]
    else:
        rounded = [quantizer(name).fake(weight) for weight in weights]
    return _row("weights", group, name, weights, rounded)


def _input_error(group: Group, inputs: Sequence[Tensor], name: str) -> ErrorRow:
    return _row("inputs", group, name, inputs, [quantizer(name).fake(x) for x in inputs])


def _row(
    what: Literal["weights", "inputs"],
    group: Group,
    name: str,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
) -> ErrorRow:
    noise = sum(float((y - x).square().sum()) for x, y in zip(before, after, strict=True))
    signal = sum(float(x.square().sum()) for x in before)
    return ErrorRow(
        what=what,
        group=group.name,
        kind=group.kind,
        layer=group.layer,
        quantizer=name,
        error=float(f"{(noise / max(signal, 1e-300)) ** 0.5:.4g}"),
    )


def _scale_row(what: Literal["weights", "inputs"], group: Group, scales: Sequence[Tensor]) -> ScaleRow:
    together = _flat(scales)
    least, median, largest = together.min(), together.median(), together.max()
    return ScaleRow(
        what=what,
        group=group.name,
        kind=group.kind,
        layer=group.layer,
        least=float(f"{float(least):.4g}"),
        median=float(f"{float(median):.4g}"),
        largest=float(f"{float(largest):.4g}"),
    )


def hidden_states(rounded: RoundedModel, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """After every block, (tokens, hidden), without the first token of a sequence, whose state is of another
    size in many models."""
    import torch

    layers = decoder_layers(rounded.model)
    seen: list[list[Tensor]] = [[] for _ in layers]

    def hook(number: int) -> Any:
        def see(_module: Any, _inputs: Any, out: Any) -> None:
            hidden = out[0] if isinstance(out, tuple) else out
            seen[number].append(hidden[0, 1:].clone())

        return see

    handles = [layer.register_forward_hook(hook(number)) for number, layer in enumerate(layers)]
    try:
        with torch.inference_mode():
            for sequence in sequences:
                ids = torch.tensor([list(sequence)])
                rounded.model(ids, past_key_values=rounded.cache(), use_cache=True)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(parts) for parts in seen]


def drift(before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[float, ...]:
    """After each block, the median over tokens of |h' - h| / |h|."""
    found = []
    for clean, other in zip(before, after, strict=True):
        relative = (other - clean).norm(dim=-1) / clean.norm(dim=-1).clamp_min(1e-30)
        found.append(float(f"{float(relative.median()):.4g}"))
    return tuple(found)
