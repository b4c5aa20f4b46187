"""Tests that are judged together: the probability that any of them passes wrongly."""

from __future__ import annotations

import math
from collections.abc import Mapping


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values: compared with alpha, they decide as Holm's procedure does.

    Scandinavian Journal of Statistics 1979;6:65. It holds however the tests depend on each other. What is no
    number is 1.
    """
    p_values = {name: 1.0 if math.isnan(p) else p for name, p in p_values.items()}
    adjusted: dict[str, float] = {}
    worst = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = worst
    return adjusted
