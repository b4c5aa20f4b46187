"""How often a gate is wrong, and how often it sees what is there.

    python -m benchmarks.quantization.error_rates

Drops are enumerated: every outcome of n items, at every share of flips. Means are simulated. Three tests of
a drop are compared at a level of 5 %: the one that gates use, Tango's score read from the normal table, and
Agresti and Min's adjusted Wald interval. Prints the figures and draws ``docs/images/error-rates.png``.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from scipy import stats

from quantize.gate.means import critical_t, skewness_of_positive
from quantize.gate.paired import ALPHA, flips_p, score

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Array = NDArray[np.float64]
PICTURE = Path("docs/images/error-rates.png")
ITEMS = (20, 30, 50, 80, 100, 150, 200, 300, 400, 600, 1000)
MARGINS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1)
GAINS = (0.0, 0.005, 0.02, 0.1)
"""p01 at which the power is shown."""
CONVERSATIONS = (20, 40, 80, 240)
RUNS = 20_000


def gate(items: int, margin: float, to_bad: int, to_good: int) -> bool:
    return flips_p(items, to_bad, to_good, margin) <= ALPHA


def tango(items: int, margin: float, to_bad: int, to_good: int) -> bool:
    found = score(np.array([float(to_bad)]), np.array([float(to_good)]), items, margin)
    return float(found[0]) <= stats.norm.ppf(ALPHA)


def wald(items: int, margin: float, to_bad: int, to_good: int) -> bool:
    difference, flips = to_bad - to_good, to_bad + to_good + 1
    spread = math.sqrt(flips - difference**2 / (items + 2))
    return bool((difference + stats.norm.ppf(1 - ALPHA) * spread) / (items + 2) <= margin)


TESTS: dict[str, Callable[[int, float, int, int], bool]] = {
    "the gate (exact)": gate,
    "Tango, normal table": tango,
    "adjusted Wald": wald,
}


def limits(test: Callable[[int, float, int, int], bool], items: int, margin: float) -> Array:
    """(items + 1,): for every number of gains the most losses that pass, or -1."""
    found, b = np.full(items + 1, -1.0), -1
    for c in range(items + 1):
        while b + c < items and test(items, margin, b + 1, c):
            b += 1
        found[c] = b = min(b, items - c)
    return found


def passes(items: int, drop: float, p01: Array, most: Array) -> Array:
    """(k,): how often an outcome passes at a true drop, for every p01 of (k,)."""
    c, p01 = np.arange(items + 1)[None, :], p01[:, None]
    below = stats.binom.cdf(most[None, :], items - c, np.clip((p01 + drop) / (1 - p01), 0, 1))
    total: Array = (stats.binom.pmf(c, items, p01) * below).sum(axis=1)
    return total


def sizes(most: Array, items: int, margin: float) -> float:
    """The most often that a variant at its margin passes, over all shares of flips."""
    end = math.asin(math.sqrt((1 - margin) / 2))
    angles = np.linspace(0, end, math.ceil(end * 20 * math.sqrt(items)))
    return float(passes(items, margin, np.sin(angles) ** 2, most).max())


def drops() -> tuple[dict[str, Array], dict[float, Array]]:
    """Size per test (items, margins), and the gate's power per margin (items, gains) without a loss."""
    size = {name: np.zeros((len(ITEMS), len(MARGINS))) for name in TESTS}
    power = {margin: np.zeros((len(ITEMS), len(GAINS))) for margin in MARGINS}
    for row, items in enumerate(ITEMS):
        for column, margin in enumerate(MARGINS):
            for name, test in TESTS.items():
                most = limits(test, items, margin)
                size[name][row, column] = sizes(most, items, margin)
                if test is gate:
                    power[margin][row] = passes(items, 0.0, np.array(GAINS), most)
            print(
                items, margin, *(f"{name} {100 * size[name][row, column]:.2f} %" for name in TESTS), sep="  "
            )
    return size, power


KINDS: dict[str, Callable[[np.random.Generator, tuple[int, int]], Array]] = {
    "normal": lambda draw, shape: draw.normal(1.0, 0.3, shape),
    "gamma 1": lambda draw, shape: draw.gamma(1.0, 1.0, shape),
    "gamma 0.25": lambda draw, shape: draw.gamma(0.25, 4.0, shape),
    "log-normal 0.5": lambda draw, shape: draw.lognormal(-0.125, 0.5, shape),
    "log-normal 1": lambda draw, shape: draw.lognormal(-0.5, 1.0, shape),
    "log-normal 1.5": lambda draw, shape: draw.lognormal(-1.125, 1.5, shape),
}
"""KL per conversation, all with a mean of 1."""


def means() -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
    """By kind, per number of conversations: how often the gate passes at the limit, how often the ordinary
    t-test does, and how often the gate passes at a third of the limit."""
    ours, plain, third = ({name: np.zeros(len(CONVERSATIONS)) for name in KINDS} for _ in range(3))
    for column, count in enumerate(CONVERSATIONS):
        for name, kind in KINDS.items():
            drawn = kind(np.random.default_rng(count), (RUNS, count))
            mean, error = drawn.mean(axis=1), drawn.std(axis=1, ddof=1) / math.sqrt(count)
            critical = np.array(
                [
                    critical_t(ALPHA, skewness_of_positive(variation, count), count)
                    for variation in error * math.sqrt(count) / np.maximum(mean, 1e-9)
                ]
            )
            ours[name][column] = np.mean((mean - 1) / error <= critical)
            plain[name][column] = np.mean((mean - 1) / error <= stats.t.ppf(ALPHA, count - 1))
            third[name][column] = np.mean((mean - 3) / error <= critical)
            print(
                f"{count} conversations, {name}: {100 * ours[name][column]:.2f} % at the limit, the t-test "
                f"{100 * plain[name][column]:.2f} %; {100 * third[name][column]:.1f} % at a third of it"
            )
    return ours, plain, third


def draw(path: Path) -> None:
    size, power = drops()
    ours, plain, third = means()
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    _size_panel(axes[0, 0], size)
    _power_panel(axes[0, 1], power)
    _means_panel(axes[1, 0], ours, plain)
    for name, rates in third.items():
        axes[1, 1].plot(CONVERSATIONS, 100 * rates, marker="o", ms=4, label=name)
    axes[1, 1].set(
        title="Mean KL: passes at a third of the limit",
        xlabel="conversations",
        ylabel="passes, %",
        xscale="log",
        ylim=(0, 102),
    )
    _ticks(axes[1, 1], CONVERSATIONS)
    axes[1, 1].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _ticks(axes: Axes, values: tuple[int, ...]) -> None:
    axes.set_xticks(values, [str(value) for value in values], minor=False)
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)


def _size_panel(axes: Axes, size: dict[str, Array]) -> None:
    for (name, rates), colour in zip(size.items(), ("tab:blue", "tab:orange", "tab:red"), strict=True):
        axes.fill_between(
            ITEMS, 100 * rates.min(axis=1), 100 * rates.max(axis=1), alpha=0.25, color=colour, label=name
        )
        axes.plot(ITEMS, 100 * rates.max(axis=1), color=colour)
    axes.axhline(100 * ALPHA, color="black", lw=1, ls="--")
    axes.set(
        title="Drop: a variant at its margin passes (margins 0.5 to 10 %)",
        xlabel="items",
        ylabel="at worst, %",
        xscale="log",
        ylim=(0, None),
    )
    _ticks(axes, ITEMS[::2])
    axes.legend(fontsize=8)


def _power_panel(axes: Axes, power: dict[float, Array]) -> None:
    for number, (margin, rates) in enumerate(power.items()):
        colour = f"C{number}"
        axes.plot(
            ITEMS, 100 * rates[:, 1], color=colour, marker="o", ms=3, label=f"margin {100 * margin:g} %"
        )
        axes.plot(ITEMS, 100 * rates[:, 2], color=colour, ls=":")
    axes.set(
        title="Drop: a variant that loses nothing passes\n(flips 1 %; dotted 4 %)",
        xlabel="items",
        ylabel="passes, %",
        xscale="log",
        ylim=(0, 102),
    )
    _ticks(axes, ITEMS[::2])
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _means_panel(axes: Axes, ours: dict[str, Array], plain: dict[str, Array]) -> None:
    for number, name in enumerate(ours):
        axes.plot(CONVERSATIONS, 100 * ours[name], color=f"C{number}", marker="o", ms=4, label=name)
        axes.plot(CONVERSATIONS, 100 * plain[name], color=f"C{number}", ls=":")
    axes.axhline(100 * ALPHA, color="black", lw=1, ls="--")
    axes.set(
        title="Mean KL: a variant at its limit passes\n(dotted: ordinary t-test)",
        xlabel="conversations",
        ylabel="passes, %",
        xscale="log",
        ylim=(0, None),
    )
    _ticks(axes, CONVERSATIONS)
    axes.legend(fontsize=8)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    draw(parser.parse_args().picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
