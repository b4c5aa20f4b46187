"""Which weights, channels and heads matter least: scores and masks of matrices in torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

DAMPING = 1e-4
"""Share of the mean of E[x²] that is added to each, so that E[x xᵀ] of few tokens has an inverse."""


def scores(weight: Tensor, importance: Tensor | None) -> Tensor:
    """How much a weight (N, K) matters: |w|, times sqrt(E[x²]) of its input (K,) where that is known."""
    found = weight.float().abs()
    return found if importance is None else found * importance.float().clamp_min(0).sqrt()


def kept(of: Tensor, share: float) -> Tensor:
    """True where a weight stays: in every row all but the ``share`` with the lowest scores."""
    import torch

    drop = round(of.shape[1] * share)
    mask = torch.ones_like(of, dtype=torch.bool)
    if drop:
        mask.scatter_(1, of.argsort(dim=1, stable=True)[:, :drop], False)
    return mask


def kept_of_four(of: Tensor) -> Tensor:
    """True where a weight stays: the two highest scores of every four neighbours in a row."""
    import torch

    fours = of.reshape(len(of), -1, 4)
    mask = torch.zeros_like(fours, dtype=torch.bool)
    mask.scatter_(2, fours.argsort(dim=2, descending=True, stable=True)[..., :2], True)
    return mask.reshape(of.shape)


def channel_scores(weight: Tensor, importance: Tensor) -> Tensor:
    """E[x²] |w|² of every input channel (K,): what it adds to the outputs of ``weight`` (N, K)."""
    return importance.float() * weight.float().square().sum(0)


def kept_channels(of: Tensor, drop: int) -> Tensor:
    """Indices of all but the ``drop`` lowest, in their order."""
    return of.argsort(stable=True)[drop:].sort().values


def head_channels(heads: Tensor, size: int) -> Tensor:
    """Channels of the heads of those indices, ``size`` channels each."""
    import torch

    return (heads.unsqueeze(1) * size + torch.arange(size, device=heads.device)).flatten()


@dataclass(frozen=True)
class LowRank:
    """``weight`` ≈ ``left`` @ ``right``, (N, r) and (r, K)."""

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        return int(self.left.shape[1])

    def product(self) -> Tensor:
        return self.left @ self.right

    @property
    def numbers(self) -> int:
        """That two factors would store."""
        return self.left.numel() + self.right.numel()


def low_rank(weight: Tensor, rank: int, inputs: Tensor | None = None) -> LowRank:
    """The factors of that rank with the least error of outputs, E|(Ŵ - W) x|² (Eckart and Young).

    ``inputs`` are E[x xᵀ] (K, K), or E[x²] (K,) where inputs are taken for uncorrelated; without them the
    error is that of the weights. With E[x xᵀ] = L Lᵀ these are the truncated singular values of W L, with
    L⁻¹ in the right factor. What is least is exact but for :data:`DAMPING` on E[x xᵀ].
    """
    import torch

    wide = weight.float()
    if inputs is not None and inputs.ndim == 2:
        lower = root(inputs)
        u, s, vt = torch.linalg.svd(wide @ lower, full_matrices=False)
        right = torch.linalg.solve_triangular(lower, vt[:rank], upper=False, left=False)
    else:
        columns = torch.ones(weight.shape[1], device=weight.device)
        if inputs is not None:
            columns = inputs.float().clamp_min(1e-12).sqrt()
            columns = columns / columns.mean()
        u, s, vt = torch.linalg.svd(wide * columns, full_matrices=False)
        right = vt[:rank] / columns
    half = s[:rank].sqrt()
    return LowRank(u[:, :rank] * half, half.unsqueeze(1) * right)


def root(moments: Tensor) -> Tensor:
    """The lower triangle L (K, K), float32, of E[x xᵀ] = L Lᵀ, with :data:`DAMPING` on its diagonal."""
    import torch

    damped = moments.double()
    more = DAMPING * damped.diagonal().mean().clamp_min(1e-30)
    damped = damped + more * torch.eye(len(damped), dtype=damped.dtype, device=damped.device)
    found: Tensor = torch.linalg.cholesky(damped).float()
    return found


def rank_for(shape: tuple[int, int], share: float) -> int:
    """The rank at which two factors hold ``share`` of the matrix's numbers; at least one."""
    n, k = shape
    return max(1, int(share * n * k / (n + k)))


def relative_error(weight: Tensor, other: Tensor, inputs: Tensor | None = None) -> float:
    """sqrt(E|(Ŵ - W) x|² / E|W x|²) by E[x xᵀ] (K, K), or E[x²] (K,) of inputs that are taken for
    uncorrelated; of weights without either."""
    wide = weight.float()
    noise, signal = (_energy(one, inputs) for one in (other.float() - wide, wide))
    return float((noise / max(signal, 1e-30)) ** 0.5)


def _energy(weight: Tensor, inputs: Tensor | None) -> float:
    """E|W x|², at least 0."""
    if inputs is None:
        found = weight.square().sum()
    elif inputs.ndim == 1:
        found = (weight.square() * inputs.float()).sum()
    else:
        found = ((weight @ inputs.float()) * weight).sum()
    return max(0.0, float(found))
