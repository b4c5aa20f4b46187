"""GPTQ (Frantar et al., arXiv:2210.17323) for many grids at once.

Columns are rounded one after another, in the order of falling E[x²], and each one's error is passed on to
those that are left, by the inverse Cholesky factor of E[x xᵀ]. Rows do not see each other, so all
matrices that share an input (query, key and value; gate and up) at all schemes and ranges are rows of
one matrix: the factor is taken once, and so is the walk over columns. Ranges are found beforehand on the
original weights ("static" order in llm-compressor's words), and the damping is llm-compressor's.

Why not llm-compressor's own: it walks each matrix at each scheme by itself, and each column through the
whole fake-quantization of compressed-tensors; ``docs/quantization.md`` has the times of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from quantize.make.ranges import Grid
from quantize.make.threads import each_on

if TYPE_CHECKING:
    from torch import Tensor

DAMPING = 0.01
"""Share of the mean of the diagonal that is added to it."""
BLOCK_COLUMNS = 64
ROWS = 2048
"""Rows that are walked at a time on a processor: a block of columns of them stays in its cache."""
GPU_ROWS = 1 << 17


def factor(moments: Tensor) -> tuple[Tensor, Tensor]:
    """What GPTQ needs of the second moments E[x xᵀ], float32 (K, K).

    Returns the order of columns (K,), and the upper Cholesky factor of the inverse (K, K) in that order. An
    input that calibration found zero throughout may be on in other text: its weights are rounded to nearest,
    and pass no error on.
    """
    import torch

    damped = moments.clone()
    diagonal = damped.diagonal()
    dead = diagonal == 0
    diagonal[dead] = diagonal.sum() / (~dead).sum().clamp_min(1)  # leaves the damping as it is
    diagonal[dead & (diagonal == 0)] = 1
    order = torch.argsort(diagonal, descending=True)
    damped = damped[order][:, order]
    damping = DAMPING * damped.diagonal().mean()
    for _ in range(6):
        damped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return order, upper
        damping = damping * 4
    # Inputs of no rank at all: without off-diagonal terms this is rounding to nearest.
    return order, torch.eye(len(order), device=moments.device)


def gptq(tasks: Sequence[tuple[Tensor, Grid]], moments: Tensor) -> list[Tensor]:
    """Round float32 (N, K) weights to their integer grids, all with the input moments (K, K).

    Returns int8 (N, K) for each.
    """
    import torch

    order, upper = factor(moments)
    inverse = torch.argsort(order)
    limit = GPU_ROWS if moments.device.type != "cpu" else ROWS

    def walked(batch: list[tuple[int, slice]]) -> list[tuple[int, int, Tensor]]:
        columns = []
        for number, rows in batch:
            weight, grid = tasks[number]
            columns.append(_columns(weight[rows], grid, rows, order))
        w, scale, zero, low, high = (torch.cat(parts, -1) for parts in zip(*columns, strict=True))
        q = _walk(w, scale, zero, low, high, upper)[inverse]
        pieces = torch.split(q, [rows.stop - rows.start for _, rows in batch], 1)
        return [(number, rows.start, piece.T) for (number, rows), piece in zip(batch, pieces, strict=True)]

    batches = _batches([len(weight) for weight, _ in tasks], limit)
    done = each_on(moments.device, walked, batches)
    found = sorted((entry for entries in done for entry in entries), key=lambda entry: entry[:2])
    return [
        torch.cat([part for owner, _, part in found if owner == number]).contiguous()
        for number in range(len(tasks))
    ]


def _batches(sizes: Sequence[int], limit: int) -> list[list[tuple[int, slice]]]:
    """Matrices of so many rows, cut and put together into batches of at most ``limit`` rows."""
    batches: list[list[tuple[int, slice]]] = [[]]
    room = limit
    for number, size in enumerate(sizes):
        at = 0
        while at < size:
            take = min(room, size - at)
            batches[-1].append((number, slice(at, at + take)))
            at, room = at + take, room - take
            if not room:
                batches.append([])
                room = limit
    return [batch for batch in batches if batch]


def _columns(
    weight: Tensor, grid: Grid, rows: slice, order: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weight, scale and zero point as (K, n) in the order of columns, and the range of integers (n,)."""
    import torch

    assert grid.low is not None
    assert grid.high is not None
    part = Grid(
        grid.scale[rows], None if grid.zero is None else grid.zero[rows], grid.low, grid.high, grid.size
    )
    scale, zero = part.columns(weight.shape[1])
    w = weight[:, order].T.contiguous()
    low = torch.full((len(weight),), float(grid.low), device=weight.device)
    high = torch.full_like(low, float(grid.high))
    zeros = torch.zeros_like(w) if zero is None else zero[:, order].T.contiguous()
    return w, scale[:, order].T.contiguous(), zeros, low, high


def _walk(w: Tensor, scale: Tensor, zero: Tensor, low: Tensor, high: Tensor, upper: Tensor) -> Tensor:
    """Round (K, n) column by column; ``w`` is used up. Returns int8 (K, n)."""
    import torch

    k = len(w)
    q = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    diagonal = (1 / upper.diagonal()).tolist()
    for start in range(0, k, BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, k)
        errors = torch.empty_like(w[start:end])
        for column in range(start, end):
            row, step, offset = w[column], scale[column], zero[column]
            value = torch.addcdiv(offset, row, step).round_()
            value = torch.minimum(torch.maximum(value, low, out=value), high, out=value)
            q[column] = value
            error = row.sub(value.sub_(offset).mul_(step)).mul_(diagonal[column])
            errors[column - start] = error
            if column + 1 < end:
                w[column + 1 : end].addr_(upper[column, column + 1 : end], error, alpha=-1)
        if end < k:
            w[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    return q
