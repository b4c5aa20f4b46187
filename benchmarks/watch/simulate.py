"""The watch's decisions on millions of simulated answers: how often it is wrong, and how soon it is right.

    python -m benchmarks.watch.simulate

The thresholds, rates and figures of the rule of two are the gateway's own (``gateway.quality``); the answers
are drawn, and the rule is applied to thousands of cells at once. Healthy answers fail every check at the very
rate that is tolerated, which is the worst that is called healthy.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from gateway.config import WatchSettings
from gateway.quality.cells import FRESH, HIGHEST, WARN_SHARE
from gateway.quality.rates import DEFAULT_RATES
from gateway.quality.sequential import Rates, confidence_sequence, threshold

WORK = Path("var/benchmarks/watch")
CHECKS = ("shadow", "regenerated", "signals", "rules")
CELLS, ANSWERS = 2_000, 50_000
FAULTS, HEALTHY_BEFORE, MOST_STEPS = 2_000, 200, 20_000


class Cells:
    """What :class:`gateway.quality.cells.Cell` decides, of many at once. One that is demoted begins anew."""

    def __init__(self, rates: Sequence[Rates], count: int, alarm: float, agree: int) -> None:
        self._rates, self._alarm, self._agree = rates, alarm, agree
        self.evidence = np.zeros((len(rates), count))
        self._beside = np.zeros((len(rates), count))
        self._alarmed = np.zeros((len(rates), count), bool)
        self.alarms = 0
        """Of one check alone."""

    def add(self, bad: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which cells are demoted by an answer each, whose checks (checks, cells) say what is bad."""
        left = np.zeros(bad.shape[1], bool)
        for number, one in enumerate(self._rates):
            evidence = self.evidence[number] + np.where(bad[number], one.if_bad, one.if_good)
            self.evidence[number] = evidence = evidence.clip(0, HIGHEST * self._alarm)
            self._alarmed[number] &= evidence > 0
            others = np.delete(self._alarmed, number, 0).any(0)
            self._beside[number] = np.where(others, self._beside[number] + 1, 0)
            later = 2 * np.log(np.maximum(1, self._beside / FRESH))
            agreeing = self.evidence >= np.minimum(self._alarm, WARN_SHARE * self._alarm + later)
            over = self.evidence >= self._alarm
            demoted = over.any(0) & (agreeing.sum(0) >= self._agree)
            alone = over[number] & ~demoted & ~self._alarmed[number]
            self._alarmed[number] |= alone
            self.alarms += int(alone.sum())
            for kept in (self.evidence, self._beside, self._alarmed):
                kept[:, demoted] = 0
            left |= demoted
        return left


def main() -> None:
    settings = WatchSettings()
    rates = {name: Rates(*DEFAULT_RATES[name]) for name in CHECKS}
    alarm = threshold(settings.answers_per_false_alarm, len(DEFAULT_RATES))
    rng = np.random.default_rng(0)
    result: dict[str, object] = {"alarm": alarm, "answers": CELLS * ANSWERS}

    cells = Cells(list(rates.values()), CELLS, alarm, settings.agree)
    tolerated = np.array([[one.tolerated] for one in rates.values()])
    demotions = 0
    for _ in tqdm(range(ANSWERS), desc="healthy", unit="answer", unit_scale=CELLS, file=sys.stderr):
        demotions += int(cells.add(rng.random((len(CHECKS), CELLS)) < tolerated).sum())
    result["healthy"] = {
        "alarms_of_one_check": cells.alarms,
        "demotions": demotions,
        "answers_per_alarm": CELLS * ANSWERS / cells.alarms if cells.alarms else None,
        "demotions_per_100k": demotions / (CELLS * ANSWERS) * 100_000,
    }

    # Harmed: two checks see the harm at the same rate, after healthy answers.
    pair = (rates["shadow"], rates["regenerated"])
    usual = np.array([[one.tolerated / 2] for one in pair])
    result["harmed"] = {
        f"{share:g}": _until_demoted(Cells(pair, FAULTS, alarm, settings.agree), rng, usual, share)
        for share in (0.15, 0.2, 0.3, 0.5, 0.9)
    }

    # Intervals: looked at after every answer, how often do they ever miss?
    missed = 0
    looks = (*range(1, 50), *range(50, 2000, 25))
    for _ in tqdm(range(400), desc="intervals", file=sys.stderr):
        share = rng.uniform(0.01, 0.3)
        bad = np.cumsum(rng.random(2000) < share)
        missed += any(
            not low <= share <= high
            for low, high in (confidence_sequence(int(bad[n - 1]), n, 0.05) for n in looks)
        )
    result["intervals_missed"] = missed / 400
    WORK.mkdir(parents=True, exist_ok=True)
    (WORK / "simulate.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


def _until_demoted(
    cells: Cells, rng: np.random.Generator, usual: NDArray[np.float64], share: float
) -> dict[str, float]:
    """Answers until cells are demoted of whose answers a share is bad, after some that are as usual."""
    for _ in range(HEALTHY_BEFORE):
        cells.add(rng.random(cells.evidence.shape) < usual)
    taken = np.full(FAULTS, np.nan)
    for step in range(MOST_STEPS):
        acted = cells.add(rng.random(cells.evidence.shape) < np.maximum(share, usual))
        taken[acted & np.isnan(taken)] = step + 1
        if not np.isnan(taken).any():
            break
    return {
        "median": float(np.nanmedian(taken)),
        "p90": float(np.nanquantile(taken, 0.9)),
        "never": int(np.isnan(taken).sum()),
    }


if __name__ == "__main__":
    main()
