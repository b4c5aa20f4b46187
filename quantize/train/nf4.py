"""A frozen linear module in NF4 with double quantization, as QLoRA has it (arXiv:2305.14314), on any device.

Weights are 4-bit codes of the sixteen NormalFloat values, in blocks of 64 that share their largest absolute
value; these are 8-bit codes themselves, in blocks of 256 with one 32-bit scale, after their mean is taken
off: 4 + 8/64 + 32/(64 * 256) = 4.127 bits a weight. The matrix is made whole in each forward and backward
pass, in the type that is computed in, and is gone after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import linear, pad

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 64
"""Weights that share their largest absolute value."""
SCALES = 256
"""Such values that share a scale of their own."""
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""NormalFloat's values (appendix E of the paper)."""


class Packed:
    """A matrix (N, K) in NF4: ``codes`` (two a byte, the first in the high half), ``absmax`` (8-bit codes,
    one a block), ``scales`` (32-bit, one for 256 of those) and their common ``mean``."""

    def __init__(self, weight: Tensor) -> None:
        self.shape = weight.shape
        flat = weight.detach().float().reshape(-1)
        flat = pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
        largest = flat.abs().amax(1)
        self.mean = float(largest.mean())
        above = pad(largest - self.mean, (0, -len(largest) % SCALES)).view(-1, SCALES)
        self.scales = (above.abs().amax(1) / 127).clamp_min(1e-12)
        self.absmax = (above / self.scales[:, None]).round().to(torch.int8).view(-1)[: len(largest)]
        known = maxima(self.absmax, self.scales, self.mean)[:, None]
        levels = torch.tensor(LEVELS, device=flat.device)
        between = (levels[1:] + levels[:-1]) / 2
        codes = torch.bucketize(flat / known.clamp_min(1e-12), between).to(torch.uint8).view(-1, 2)
        self.codes = codes[:, 0] << 4 | codes[:, 1]


def maxima(absmax: Tensor, scales: Tensor, mean: float) -> Tensor:
    """The largest absolute value of each block as it is stored, in 32 bits."""
    return (absmax.float() * scales.repeat_interleave(SCALES)[: len(absmax)] + mean).clamp_min(0)


class Nf4Linear(nn.Linear):
    """A linear module whose weights do not change. ``weight`` holds the codes, so that adapters around it
    find its device."""

    absmax: Tensor
    scales: Tensor
    pairs: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        rows, columns = weight.shape
        super().__init__(columns, rows, bias=False, device="meta")
        packed = Packed(weight)
        self.mean = packed.mean
        self.weight = nn.Parameter(packed.codes, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_buffer("absmax", packed.absmax, persistent=False)
        self.register_buffer("scales", packed.scales, persistent=False)
        levels = torch.tensor(LEVELS, device=weight.device)
        pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)
        # Two 32-bit values looked up as one of 64 bits: half as many look-ups.
        self.register_buffer("pairs", pairs.view(torch.float64).view(-1), persistent=False)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The (N, K) matrix."""
        values = self.pairs.index_select(0, self.weight.int()).view(torch.float32).view(-1, BLOCK)
        values *= maxima(self.absmax, self.scales, self.mean)[:, None]
        count = self.out_features * self.in_features
        return values.view(-1)[:count].view(self.out_features, self.in_features).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return found

    @property
    def stored_bytes(self) -> int:
        """Of codes, maxima and scales."""
        return self.weight.nbytes + self.absmax.nbytes + self.scales.nbytes + 4


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


BITS = 4 + 8 / BLOCK + 32 / (BLOCK * SCALES)
"""Of a weight, scales included."""
