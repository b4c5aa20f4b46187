"""Weights and activations of a variant beside those of the base model, in figures small enough to keep.

Weights are compared module group by module group: both histograms over the same bins, quantiles, and the
relative error. Activations are the inputs of each group: the largest absolute value per channel while the
calibration sequences pass through, in the base model and in the variant with its weights dequantized (and
with what a transform folded into its norms). Inputs are recorded before they are rounded: they are what
a scheme with quantized activations has to represent. Experts' inputs are left out.

A channel is an outlier when its largest value is more than ``OUTLIER`` times the median channel's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from quantize.core.checkpoint import Checkpoint
from quantize.core.dequantize import linear_weight, read_tensor
from quantize.core.loading import load_model
from quantize.core.modules import Group, Modules
from quantize.core.schemes import scheme
from quantize.core.tensors import Part, read_parts

if TYPE_CHECKING:
    from torch import Tensor

BINS = 65
"""An odd number, so that zero is in the middle of one."""
QUANTILES = (0.001, 0.01, 0.25, 0.5, 0.75, 0.99, 0.999)
CURVE_POINTS = 64
OUTLIER = 6.0
LISTED_OUTLIERS = 8
SAMPLE = 1 << 18
"""Weights of a group that quantiles are taken of, which sorts them; more are thinned evenly."""


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WeightFigures(_Frozen):
    """All members of a group together. Histograms are shares of the weights per bin."""

    largest: float = Field(description="the bins reach from minus this to this")
    before: tuple[float, ...]
    after: tuple[float, ...]
    quantiles_before: tuple[float, ...] = Field(description=f"at {', '.join(map(str, QUANTILES))}")
    quantiles_after: tuple[float, ...]
    relative_error: float = Field(description="|after - before| / |before|, Frobenius norms")


class ActivationFigures(_Frozen):
    """Largest absolute input per channel, over all tokens: the sorted curve, thinned, and the outliers."""

    channels: int
    before: tuple[float, ...] = Field(description="from the largest channel to the smallest")
    after: tuple[float, ...]
    outliers_before: tuple[int, ...] = Field(description="channels, the largest first; at most eight")
    outliers_after: tuple[int, ...]
    outlier_count_before: int
    outlier_count_after: int


class GroupFigures(_Frozen):
    group: str
    kind: str
    layer: int
    scheme: str
    weights: WeightFigures
    activations: ActivationFigures | None = None


class Distributions(_Frozen):
    """All groups of one version of a variant."""

    variant: str
    version: str
    tokens: int = Field(description="that passed through for the activations; 0 when there are none")
    groups: tuple[GroupFigures, ...]


def compute_distributions(
    base: Checkpoint,
    modules: Modules,
    directory: Path,
    schemes: Mapping[str, str],
    inputs: Inputs | None = None,
    *,
    variant: str = "",
    version: str = "",
) -> Distributions:
    """Compare the files in ``directory`` with ``base``. ``schemes`` is by group name, as in a card.

    Without ``inputs`` there are no activations.
    """
    ours, theirs = read_parts(base.path), read_parts(directory)
    maxima = inputs.beside(directory, schemes) if inputs is not None else {}
    groups = tuple(
        GroupFigures(
            group=group.name,
            kind=group.kind,
            layer=group.layer,
            scheme=schemes.get(group.name, "bf16"),
            weights=_weights(group, ours, theirs, schemes.get(group.name, "bf16")),
            activations=activation_figures(*maxima[group.name]) if group.name in maxima else None,
        )
        for group in modules
    )
    tokens = inputs.tokens if inputs is not None else 0
    return Distributions(variant=variant, version=version, tokens=tokens, groups=groups)


def _weights(
    group: Group, ours: Mapping[str, Part], theirs: Mapping[str, Part], scheme_name: str
) -> WeightFigures:
    import torch

    how = scheme(scheme_name)
    before = torch.cat([read_tensor(ours[f"{m.name}.weight"]).float().flatten() for m in group.members])
    after = torch.cat([linear_weight(theirs, m.name, how).flatten() for m in group.members])
    return weight_figures(before, after)


def weight_figures(before: Tensor, after: Tensor) -> WeightFigures:
    """Of the same weights, flat, float32."""
    import torch

    largest = max(float(before.abs().max()), float(after.abs().max()), 1e-12)
    error = float((after - before).norm() / before.norm().clamp_min(1e-12))

    def histogram(values: Tensor) -> tuple[float, ...]:
        counts = torch.histc(values, BINS, -largest, largest)
        return tuple(_short(share) for share in (counts / counts.sum()).tolist())

    def quantiles(values: Tensor) -> tuple[float, ...]:
        thinned = values[:: 1 + len(values) // SAMPLE]
        return tuple(_short(at) for at in torch.quantile(thinned, torch.tensor(QUANTILES)).tolist())

    return WeightFigures(
        largest=largest,
        before=histogram(before),
        after=histogram(after),
        quantiles_before=quantiles(before),
        quantiles_after=quantiles(after),
        relative_error=_short(error),
    )


def _short(value: float) -> float:
    return float(f"{value:.4g}")


class Inputs:
    """Largest inputs of every group while ``sequences`` of token ids pass through, one at a time: of the base
    model, once for all variants, and of each variant. Memory is one model in 32 bits beside one layer."""

    def __init__(self, base: Checkpoint, modules: Modules, sequences: Sequence[Sequence[int]]) -> None:
        import torch

        self._modules, self._sequences = modules, sequences
        self._model: Any = load_model(base, torch.float32)
        self._before = _pass_through(self._model, modules, sequences)
        self.tokens = sum(map(len, sequences))

    def beside(self, directory: Path, schemes: Mapping[str, str]) -> dict[str, tuple[Tensor, Tensor]]:
        """Group name to the largest absolute inputs (channels,) before and with the variant's weights."""
        import torch

        parts = read_parts(directory)
        linears = {f"{m.name}.weight": (m.name, group.name) for group in self._modules for m in group.members}
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                if name in linears:
                    module, group_name = linears[name]
                    parameter.copy_(linear_weight(parts, module, scheme(schemes.get(group_name, "bf16"))))
                elif name in parts:
                    parameter.copy_(read_tensor(parts[name]).float())
        after = _pass_through(self._model, self._modules, self._sequences)
        return {name: (before, after[name]) for name, before in self._before.items()}


def _pass_through(model: Any, modules: Modules, sequences: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    import torch

    largest: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_module: Any, inputs: tuple[Tensor, ...]) -> None:
            now = inputs[0].detach().abs().flatten(0, -2).amax(0)
            largest[name] = torch.maximum(largest[name], now) if name in largest else now

        return hook

    hooks = [
        model.get_submodule(member.name).register_forward_pre_hook(watch(group.name))
        for group in modules
        for member in group.members[:1]  # fused modules read the same input
        if _has(model, member.name)
    ]
    try:
        with torch.inference_mode():
            for sequence in sequences:
                model(torch.tensor([list(sequence)]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return largest


def _has(model: Any, name: str) -> bool:
    """Experts are one tensor of all experts in transformers, so that there is no module to watch."""
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def activation_figures(before: Tensor, after: Tensor) -> ActivationFigures:
    """Of the largest absolute values per channel, (channels,) each."""
    return ActivationFigures(
        channels=len(before),
        before=_curve(before),
        after=_curve(after),
        outliers_before=outliers(before)[:LISTED_OUTLIERS],
        outliers_after=outliers(after)[:LISTED_OUTLIERS],
        outlier_count_before=len(outliers(before)),
        outlier_count_after=len(outliers(after)),
    )


def outliers(largest: Tensor) -> tuple[int, ...]:
    """Channels (of a vector) beyond ``OUTLIER`` times the median, the largest first."""
    order = largest.argsort(descending=True)
    found = order[largest[order] > OUTLIER * largest.median()]
    return tuple(int(channel) for channel in found)


def _curve(largest: Tensor) -> tuple[float, ...]:
    """Sorted, and thinned to ``CURVE_POINTS`` with both ends kept."""
    import torch

    ranked = largest.sort(descending=True).values
    places = torch.linspace(0, len(ranked) - 1, min(CURVE_POINTS, len(ranked))).round().long()
    return tuple(_short(value) for value in ranked[places].tolist())


def save_distributions(figures: Distributions, path: Path) -> None:
    """As JSON; a reader sees a whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_text(json.dumps(figures.model_dump(mode="json"), separators=(",", ":")), encoding="utf-8")
    partial.rename(path)


def load_distributions(path: Path) -> Distributions | None:
    """What was kept, or None when there is nothing or it is of another format: compute it again."""
    try:
        return Distributions.model_validate_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
