"""Finds the plan with the least loss within a budget of bytes, and the fewest bytes within a loss.

The losses of groups add up well from 8 to 4 bits, so a plan is an exact multiple-choice knapsack over the
rows of :mod:`quantize.plan.sensitivity`. Where they do not add up, measuring plans on the engine shows it
(:mod:`quantize.plan.search`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from quantize.core.modules import Modules
from quantize.core.plan import Plan
from quantize.core.schemes import scheme
from quantize.plan.sensitivity import Sensitivity
from quantize.plan.served import KEPT, Choice, plan_of
from quantize.plan.served import PlanError as PlanError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Choices = Mapping[str, Choice]


@dataclass(frozen=True)
class Option:
    """One way to store one class of the knapsack: a module group, or the KV cache."""

    name: str
    bytes: int
    loss: float


Classes = Sequence[Sequence[Option]]


@dataclass(frozen=True)
class Front:
    """Every (bytes, loss) of an assignment that no other beats in both, by rising bytes."""

    bytes: NDArray[np.int64]
    loss: NDArray[np.float64]
    _steps: tuple[tuple[NDArray[np.int32], NDArray[np.int8]], ...]

    def picks(self, state: int) -> tuple[int, ...]:
        """The option of each class in the assignment of that index."""
        found = []
        for parents, options in reversed(self._steps):
            found.append(int(options[state]))
            state = int(parents[state])
        return tuple(reversed(found))


def front(classes: Classes, budget: int | None = None) -> Front:
    """The exact Pareto front of one option per class, up to ``budget`` bytes.

    Dynamic programming over the classes, keeping undominated partial sums (Nemhauser and Ullmann 1969).
    Groups of one kind take the same bytes, so that sums coincide and the front stays short: some 30,000
    points, found in a second, for the 128 groups of an 8-billion-parameter Llama at six schemes.
    """
    import numpy as np

    size, loss = np.zeros(1, np.int64), np.zeros(1)
    rest = sum(min(option.bytes for option in options) for options in classes)
    steps = []
    for options in classes:
        rest -= min(option.bytes for option in options)
        sizes = np.concatenate([size + option.bytes for option in options])
        losses = np.concatenate([loss + option.loss for option in options])
        order = np.lexsort((losses, sizes))
        if budget is not None:
            order = order[sizes[order] <= budget - rest]
        before = np.minimum.accumulate(np.concatenate(([np.inf], losses[order][:-1])))[: len(order)]
        order = order[losses[order] < before]
        steps.append(((order % len(size)).astype(np.int32), (order // len(size)).astype(np.int8)))
        size, loss = sizes[order], losses[order]
    return Front(size, loss, tuple(steps))


def least_loss(classes: Classes, budget: int) -> tuple[int, ...]:
    """Options of the least loss within ``budget`` bytes. Raises PlanError if even the smallest is larger."""
    found = front(classes, budget)
    if not len(found.bytes):
        least = sum(min(option.bytes for option in options) for options in classes)
        raise PlanError(f"a budget of {budget} bytes is below the least possible, {least} bytes")
    return found.picks(len(found.bytes) - 1)


def fewest_bytes(classes: Classes, loss: float) -> tuple[int, ...]:
    """Options of the fewest bytes with a summed loss of at most ``loss``. Raises PlanError."""
    found = front(classes)
    for state, total in enumerate(found.loss):
        if total <= loss:
            return found.picks(state)
    least = sum(min(option.loss for option in options) for options in classes)
    raise PlanError(f"a loss of {loss:g} is below the least possible, {least:g} nats per token")


class Candidate(BaseModel):
    """A plan with what was predicted and measured of it; ``None`` where it was not."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    plan: Plan
    weight_bytes: int
    predicted_kl: float
    served_kl: float | None = None

    @property
    def by_kl(self) -> float:
        """Sorts candidates, the best first; what was not measured is last."""
        return math.inf if self.served_kl is None else self.served_kl


class Planner:
    """Plans over the rows of one sensitivity analysis; a choice whose loss is not known is none."""

    def __init__(self, modules: Modules, sensitivity: Sensitivity) -> None:
        self.modules = modules
        self._options: dict[str, list[tuple[Choice, Option]]] = {}
        for row in sensitivity.rows:
            if not math.isfinite(row.loss):
                continue
            option = Option(f"{row.scheme}@{row.method}", row.bytes, max(0.0, row.loss))
            self._options.setdefault(row.group, []).append(((row.scheme, row.method), option))
        for group in modules:
            kept = Option("bf16", group.stored_bytes(scheme("bf16")), 0.0)
            self._options.setdefault(group.name, []).append((KEPT, kept))

    @property
    def classes(self) -> list[list[Option]]:
        """The knapsack's classes, in the order of ``modules``."""
        return self._weighted({})

    def _weighted(self, weights: Mapping[str, float]) -> list[list[Option]]:
        """The classes with the losses of each group times its weight."""
        return [
            [replace(o, loss=o.loss * weights.get(group.name, 1.0)) for _, o in self._options[group.name]]
            for group in self.modules
        ]

    def _choices(self, picks: Sequence[int]) -> dict[str, Choice]:
        return {
            group.name: self._options[group.name][pick][0]
            for group, pick in zip(self.modules, picks, strict=True)
        }

    def within(self, budget: int, weights: Mapping[str, float] | None = None) -> dict[str, Choice]:
        """The least predicted loss with all weights, embeddings and head in ``budget`` bytes.

        ``weights`` multiplies the losses of groups, by name.
        """
        left = budget - self.modules.other_bytes
        try:
            return self._choices(least_loss(self._weighted(weights or {}), left))
        except PlanError:
            least = self.modules.other_bytes + sum(min(o.bytes for o in c) for c in self.classes)
            raise PlanError(
                f"a budget of {budget} bytes is below the least possible, {least} bytes, of which "
                f"{self.modules.other_bytes} are embeddings, head and norms; raise the budget"
            ) from None

    def for_loss(self, loss: float) -> dict[str, Choice]:
        """The fewest bytes with a predicted loss of at most ``loss`` nats per token."""
        return self._choices(fewest_bytes(self.classes, loss))

    def predicted(self, choices: Choices) -> float:
        """The sum of the groups' own losses."""
        return sum(self._loss(group.name, choices[group.name]) for group in self.modules)

    def weight_bytes(self, choices: Choices) -> int:
        """Bytes of the whole checkpoint."""
        return self.modules.other_bytes + sum(
            group.stored_bytes(scheme(choices[group.name][0])) for group in self.modules
        )

    def smallest(self) -> dict[str, Choice]:
        """The choices of the fewest bytes."""
        return {name: min(known, key=lambda one: one[1].bytes)[0] for name, known in self._options.items()}

    def choices_of(self, group: str) -> list[Choice]:
        """Every choice that a group has."""
        return [choice for choice, _ in self._options[group]]

    def plan(self, choices: Choices, kv: str = "auto") -> Plan:
        """The plan of ``choices``."""
        return plan_of(choices, kv)

    def _loss(self, group: str, choice: Choice) -> float:
        return next(option.loss for known, option in self._options[group] if known == choice)
