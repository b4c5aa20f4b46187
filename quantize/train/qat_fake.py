"""Fake quantization that gradients pass through, and the tensors that are trained under it.

A latent weight w at step size s and zero point z computes as ŵ:

    q = clamp(round(w / s + z), low, high)        ŵ = (q - z) s
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

from quantize.make.ranges import Grid, rounded
from quantize.numerics.formats import Format, Integer

CELL = 0.25
"""How far from the middle of its rounding cell a latent weight begins, in steps, at most. GPTQ leaves many
weights outside of their cells: begun at its edge, they would all go back at the first steps (0.49: twenty
times the loss after five steps)."""


class _FakeQuantize(torch.autograd.Function):
    """(N, K) weights at scales (N, G) and zero points (N, G), ``size`` columns to a scale."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        form: Format,
        size: int,
        saturating: bool,
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, zero)
        ctx.form, ctx.size, ctx.saturating = form, size, saturating
        rows = _grouped(weight, scale.shape[1], size)
        return _flat(form.fake(rows, scale.unsqueeze(-1), _wide(zero)), weight.shape[1])

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        weight, scale, zero = ctx.saved_tensors
        slope = _grouped(slopes[0], scale.shape[1], ctx.size)
        ratio = _grouped(weight, scale.shape[1], ctx.size) / scale.unsqueeze(-1)
        inside = _inside(ratio, _wide(zero), ctx.form)
        by_step = ctx.form.fake(ratio, torch.ones(()), _wide(zero)).sub_(ratio.mul_(inside))
        of_scale = by_step.mul_(slope).sum(-1)
        of_weight = slope * inside if ctx.saturating else slope
        return _flat(of_weight, weight.shape[1]), of_scale, None, None, None, None


def _inside(ratio: Tensor, zero: Tensor | None, form: Format) -> Tensor:
    """Where rounding is not clipped."""
    if not isinstance(form, Integer):
        return ratio.abs() <= form.top
    codes = (ratio if zero is None else ratio + zero).round()
    return (codes >= form.low) & (codes <= form.high)


def _grouped(matrix: Tensor, groups: int, size: int) -> Tensor:
    if missing := groups * size - matrix.shape[1]:
        matrix = torch.nn.functional.pad(matrix, (0, missing))
    return matrix.reshape(len(matrix), groups, size)


def _flat(rows: Tensor, columns: int) -> Tensor:
    return rows.reshape(len(rows), -1)[:, :columns]


def _wide(zero: Tensor | None) -> Tensor | None:
    return None if zero is None else zero.unsqueeze(-1)


def fake_quantize(
    weight: Tensor, scale: Tensor, zero: Tensor | None, form: Format, size: int, saturating: bool = True
) -> Tensor:
    """ŵ of float32 (N, K) ``weight`` in a format: see the module's text. ``scale`` and ``zero`` are float32
    (N, groups) of ``size`` columns each."""
    made: Tensor = _FakeQuantize.apply(weight, scale, zero, form, size, saturating)  # type: ignore[no-untyped-call]
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
    form: Format
    size: int
    saturating: bool = True

    @classmethod
    def begin(
        cls, codes: Tensor, scale: StoredScale, grid: Grid, original: Tensor | None, saturating: bool
    ) -> TrainedWeight:
        """From stored ``codes`` (N, K), which the first pass gives again whatever ``original`` is.

        The latent weights are those of the unquantized model as far as their cell of the grid reaches, and
        the middle of the cell where ``original`` is None.
        """
        step, zero = grid.columns(codes.shape[1])
        middle = codes.float() if zero is None else codes.float() - zero
        latent = middle * step
        if original is not None and isinstance(grid.form, Integer):
            latent = torch.maximum(torch.minimum(original / step, middle + CELL), middle - CELL) * step
        elif original is not None:
            latent = torch.where(grid.form.fake(original, step) == latent, original, latent)
        return cls(latent, scale, grid.zero, grid.form, grid.size, saturating)

    def fake(self) -> Tensor:
        """ŵ, float32 (N, K)."""
        return fake_quantize(
            self.latent, self.scale.value(), self.zero, self.form, self.size, self.saturating
        )

    def grid(self) -> Grid:
        """The grid as it is now."""
        low, high = (self.form.low, self.form.high) if isinstance(self.form, Integer) else (None, None)
        return Grid(self.scale.value().detach(), self.zero, low, high, self.size)

    def codes(self) -> Tensor:
        """q as it is stored: int8 or E4M3, (N, K)."""
        with torch.no_grad():
            return rounded(self.latent, self.grid())


@dataclass
class TrainedNorm:
    """A norm's weights (K,), in their stored 16 bits: what they change by is trained, relative to what they
    were."""

    stored: Tensor
    change: Tensor

    def value(self) -> Tensor:
        """As they are stored, in float32."""
        return rounded_to(self.stored.float() * (1 + self.change), self.stored.dtype)


def fake_tensor(x: Tensor, scale: Tensor, form: Format) -> Tensor:
    """Values of any shape at one step size (1,): inputs with a fixed scale, keys, values."""
    made = fake_quantize(x.float().reshape(1, -1), scale.reshape(1, 1), None, form, x.numel())
    return made.reshape(x.shape).to(x.dtype)
