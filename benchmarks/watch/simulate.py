"""The watch's decisions on millions of simulated answers: how often it is wrong, and how soon it is right.

    python -m benchmarks.watch.simulate

The thresholds, rates and rule of two are the gateway's own (``gateway.quality``); only the answers are
drawn. Healthy answers fail every check at the very rate that is tolerated, which is the worst that is called
healthy.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gateway.config import WatchSettings
from gateway.quality.cells import WARN_SHARE
from gateway.quality.rates import DEFAULT_RATES
from gateway.quality.sequential import Rates, confidence_sequence, threshold

WORK = Path("var/benchmarks/watch")
CHECKS = ("shadow", "regenerated", "signals", "rules")
CELLS, ANSWERS = 2_000, 50_000
FAULTS = 2_000


def main() -> None:
    settings = WatchSettings()
    rates = {name: Rates(*DEFAULT_RATES[name]) for name in CHECKS}
    alarm = threshold(settings.answers_per_false_alarm, len(DEFAULT_RATES))
    rng = np.random.default_rng(0)
    result: dict[str, object] = {"alarm": alarm, "answers": CELLS * ANSWERS}

    # Healthy: every cell for itself; one that is demoted begins anew.
    evidence = np.zeros((len(CHECKS), CELLS))
    alarms, demotions = 0, 0
    above = np.zeros(CELLS, bool)
    for _ in tqdm(range(ANSWERS), desc="healthy", unit="answer", unit_scale=CELLS, file=sys.stderr):
        for number, name in enumerate(CHECKS):
            bad = rng.random(CELLS) < rates[name].tolerated
            evidence[number] += np.where(bad, rates[name].if_bad, rates[name].if_good)
        np.maximum(evidence, 0, out=evidence)
        alarmed = (evidence >= alarm).any(0)
        alarms += int((alarmed & ~above).sum())
        above = alarmed
        demoted = alarmed & ((evidence >= WARN_SHARE * alarm).sum(0) >= settings.agree)
        demotions += int(demoted.sum())
        evidence[:, demoted] = 0
    result["healthy"] = {
        "alarms_of_one_check": alarms,
        "demotions": demotions,
        "answers_per_alarm": CELLS * ANSWERS / alarms if alarms else None,
        "demotions_per_100k": demotions / (CELLS * ANSWERS) * 100_000,
    }

    # Harmed: two checks see the harm at the same rate, after 1,000 healthy answers.
    result["harmed"] = {}
    for share in (0.15, 0.2, 0.3, 0.5, 0.9):
        evidence = np.zeros((2, FAULTS))
        waiting = np.ones(FAULTS, bool)
        taken = np.full(FAULTS, np.nan)
        pair = (rates["shadow"], rates["regenerated"])
        for step in range(-200, 20_000):
            for number, one in enumerate(pair):
                bad = rng.random(FAULTS) < (one.tolerated / 2 if step < 0 else max(share, one.tolerated / 2))
                evidence[number] = np.maximum(0, evidence[number] + np.where(bad, one.if_bad, one.if_good))
            if step < 0:
                continue
            acted = waiting & (evidence >= alarm).any(0) & (evidence >= WARN_SHARE * alarm).all(0)
            taken[acted] = step + 1
            waiting &= ~acted
            if not waiting.any():
                break
        result["harmed"][f"{share:g}"] = {  # type: ignore[index]
            "median": float(np.nanmedian(taken)),
            "p90": float(np.nanquantile(taken, 0.9)),
            "never": int(waiting.sum()),
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


if __name__ == "__main__":
    main()
