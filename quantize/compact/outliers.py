"""A quantized matrix with a few weights beside it that stay in 16 bits (SpQR, Dettmers et al.,
arXiv:2306.03078, with one level of scales).

Which weights those are follows from ranges, and ranges from which weights they hold: both are found in turns,
and the best of them stays. An error is E[x²] (ŵ - w)². Ranges that cut nothing off (``minmax``) leave the
largest weights no error; take those that do (``mse``, ``importance``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantize.numerics.quantizers import Quantizer

if TYPE_CHECKING:
    from torch import Tensor

TURNS = 3
OUTLIER_BITS = 16 + 16
"""Of an outlier: its value and its column."""
ROW_BITS = 32
"""Of a row: where its outliers begin."""


@dataclass(frozen=True)
class KeptHigh:
    """``weight`` (N, K) is what both stand for; ``bits`` is what both take."""

    weight: Tensor
    outliers: int
    bits: float


def kept_high(weight: Tensor, form: Quantizer, share: float, importance: Tensor | None = None) -> KeptHigh:
    """Quantize a float32 (N, K) ``weight`` but for the ``share`` with the largest errors.

    ``importance`` is E[x²] (K,); without it all inputs count alike.
    """
    import torch

    count = round(share * weight.numel())
    columns = torch.ones(weight.shape[1], device=weight.device) if importance is None else importance.float()
    none = torch.zeros_like(weight, dtype=torch.bool)
    best = _rounded(weight, none, form, columns)
    # Ranges that the largest weights have widened show no errors of these: it is begun without them as well.
    for errors in (_errors(weight, best, columns), weight.square() * columns) if count else ():
        high = _largest(errors, count)
        for _ in range(TURNS):
            other = _rounded(weight, high, form, columns)
            both = torch.where(high, weight, other)
            if _errors(weight, both, columns).sum() < _errors(weight, best, columns).sum():
                best = both
            high = _largest(_errors(weight, other, columns), count)
    shape = (weight.shape[0], weight.shape[1])
    bits = form.bits_per_number(shape) * weight.numel()
    if count:
        bits += count * OUTLIER_BITS + weight.shape[0] * ROW_BITS
    return KeptHigh(best, count, bits)


def _errors(weight: Tensor, other: Tensor, columns: Tensor) -> Tensor:
    return (other - weight).square() * columns


def _largest(of: Tensor, count: int) -> Tensor:
    """True at the ``count`` largest."""
    import torch

    chosen = torch.zeros(of.numel(), dtype=torch.bool, device=of.device)
    chosen[of.flatten().topk(count).indices] = True
    return chosen.reshape(of.shape)


def _rounded(weight: Tensor, high: Tensor, form: Quantizer, columns: Tensor) -> Tensor:
    """All weights as they come back, of ranges of those alone that are not kept high."""
    # Zero lies in every range, so that what is taken out widens none.
    scale, zero = form.scales(weight.masked_fill(high, 0.0), columns * ~high)
    wide_zero = None if zero is None else form.granularity.spread(zero, weight)
    found: Tensor = form.form.fake(weight, form.granularity.spread(scale, weight), wide_zero)
    return found
