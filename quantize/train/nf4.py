"""A frozen linear module in NF4 with double quantization, as QLoRA has it (arXiv:2305.14314), on any device.

What ``quantizer("nf4-dq")`` comes to is kept as it is packed: two 4-bit codes a byte, an 8-bit float per 64
weights for what they are scaled by, and a 32-bit scale per 256 of those, after their mean is taken off:
4 + 8/64 + 32/(64 * 256) = 4.127 bits a weight. The matrix is made whole in each forward and backward pass, in
the type that is computed in, and is gone after it.

On a GPU bitsandbytes' module of the same format is taken where it is installed (:func:`whose`), whose kernels
write the matrix in one go. Its scales are kept in another 8-bit type, so that numbers differ a little.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn
from torch.nn.functional import linear, pad

from quantize.numerics.codebooks import NF4
from quantize.numerics.formats import E4M3
from quantize.numerics.granularity import Granularity
from quantize.numerics.quantizers import DOUBLE_BLOCK, NF_BLOCK, Quantizer, quantizer
from quantize.train.loop import TrainError

if TYPE_CHECKING:
    from torch import Tensor

Whose = Literal["tiercel", "bitsandbytes"]
"""Whose modules a base in NF4 is kept in."""
INNER = Quantizer(E4M3, Granularity("group", DOUBLE_BLOCK))
"""What scales are quantized by once more."""


class Nf4Linear(nn.Linear):
    """A linear module whose weights do not change. ``weight`` holds the codes, so that adapters around it
    find its device; the first of two is in the higher half of its byte."""

    scales: Tensor
    inner: Tensor
    ends: Tensor
    pairs: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        rows, columns = weight.shape
        super().__init__(columns, rows, bias=False, device="meta")
        double = quantizer("nf4-dq")
        single, _ = replace(double, stored="float32").scales(weight)
        mean = single.mean()
        found = INNER.quantize(single.reshape(1, -1) - mean)
        codes = pad(double.quantize(weight).codes.reshape(-1), (0, weight.numel() % 2)).view(-1, 2)
        self.weight = nn.Parameter(codes[:, 0] << 4 | codes[:, 1], requires_grad=False)
        if bias is not None:  # else None, as it was registered
            self.bias = nn.Parameter(bias, requires_grad=False)
        levels = NF4.levels().to(weight.device)
        pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)
        kept = {
            "scales": found.codes[0],
            "inner": found.scale,
            "ends": torch.stack([mean, single.min()]),
            # Two 32-bit values looked up as one of 64 bits: half as many look-ups.
            "pairs": pairs.view(torch.float64).view(-1),
        }
        for name, tensor in kept.items():
            self.register_buffer(name, tensor, persistent=False)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The (N, K) matrix."""
        rows, columns = self.out_features, self.in_features
        looked_up = self.pairs.index_select(0, self.weight.int()).view(torch.float32)
        values = looked_up[: rows * columns].view(rows, columns)
        wide = INNER.granularity.spread(self.inner, self.scales[None])
        scale = (E4M3.dequantize(self.scales[None], wide) + self.ends[0]).clamp_min(self.ends[1])
        scale = scale.view(rows, -1)
        if columns % NF_BLOCK == 0:
            values.view(rows, -1, NF_BLOCK).mul_(scale[..., None])
        else:
            values = values * scale.repeat_interleave(NF_BLOCK, 1)[:, :columns]
        return values.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return found

    @property
    def stored_bytes(self) -> int:
        """Of codes and scales."""
        return self.weight.nbytes + self.scales.nbytes + self.inner.nbytes + self.ends.nbytes


class _Product(torch.autograd.Function):
    """x W^T, of which nothing is kept for the backward pass but the codes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Nf4Linear) -> Tensor:
        ctx.module = module
        return linear(x, module.dequantized(x.dtype), module.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.module.dequantized(gradient.dtype), None


def whose(asked: str | None, device: torch.device | str) -> Whose:
    """Whose modules are taken: what is ``asked`` for, else bitsandbytes' on an accelerator where it is
    installed. Raises TrainError for an unknown name, and where it is not installed."""
    there = find_spec("bitsandbytes") is not None
    if asked is not None and asked not in get_args(Whose):
        raise TrainError(f"--nf4 {asked}: is unknown; give {' or '.join(get_args(Whose))}")
    if asked == "bitsandbytes" and not there:
        raise TrainError(
            "--nf4 bitsandbytes: it is not installed; pip install 'tiercel[qlora]', or leave the option out"
        )
    if asked is None:
        return "bitsandbytes" if there and torch.device(device).type != "cpu" else "tiercel"
    return "bitsandbytes" if asked == "bitsandbytes" else "tiercel"


def packed(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, by: Whose) -> nn.Linear:
    """The frozen module for a (N, K) ``weight``, on its device; bitsandbytes' computes in ``dtype``."""
    if by == "tiercel":
        return Nf4Linear(weight, bias)
    import bitsandbytes

    rows, columns = weight.shape
    format_of: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4"}
    module: nn.Linear = bitsandbytes.nn.Linear4bit(
        columns, rows, bias=False, compute_dtype=dtype, device="meta", **format_of
    )
    module.weight = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, blocksize=NF_BLOCK, module=module, **format_of
    )
    if bias is not None:
        module.bias = nn.Parameter(bias, requires_grad=False)
    return module.to(weight.device)  # which is where it rounds


BITS = 4 + 8 / NF_BLOCK + 32 / (NF_BLOCK * DOUBLE_BLOCK)
"""Of a weight, scales included."""
