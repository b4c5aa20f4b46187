"""Tables of numbers: what they are and where they come from."""

from __future__ import annotations

from functools import cache
from statistics import NormalDist
from typing import TYPE_CHECKING

from quantize.numerics.formats import FormatError, Table

if TYPE_CHECKING:
    from torch import Tensor

BINARY = Table("binary", (-1.0, 1.0))
"""The sign alone (Rastegari et al., arXiv:1603.05279)."""
TERNARY = Table("ternary", (-1.0, 0.0, 1.0))
"""Li and Liu, arXiv:1605.04711. At the best scale their threshold is half of it: to the nearest."""


NF4 = Table(
    "nf4",
    (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
)  # fmt: skip
"""As published (Dettmers et al., arXiv:2305.14314, appendix E), which is what kernels compute with: the same
quantiles found in float32."""


@cache
def normal_float(bits: int) -> Table:
    """Quantiles of a normal distribution, scaled to -1 … 1, with a zero."""
    if not 2 <= bits <= 8:
        raise FormatError(f"normal floats have 2 to 8 bits here, not {bits}")
    return NF4 if bits == 4 else Table(f"nf{bits}", quantiles(bits))


def quantiles(bits: int) -> tuple[float, ...]:
    """2^(b-1) - 1 negative and 2^(b-1) positive ones, at probabilities in equal steps from 1/2 up to the mean
    of 1 - 1/(2 (2^b - 1)) and 1 - 1/(2 · 2^b), over the largest."""
    codes = 2**bits
    end = 1 - (1 / (2 * (codes - 1)) + 1 / (2 * codes)) / 2
    quantile = NormalDist().inv_cdf

    def half(count: int) -> list[float]:
        """Positive quantiles from the largest to the smallest; the one at 1/2 is zero, and left out."""
        return [quantile(end + (0.5 - end) * number / count) for number in range(count)]

    positive, negative = half(codes // 2), half(codes // 2 - 1)
    most = positive[0]
    return (*(-value / most for value in negative), 0.0, *(value / most for value in reversed(positive)))


@cache
def logarithmic(bits: int) -> Table:
    """Zero and ± powers of two down from one: a product is a shift (Miyashita et al., arXiv:1603.01025).

    To the nearest number, not to the nearest exponent: less is lost, by as simple a rule.
    """
    if not 2 <= bits <= 8:
        raise FormatError(f"powers of two have 2 to 8 bits here, not {bits}")
    powers = [2.0**-number for number in range(2 ** (bits - 1) - 1)]
    return Table(f"log{bits}", (*(-value for value in powers), 0.0, *reversed(powers)))


@cache
def power_law(bits: int, exponent: float = 2.0) -> Table:
    """± (i / n)^exponent with n = 2^(b-1) - 1: equal steps after a power, dense about zero
    (Yvinec et al., arXiv:2301.09858, have its inverse as exponent)."""
    if not 2 <= bits <= 12:
        raise FormatError(f"power laws have 2 to 12 bits here, not {bits}")
    if not 0.2 <= exponent <= 5:
        raise FormatError(f"the exponent of a power law is between 0.2 and 5, not {exponent:g}")
    last = 2 ** (bits - 1) - 1
    positive = [(number / last) ** exponent for number in range(1, last + 1)]
    return Table(f"power{bits}", (*(-value for value in reversed(positive)), 0.0, *positive))


def k_means(x: Tensor, bits: int, weights: Tensor | None = None, steps: int = 50) -> Table:
    """The codebook of 2^bits numbers with the least Σ w (x̂ - x)² that Lloyd's algorithm finds from quantiles
    (Han et al., arXiv:1510.00149; with weights Kim et al., arXiv:2306.07629). Numbers that fall together make
    it smaller. To be used at a scale of one, or with the scales that ``x`` was divided by.
    """
    import torch

    if not 1 <= bits <= 8:
        raise FormatError(f"codebooks have 1 to 8 bits here, not {bits}")
    values = x.detach().float().flatten()
    mass = torch.ones_like(values) if weights is None else weights.detach().float().flatten()
    order = values.argsort()
    values, mass = values[order].double(), mass[order].double()
    sums = torch.nn.functional.pad(torch.stack([mass, mass * values]).cumsum(-1), (1, 0))
    middles = (torch.arange(2**bits, device=values.device) + 0.5) / 2**bits * sums[0, -1]
    places = (torch.searchsorted(sums[0], middles) - 1).clamp(0, len(values) - 1)
    centres = torch.tensor(sorted(set(values[places].tolist())), dtype=values.dtype, device=values.device)
    for _ in range(steps):
        ends = torch.searchsorted(values, (centres[1:] + centres[:-1]) / 2)
        ends = torch.nn.functional.pad(torch.nn.functional.pad(ends, (1, 0)), (0, 1), value=len(values))
        of, total = sums[:, ends].diff()
        found = torch.where(of > 0, total / of.clamp_min(1e-300), centres)
        if torch.equal(found, centres):
            break
        centres = found
    levels = sorted(set(centres.float().tolist()))
    if len(levels) < 2:  # all numbers are one
        levels = [levels[0], levels[0] + 1.0]
    return Table(f"kmeans{bits}", tuple(levels))
