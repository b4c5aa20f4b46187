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

from quantize.plan.planner import Candidate, Choices, PlanError, Planner
from quantize.plan.served import NotFiniteError, ServedKl

GROUP_SPREAD = 0.3
KIND_SPREAD = 0.2
"""Standard deviations of the logarithms of the factors that are drawn."""


def search(
    planner: Planner, served: ServedKl, budget: int, tries: int = 12, seed: int = 0
) -> list[Candidate]:
    """Measure ``tries`` different plans within ``budget`` bytes on the engine; best first.

    The first is the one that predictions alone give. Raises PlanError where the engine answers none of them
    with finite numbers.
    """
    rng = random.Random(seed)
    groups = list(planner.modules)
    kinds = sorted({group.kind for group in groups})
    best: dict[str, float] = dict.fromkeys((group.name for group in groups), 0.0)
    tried: set[tuple[tuple[str, tuple[str, str]], ...]] = set()
    found: list[Candidate] = []

    def measured(choices: Choices) -> float:
        tried.add(tuple(sorted(choices.items())))
        try:
            kl = served(choices)
        except NotFiniteError as error:
            tqdm.write(f"a plan is left out: {error}", file=sys.stderr)
            return math.inf
        candidate = Candidate(
            plan=planner.plan(choices),
            weight_bytes=planner.weight_bytes(choices),
            predicted_kl=planner.predicted(choices),
            served_kl=kl,
        )
        found.append(candidate)
        return kl

    with tqdm(total=tries, desc="search", unit="plan", file=sys.stderr) as bar:
        lowest = measured(planner.within(budget))
        bar.update()
        for _ in range(4 * tries):  # many draws give a plan that is known
            if len(tried) >= tries:
                break
            of_kind = {kind: rng.gauss(0, KIND_SPREAD) for kind in kinds}
            trial = {g.name: best[g.name] + of_kind[g.kind] + rng.gauss(0, GROUP_SPREAD) for g in groups}
            choices = planner.within(budget, {name: math.exp(factor) for name, factor in trial.items()})
            if tuple(sorted(choices.items())) in tried:
                continue
            loss = measured(choices)
            bar.update()
            if loss < lowest:
                lowest, best = loss, trial
            bar.set_postfix(kl=f"{lowest:.5f}")
    if not found:
        raise PlanError(
            "the engine answers no plan with finite numbers; give other schemes, or a larger budget"
        )
    return sorted(found, key=lambda candidate: candidate.by_kl)
