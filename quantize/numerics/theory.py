"""What quantization errors are expected to be, in closed form: to be held against what is measured."""

from __future__ import annotations

import math


def uniform_noise(scale: float) -> float:
    """Variance of the error of numbers that are rounded to equal steps of ``scale``: s²/12."""
    return scale * scale / 12


def sine_sqnr_db(bits: float) -> float:
    """Signal to quantization noise of a sine over the full range of ``bits`` bits: 6.02 b + 1.76 dB."""
    return 20 * bits * math.log10(2) + 10 * math.log10(1.5)


def normal_clipping(limit: float, end: float | None = None) -> float:
    """Mean square error of standard normal numbers beyond ± ``limit`` (a) that become ± ``end`` (c; default:
    the limit): 2 ((1 + c²) Q(a) + (a - 2c) φ(a))."""
    end = limit if end is None else end
    tail = math.erfc(limit / math.sqrt(2)) / 2
    density = math.exp(-limit * limit / 2) / math.sqrt(2 * math.pi)
    return 2 * ((1 + end * end) * tail + (limit - 2 * end) * density)


def laplace_clipping(limit: float, width: float = 1.0) -> float:
    """The same of Laplace's distribution with the scale ``width``: 2 b² exp(-a/b)."""
    return 2 * width * width * math.exp(-limit / width)


def normal_sqnr_db(bits: int, limit: float) -> float:
    """Of standard normal numbers rounded to the middles of 2^bits equal steps from - ``limit`` to ``limit``:
    what is within is rounded, what is beyond clipped (after Banner et al., arXiv:1810.05723)."""
    step = 2 * limit / 2**bits
    within = math.erf(limit / math.sqrt(2))
    return -10 * math.log10(within * uniform_noise(step) + normal_clipping(limit, limit - step / 2))


def sqnr_db(signal: float, noise: float) -> float:
    """Of two energies, in decibels; infinite without noise."""
    if noise <= 0:
        return math.inf
    return 10 * math.log10(max(signal, 1e-300) / noise)
