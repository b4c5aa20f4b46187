"""Which weights, channels and heads matter least: scores and masks of matrices in torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


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


def low_rank(weight: Tensor, rank: int, importance: Tensor | None = None) -> LowRank:
    """The factors of that rank with the least Σ E[x_k²] (ŵ - w)²: truncated singular values of
    W diag(sqrt(E[x²])), or of W itself without ``importance`` (Eckart and Young)."""
    import torch

    wide = weight.float()
    columns = torch.ones(weight.shape[1], device=weight.device)
    if importance is not None:
        columns = importance.float().clamp_min(1e-12).sqrt()
        columns = columns / columns.mean()
    u, s, vt = torch.linalg.svd(wide * columns, full_matrices=False)
    root = s[:rank].sqrt()
    return LowRank(u[:, :rank] * root, root.unsqueeze(1) * vt[:rank] / columns)


def rank_for(shape: tuple[int, int], share: float) -> int:
    """The rank at which two factors hold ``share`` of the matrix's numbers; at least one."""
    n, k = shape
    return max(1, int(share * n * k / (n + k)))


def relative_error(weight: Tensor, other: Tensor, importance: Tensor | None = None) -> float:
    """sqrt(Σ E[x²] (ŵ - w)² / Σ E[x²] w²): of outputs on uncorrelated inputs; of weights without E[x²]."""
    import torch

    columns = torch.ones(weight.shape[1], device=weight.device) if importance is None else importance.float()
    noise = ((other.float() - weight.float()).square() * columns).sum()
    return float((noise / (weight.float().square() * columns).sum().clamp_min(1e-30)).sqrt())
