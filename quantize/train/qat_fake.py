"""Fake quantization that gradients pass through, and the tensors that are trained under it.

A latent weight w at step size s and zero point z computes as ŵ:

    q = clamp(round(w / s) + z, low, high)        ŵ = (q - z) s
    dŵ/dw  1 where nothing is clipped; else 0 (saturating) or 1 (plain straight-through, arXiv:1308.3432)
    dŵ/ds  round(w / s) - w / s where nothing is clipped, else q - z  (learned step sizes, LSQ,
    arXiv:1902.08153)

Of E4M3 q is w / s rounded to that type, within ±448. Step sizes are trained as logarithms, and rounded to the
type in which they are stored before anything is divided by them: so q and s, as they are stored, stand for ŵ
bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantize.make.ranges import FP8_MAX, Grid

CELL = 0.49
"""How far from the middle of its rounding cell a latent weight begins, in steps, at most."""
Range = tuple[int, int] | None
"""Least and largest integer; None for E4M3."""


class _FakeQuantize(torch.autograd.Function):
    """(N, K) weights at scales (N, G) and zero points (N, G), ``size`` columns to a scale."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        limits: Range,
        size: int,
        saturating: bool,
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, zero)
        ctx.limits, ctx.size, ctx.saturating = limits, size, saturating
        step = scale.unsqueeze(-1)
        rows = _grouped(weight, scale.shape[1], size)
        q = _rounded(rows / step, _wide(zero), limits)
        return _flat(q.mul_(step), weight.shape[1])

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        weight, scale, zero = ctx.saved_tensors
        slope = _grouped(slopes[0], scale.shape[1], ctx.size)
        ratio = _grouped(weight, scale.shape[1], ctx.size) / scale.unsqueeze(-1)
        offset = _wide(zero)
        inside = _inside(ratio, offset, ctx.limits)
        by_step = _rounded(ratio.clone(), offset, ctx.limits).sub_(ratio.mul_(inside))
        of_scale = by_step.mul_(slope).sum(-1)
        of_weight = slope * inside if ctx.saturating else slope
        return _flat(of_weight, weight.shape[1]), of_scale, None, None, None, None


def _rounded(ratio: Tensor, zero: Tensor | None, limits: Range) -> Tensor:
    """q - z of w / s; ``ratio`` is used up."""
    if limits is None:
        return ratio.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()
    ratio = ratio.round_()
    if zero is None:
        return ratio.clamp_(*limits)
    return ratio.add_(zero).clamp_(*limits).sub_(zero)


def _inside(ratio: Tensor, zero: Tensor | None, limits: Range) -> Tensor:
    """Where rounding is not clipped."""
    if limits is None:
        return ratio.abs() <= FP8_MAX
    rounded = ratio.round() if zero is None else ratio.round().add_(zero)
    return (rounded >= limits[0]) & (rounded <= limits[1])


def _grouped(matrix: Tensor, groups: int, size: int) -> Tensor:
    if missing := groups * size - matrix.shape[1]:
        matrix = torch.nn.functional.pad(matrix, (0, missing))
    return matrix.reshape(len(matrix), groups, size)


def _flat(rows: Tensor, columns: int) -> Tensor:
    return rows.reshape(len(rows), -1)[:, :columns]


def _wide(zero: Tensor | None) -> Tensor | None:
    return None if zero is None else zero.unsqueeze(-1)


def fake_quantize(
    weight: Tensor, scale: Tensor, zero: Tensor | None, limits: Range, size: int, saturating: bool = True
) -> Tensor:
    """ŵ of float32 (N, K) ``weight``: see the module's text. ``scale`` and ``zero`` are float32 (N,
    groups)."""
    made: Tensor = _FakeQuantize.apply(weight, scale, zero, limits, size, saturating)  # type: ignore[no-untyped-call]
    return made


class StoredScale:
    """Step sizes of any shape in their stored 16 bits, trained as logarithms of what they change by."""

    def __init__(self, stored: Tensor, start: Tensor) -> None:
        """``start`` are values in 32 bits that are rounded to ``stored``; what is not begins at it itself."""
        wide = stored.float()
        change = torch.where(wide > 0, (start / wide).log(), 0.0)
        same = (wide * change.exp()).to(stored.dtype) == stored
        self.stored, self.change = stored, torch.where(same, change, 0.0)

    def value(self) -> Tensor:
        """As they are stored, in float32; gradients pass through the rounding."""
        return rounded_to(self.stored.float() * self.change.exp(), self.stored.dtype)


def rounded_to(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 values rounded to ``dtype``; gradients pass as if they were not.

    The sum is exact: a value and what it is rounded to are within a factor of two (Sterbenz's lemma).
    """
    return wide + (wide.to(dtype).float() - wide).detach()


@dataclass
class TrainedWeight:
    """One matrix: latent weights (N, K), step sizes (N, groups), fixed zero points (N, groups)."""

    latent: Tensor
    scale: StoredScale
    zero: Tensor | None
    limits: Range
    size: int
    saturating: bool = True

    @classmethod
    def begin(
        cls, codes: Tensor, scale: StoredScale, grid: Grid, original: Tensor | None, saturating: bool
    ) -> TrainedWeight:
        """From stored integers ``codes`` (N, K), which the first pass gives again whatever ``original`` is.

        The latent weights are those of the unquantized model as far as their cell of the grid reaches, and
        the middle of the cell where ``original`` is None.
        """
        limits = None if grid.low is None or grid.high is None else (grid.low, grid.high)
        step, zero = grid.columns(codes.shape[1])
        middle = codes.float() if zero is None else codes.float() - zero
        latent = middle * step
        if original is not None and limits is not None:
            latent = torch.maximum(torch.minimum(original / step, middle + CELL), middle - CELL) * step
        elif original is not None:
            kept = (original / step).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() == middle
            latent = torch.where(kept, original, latent)
        return cls(latent, scale, grid.zero, limits, grid.size, saturating)

    def fake(self) -> Tensor:
        """ŵ, float32 (N, K)."""
        return fake_quantize(
            self.latent, self.scale.value(), self.zero, self.limits, self.size, self.saturating
        )

    def grid(self) -> Grid:
        """The grid as it is now."""
        low, high = self.limits or (None, None)
        return Grid(self.scale.value().detach(), self.zero, low, high, self.size)

    def codes(self) -> Tensor:
        """q as it is stored: int8 or E4M3, (N, K)."""
        with torch.no_grad():
            scale = self.scale.value()
            ratio = _grouped(self.latent, scale.shape[1], self.size) / scale.unsqueeze(-1)
            q = _flat(_rounded(ratio, _wide(self.zero), self.limits), self.latent.shape[1])
            if self.limits is None:
                return q.to(torch.float8_e4m3fn)
            zero = self.grid().columns(q.shape[1])[1]
            return (q if zero is None else q + zero).to(torch.int8)


@dataclass
class TrainedNorm:
    """A norm's weights (K,), in their stored 16 bits: what they change by is trained, relative to what they
    were."""

    stored: Tensor
    change: Tensor

    def value(self) -> Tensor:
        """As they are stored, in float32."""
        return rounded_to(self.stored.float() * (1 + self.change), self.stored.dtype)


def fake_tensor(x: Tensor, scale: Tensor, limits: Range) -> Tensor:
    """Values of any shape at one step size (1,): inputs with a fixed scale, keys, values."""
    made = fake_quantize(x.float().reshape(1, -1), scale.reshape(1, 1), None, limits, x.numel())
    return made.reshape(x.shape).to(x.dtype)
