"""Ranges of weights: the grid of representable values that each group of weights is rounded to.

``minmax``   from the smallest to the largest weight
``mse``      shrunk to the least Σ |ŵ - w|^2.4
``imatrix``  shrunk to the least Σ E[x²] |ŵ - w|^3, with E[x²] of the weight's input

Exponents and shrinking steps are those of llm-compressor's observers ``memoryless_minmax``,
``memoryless_mse`` and ``imatrix_mse``. Scales are rounded to the type in which they are stored before
anything is rounded to them, so what is searched is what is served.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantize.core.schemes import BLOCK, Numbers, Scheme
from quantize.make.threads import each_on
from quantize.numerics.formats import E4M3, Format, integer
from quantize.numerics.quantizers import Quantizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CHUNK = 1 << 17
"""Weights that are searched at a time: their working copies stay in a processor's cache."""
GPU_CHUNK = 1 << 25
OFF_SHARE = 0.05
"""What the weights of an input count that calibration found zero throughout, which other text may turn on: of
the median of the inputs that were on."""


@dataclass(frozen=True)
class Grid:
    """Where the weights of an (N, K) matrix can lie: ``(q - zero) * scale``.

    ``scale`` and ``zero`` are float32 (N, groups); ``zero`` is None where it is zero. Integers q lie in
    ``low`` … ``high``; for floats (``low`` is None) q is rounded to E4M3. A group spans ``size`` inputs.
    """

    scale: Tensor
    zero: Tensor | None
    low: int | None
    high: int | None
    size: int

    @property
    def form(self) -> Format:
        """What q is a code of."""
        if self.low is None or self.high is None:
            return E4M3
        return integer((self.high - self.low).bit_length(), self.zero is None)

    def columns(self, k: int) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of every weight, (N, K)."""
        scale = self.scale.repeat_interleave(self.size, 1)[:, :k]
        return scale, None if self.zero is None else self.zero.repeat_interleave(self.size, 1)[:, :k]


def find_grid(
    weight: Tensor, how: Scheme, ranges: str, importance: Tensor | None, stored: torch.dtype
) -> Grid:
    """The grid of a float32 (N, K) ``weight`` at scheme ``how``; ``ranges`` is one of the words above.

    ``importance`` is E[x²], (K,), for ``imatrix``. ``stored`` is the type of the scales on disk.
    """
    import torch

    w = how.weights
    assert w is not None
    k = weight.shape[1]
    if w.kind == "float":
        return _float_grid(weight, w.strategy, stored)
    bits = how.range_bits or w.bits
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    size = w.group_size or k
    groups = -(-k // size)
    if ranges != "imatrix":
        importance = None  # is there where another choice of the same inputs is by it
    if importance is not None:
        if (off := importance == 0).any() and not off.all():
            importance = torch.where(off, OFF_SHARE * importance[~off].median(), importance)
        importance = importance / importance.mean().clamp_min(torch.finfo(torch.float32).tiny)
        importance = torch.nn.functional.pad(importance, (0, groups * size - k)).reshape(1, groups, size)

    def search(rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.nn.functional.pad(rows, (0, groups * size - k)).reshape(len(rows), groups, size)
        return _search(rows, w.symmetric, low, high, ranges, importance, stored)

    step = max(1, (GPU_CHUNK if weight.device.type != "cpu" else CHUNK) // k)
    pieces = torch.split(weight, step)
    found = each_on(weight.device, search, pieces)
    scales, zeros = ([pair[number] for pair in found] for number in (0, 1))
    return Grid(torch.cat(scales), None if w.symmetric else torch.cat(zeros), low, high, size)


def _search(
    rows: Tensor,
    symmetric: bool,
    low: int,
    high: int,
    ranges: str,
    importance: Tensor | None,
    stored: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of (n, groups, size) weights."""
    import torch

    # Zero must be on the grid: padding, and inputs that are off, cost nothing then.
    least, most = rows.amin(-1).clamp_max(0), rows.amax(-1).clamp_min(0)

    def grid(shrink: float) -> tuple[Tensor, Tensor]:
        if symmetric:
            scale = torch.maximum(-least, most) * (shrink * 2 / (high - low))
            scale = scale.to(stored).float().clamp_min(1e-9)
            return scale, torch.zeros_like(scale)
        scale = ((most - least) * (shrink / (high - low))).to(stored).float().clamp_min(1e-9)
        return scale, (low - least * shrink / scale).round().clamp(low, high)

    best_scale, best_zero = grid(1.0)
    if ranges == "minmax":
        return best_scale, best_zero
    steps, top, power = (20, 20, 3.0) if ranges == "imatrix" else (21, 100, 2.4)
    best: Tensor | None = None
    for step in range(steps):
        scale, zero = grid(1 - step / top)
        q = rows / scale.unsqueeze(-1)
        if not symmetric:
            q.add_(zero.unsqueeze(-1))
        q.round_().clamp_(low, high)
        if not symmetric:
            q.sub_(zero.unsqueeze(-1))
        error = q.mul_(scale.unsqueeze(-1)).sub_(rows).abs_()
        error = error * error.square() if power == 3.0 else error.pow_(power)
        if importance is not None:
            error.mul_(importance)
        total = error.sum(-1)
        if best is None:
            best = total
            continue
        better = total < best
        best = torch.where(better, total, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _float_grid(weight: Tensor, strategy: str, stored: torch.dtype) -> Grid:
    import torch

    n, k = weight.shape
    size = k
    if strategy == "tensor":
        most = weight.abs().amax().reshape(1, 1).expand(n, 1)
    elif strategy == "channel":
        most = weight.abs().amax(1, keepdim=True)
    else:
        size = BLOCK
        padded = torch.nn.functional.pad(weight.abs(), (0, -k % BLOCK, 0, -n % BLOCK))
        rows, columns = (size // BLOCK for size in padded.shape)
        blocks = padded.reshape(rows, BLOCK, columns, BLOCK).amax((1, 3))
        most = blocks.repeat_interleave(BLOCK, 0)[:n]
    return Grid((most / E4M3.top).to(stored).float().clamp_min(1e-12), None, None, None, size)


def rounded(weight: Tensor, grid: Grid) -> Tensor:
    """``weight`` (N, K) rounded to the nearest q of its grid: int8 or float8, as stored."""
    return grid.form.quantize(weight, *grid.columns(weight.shape[1]))


def restored(q: Tensor, grid: Grid) -> Tensor:
    """The float32 (N, K) weights that ``q`` stands for."""
    return grid.form.dequantize(q, *grid.columns(q.shape[1]))


def round_inputs(x: Tensor, how: Numbers, columns: Tensor | None = None) -> Tensor:
    """Inputs (…, K) as a kernel would see them, one range per token, in the dtype of ``x``.

    With ``columns`` (K,) the kernel sees ``x / columns``; what that does to ``x`` is returned.
    """
    if columns is not None:
        columns = columns.to(x.device)
        return (round_inputs(x.float() / columns, how) * columns).to(x.dtype)
    form = E4M3 if how.kind == "float" else integer(how.bits, how.symmetric, narrow=how.symmetric)
    return Quantizer(form).fake(x)
