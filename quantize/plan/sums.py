"""What sensitivity adds up over sequences."""

from __future__ import annotations

import math


class Sums:
    """Of one (group, choice): Σ (Σ_t g·e)² over sequences and draws, and energies of outputs and errors.

    Sequences add to them in the order in which threads come, which ``math.fsum`` does not see: a run that
    went on after a kill has the same sums, to the last bit, as one that was not disturbed.
    """

    def __init__(self) -> None:
        self._products: list[float] = []
        self._signals: list[float] = []
        self._noises: list[float] = []

    @property
    def products(self) -> float:
        return math.fsum(self._products)

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise of the outputs."""
        signal, noise = math.fsum(self._signals), math.fsum(self._noises)
        return 10 * math.log10(max(signal, 1e-30) / max(noise, 1e-30))

    def add(self, product: float, signal: float, noise: float) -> None:
        self._products.append(product)
        self._signals.append(signal)
        self._noises.append(noise)
