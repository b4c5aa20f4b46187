"""From the first plan to the best measured one within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from quantize.plan.planner import Candidate, Choices, Planner
from quantize.plan.served import ServedKl
from quantize.plan.simulated import SimulatedModel

if TYPE_CHECKING:
    from torch import Tensor


def search(
    planner: Planner,
    simulated: SimulatedModel,
    served: ServedKl,
    reference: Sequence[Tensor],
    budget: int,
    tries: int = 200,
    finalists: int = 4,
    seed: int = 0,
) -> list[Candidate]:
    """Plan, refine by swaps measured in torch, then measure the ``finalists`` on the engine; best first.

    The first plan, which comes from predictions alone, is always among the finalists. Schemes that an engine
    computes differently are corrected for in the search: their rows' measured excess over torch is added.
    """
    first = planner.within(budget)

    def measured(choices: Choices) -> float:
        return simulated.kl(choices, reference) + planner.engine_excess(choices)

    found = planner.refine(first, budget, measured, tries, seed=seed, label="search")
    picked = [choices for _, choices in found[:finalists]]
    if first not in picked:
        picked.append(first)
    candidates = [
        Candidate(
            plan=planner.plan(choices),
            weight_bytes=planner.weight_bytes(choices),
            predicted_kl=planner.predicted(choices),
            simulated_kl=measured(choices),
            served_kl=served(choices),
        )
        for choices in picked
    ]
    return sorted(candidates, key=lambda candidate: candidate.served_kl or 0.0)
