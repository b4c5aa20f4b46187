"""Observers: from numbers to the range that a format is to cover.

=================== ======================================================================================
``minmax``          from the smallest to the largest number
``percentile``      between two quantiles of them: 99.99 cuts one number in ten thousand off
``mse``             shrunk to the least Σ (x̂ - x)²
``importance``      shrunk to the least Σ w (x̂ - x)², with a weight for every number: E[x²] of the inputs
                    that meet a weight, a Fisher diagonal, anything that is not negative
``entropy``         shrunk to the least KL(P‖Q) between histograms of x and x̂ (Migacz, 8-bit Inference with
                    TensorRT, GTC 2017)
``mean``            ± mean |x|: what two codes lose least with (Rastegari et al., arXiv:1603.05279)
=================== ======================================================================================

They look at ranges (…, size) along the last axis and return two tensors (…). Zero is in every range. A range
that is found depends on the format and on how its scales are stored, since that is what is rounded to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantize.numerics.formats import Format, FormatError, Table

if TYPE_CHECKING:
    from torch import Tensor

Settle = Callable[["Tensor"], "Tensor"]
"""Scales to those that can be stored."""
STEPS, FACTOR, FINE = 20, 0.82, 7
"""Of the search for a smaller range: down to a fortieth of the whole one, to within 5 % of the best."""
HISTOGRAM_BINS = 2048
SMALLEST_SHARE = 1e-7
"""Of a histogram's bin in a quotient, so that no logarithm is of zero."""


class Observer(ABC):
    """Finds ranges. Immutable: numbers of several batches are joined by whoever has them."""

    name: str

    @abstractmethod
    def range(
        self, x: Tensor, form: Format, settle: Settle, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The range of every (…, size): two float32 tensors (…). ``weights`` are of the shape of ``x``."""


def min_max(x: Tensor) -> tuple[Tensor, Tensor]:
    low, high = x.float().aminmax(dim=-1)
    return low.clamp_max(0), high.clamp_min(0)


@dataclass(frozen=True)
class MinMax(Observer):
    name: str = "minmax"

    def range(
        self, x: Tensor, form: Format, settle: Settle, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return min_max(x)


@dataclass(frozen=True)
class Percentile(Observer):
    """``share`` per cent of the numbers of a range are within it; the rest is cut off at both ends alike."""

    share: float = 99.99
    name: str = "percentile"

    def __post_init__(self) -> None:
        if not 50 < self.share <= 100:
            raise FormatError(f"a percentile is above 50 and at most 100, not {self.share:g}")

    def range(
        self, x: Tensor, form: Format, settle: Settle, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        ranked = x.float().sort(-1).values  # torch.quantile refuses large tensors
        last = ranked.shape[-1] - 1
        cut = round(last * (100 - self.share) / 200)
        return ranked[..., cut].clamp_max(0), ranked[..., last - cut].clamp_min(0)


@dataclass(frozen=True)
class Mean(Observer):
    name: str = "mean"

    def range(
        self, x: Tensor, form: Format, settle: Settle, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        magnitude = x.float().abs()
        if weights is None:
            most = magnitude.mean(-1)
        else:
            most = (magnitude * weights).sum(-1) / weights.sum(-1).clamp_min(1e-30)
        return -most * form.top, most * form.top


@dataclass(frozen=True)
class Shrinking(Observer):
    """The least error of ranges that shrink by ``FACTOR`` from step to step, then of ``FINE`` between the
    neighbours of the best.

    ``weighted`` observers refuse to work without weights, the others do not look at them.
    """

    weighted: bool = False
    power: float = 2.0
    name: str = "mse"

    def range(
        self, x: Tensor, form: Format, settle: Settle, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        import torch

        if self.weighted and weights is None:
            raise FormatError(f"the observer {self.name} needs a weight for every number; give weights")
        x = x.float()
        low, high = min_max(x)
        best = torch.ones_like(low)
        least = torch.full_like(low, float("inf"))

        def consider(share: Tensor) -> None:
            nonlocal best, least
            error = through(x, form, low * share, high * share, settle).sub_(x).abs_()
            error = error.square_() if self.power == 2 else error.pow_(self.power)
            if self.weighted and weights is not None:
                error.mul_(weights)
            total = error.sum(-1)
            better = total < least
            least, best = torch.where(better, total, least), torch.where(better, share, best)

        for step in range(STEPS):
            consider(torch.full_like(low, FACTOR**step))
        coarse = best
        for number in range(1, FINE + 1):
            power = 2 * number / (FINE + 1) - 1  # between -1 and 1
            if abs(power) > 1e-9:
                consider((coarse * FACTOR**power).clamp_max(1))
        return low * best, high * best


@dataclass(frozen=True)
class Entropy(Observer):
    """By histograms of ``bins`` bins; what lies beyond a range is counted at its ends. One range at a time:
    for tensors and channels, not for groups of a large weight. Shrinks in ``steps`` equal steps."""

    bins: int = HISTOGRAM_BINS
    steps: int = 80
    name: str = "entropy"

    def range(
        self, x: Tensor, form: Format, settle: Settle, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        import torch

        low, high = min_max(x)
        if form.symmetric:  # it covers both sides alike, whatever lies there
            high = torch.maximum(-low, high)
            low = -high
        shares = [
            self._best(row, float(a), float(b), form, settle)
            for row, a, b in zip(
                x.float().reshape(-1, x.shape[-1]), low.flatten(), high.flatten(), strict=True
            )
        ]
        best = torch.tensor(shares, device=low.device).reshape(low.shape)
        return low * best, high * best

    def _best(self, row: Tensor, low: float, high: float, form: Format, settle: Settle) -> float:
        """The share of the range ``low`` … ``high`` at which the histograms differ least."""
        import torch

        if high <= low:
            return 1.0
        counts = torch.histc(row, self.bins, low, high)
        middles = low + (torch.arange(self.bins, device=row.device) + 0.5) * ((high - low) / self.bins)
        found = []
        for step in range(self.steps):
            share = 1 - step / self.steps
            ends = torch.tensor([low * share]), torch.tensor([high * share])
            found.append((self._divergence(counts, middles, *ends, form, settle), -share))
        return -min(found)[1]

    def _divergence(
        self, counts: Tensor, middles: Tensor, low: Tensor, high: Tensor, form: Format, settle: Settle
    ) -> float:
        """KL between the histogram, clipped to the range, and what codes can tell of it: the numbers of a
        code spread evenly over those of its bins that hold any."""
        import torch

        low, high = low.to(middles), high.to(middles)
        inside = (middles >= low) & (middles <= high)
        if int(inside.sum()) < 2:
            return float("inf")
        kept = counts[inside]
        clipped = kept.clone()
        clipped[0] += counts[middles < low].sum()
        clipped[-1] += counts[middles > high].sum()
        scale = settle(form.scale_of(low, high))
        codes = form.dequantize(
            form.quantize(middles[inside], scale, form.zero_of(low, scale)), scale, form.zero_of(low, scale)
        )
        # Middles rise and so do what they become: places of the distinct numbers, in order.
        places = torch.nn.functional.pad((codes.diff() != 0).long(), (1, 0)).cumsum(0)
        held = (kept > 0).float()
        per_code = torch.zeros(int(places.max()) + 1, device=kept.device)
        total = per_code.index_add(0, places, kept)
        bins = per_code.index_add(0, places, held).clamp_min(1)
        told = (total / bins)[places] * held
        p = clipped / clipped.sum()
        q = told / told.sum().clamp_min(1e-30) + SMALLEST_SHARE
        return float(torch.where(p > 0, p * (p.clamp_min(1e-30) / q).log(), 0.0).sum())


def through(x: Tensor, form: Format, low: Tensor, high: Tensor, settle: Settle) -> Tensor:
    """Ranges (…, size) through a format that covers ``low`` … ``high`` (…)."""
    scale = settle(form.scale_of(low, high)).unsqueeze(-1)
    zero = form.zero_of(low.unsqueeze(-1), scale)
    return form.fake(x, scale, zero)


MIN_MAX = MinMax()
MSE = Shrinking()
IMPORTANCE = Shrinking(weighted=True, name="importance")
ENTROPY = Entropy()
PERCENTILE = Percentile()
MEAN = Mean()
OBSERVERS: dict[str, Observer] = {
    one.name: one for one in (MIN_MAX, PERCENTILE, MSE, IMPORTANCE, ENTROPY, MEAN)
}


def usual_observer(form: Format) -> Observer:
    """What a format is used with unless something else is asked for. Tables of two or three numbers lose
    nearly everything between the largest magnitudes: theirs is searched."""
    if isinstance(form, Table) and len(form.values) == 2:
        return MEAN
    return MSE if len(form_codes(form)) <= 3 else MIN_MAX


def form_codes(form: Format) -> range:
    """As many as the format has codes."""
    return range(len(form.values)) if isinstance(form, Table) else range(2**form.bits)
