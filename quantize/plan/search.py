"""From the first plan to the best measured one within a budget.

Estimates of a group's losses come from some dozens of sequences and are off by a common factor, by a quarter
or so; so are kinds of modules, whose errors add up differently. Plans for other factors are plans as well:
factors are drawn around those of the best plan so far, the knapsack is solved for them, and its plan is
measured on the engine.
"""

from __future__ import annotations

import math
import random
import sys

from tqdm import tqdm

from quantize.plan.planner import Candidate, Choices, Planner
from quantize.plan.served import ServedKl

GROUP_SPREAD = 0.3
KIND_SPREAD = 0.2
"""Standard deviations of the logarithms of the factors that are drawn."""


def search(
    planner: Planner, served: ServedKl, budget: int, tries: int = 12, seed: int = 0
) -> list[Candidate]:
    """Measure ``tries`` different plans within ``budget`` bytes on the engine; best first.

    The first is the one that predictions alone give.
    """
    rng = random.Random(seed)
    groups = list(planner.modules)
    kinds = sorted({group.kind for group in groups})
    best: dict[str, float] = dict.fromkeys((group.name for group in groups), 0.0)
    found: dict[tuple[tuple[str, tuple[str, str]], ...], Candidate] = {}

    def measured(choices: Choices) -> float:
        candidate = Candidate(
            plan=planner.plan(choices),
            weight_bytes=planner.weight_bytes(choices),
            predicted_kl=planner.predicted(choices),
            served_kl=served(choices),
        )
        found[tuple(sorted(choices.items()))] = candidate
        assert candidate.served_kl is not None
        return candidate.served_kl

    with tqdm(total=tries, desc="search", unit="plan", file=sys.stderr) as bar:
        lowest = measured(planner.within(budget))
        bar.update()
        for _ in range(4 * tries):  # many draws give a plan that is known
            if len(found) >= tries:
                break
            of_kind = {kind: rng.gauss(0, KIND_SPREAD) for kind in kinds}
            trial = {g.name: best[g.name] + of_kind[g.kind] + rng.gauss(0, GROUP_SPREAD) for g in groups}
            choices = planner.within(budget, {name: math.exp(factor) for name, factor in trial.items()})
            if tuple(sorted(choices.items())) in found:
                continue
            loss = measured(choices)
            bar.update()
            if loss < lowest:
                lowest, best = loss, trial
            bar.set_postfix(kl=f"{lowest:.5f}")
    return sorted(found.values(), key=lambda candidate: candidate.served_kl or 0.0)
