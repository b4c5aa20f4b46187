"""Scales of an E4M3 KV cache, from the largest keys and values that calibration saw."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantize.core.checkpoint import Checkpoint
from quantize.core.modules import Modules
from quantize.make.blocks import serving_dtype
from quantize.make.smooth import Scales, ScaleStore
from quantize.make.streaming import QuantizeError
from quantize.numerics.formats import E4M3

if TYPE_CHECKING:
    from torch import Tensor

KV_SCALES = (".k_scale", ".v_scale")


def kv_scales(
    largest: Mapping[int, tuple[float, Tensor]],
    modules: Modules,
    checkpoint: Checkpoint,
    smoothing: ScaleStore | None,
) -> dict[str, Tensor]:
    """Two tensors (1,) for each block, in the type that is served, as llm-compressor stores them.

    ``largest`` are a block's largest |key|, and its largest |value| by head and channel; with ``smoothing``
    the values are those of the smoothed model. Raises QuantizeError where they are not finite.
    """
    import torch

    inside = {
        group.layer: group.name.partition(".self_attn.")[0] + ".self_attn"
        for group in modules
        if ".self_attn." in group.name
    }
    dtype, found = serving_dtype(checkpoint), {}
    for layer, (keys, values) in largest.items():
        attention = inside[layer]
        if smoothing is not None:
            values = _smoothed(values, attention, smoothing.of(layer))
        for leaf, most in zip(KV_SCALES, (keys, float(values.amax())), strict=True):
            if not math.isfinite(most):
                raise QuantizeError(
                    f"calibration's keys or values of {attention} are not finite; the model overflows the "
                    "type that it is served in, or its checkpoint is damaged"
                )
            scale = torch.tensor([max(most, 1e-6) / E4M3.top], dtype=torch.float32)
            found[attention + leaf] = scale.to(dtype)
    return found


def _smoothed(values: Tensor, attention: str, scales: Scales) -> Tensor:
    for leaf in ("v_proj", "qkv_proj"):
        if (rows := scales.get(f"{attention}.{leaf}.rows")) is not None:
            values = values.cpu() / rows[-values.numel() :].view(values.shape)
    return values
