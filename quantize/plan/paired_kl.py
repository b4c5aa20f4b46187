"""Plans against each other on the same conversations, through the kernels of the engine."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.core.jsonl import read_kept
from quantize.core.plan import Plan
from quantize.evaluate.bench import Bench, Span

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONFIDENT = 1.96
BOOTSTRAPS = 2000


@dataclass(frozen=True)
class Ratio:
    """One plan's KL over another's, with a paired 95 % bootstrap interval over conversations."""

    ratio: float
    low: float
    high: float


class PairedKl:
    """Measures checkpoints on ``spans`` against the checkpoint in ``base``, and keeps what was measured.

    Of every conversation the sum of the KL over its tokens is kept, nats over the whole vocabulary, so that
    intervals can treat conversations as independent. ``make`` writes the checkpoint of a plan into a
    directory. What is kept lies in ``work``, which belongs to one engine and one list of spans.
    """

    def __init__(
        self,
        base: Path,
        bench: Bench,
        spans: Sequence[Span],
        work: Path,
        make: Callable[[Plan, Path], object],
    ) -> None:
        import numpy as np

        self._base, self._bench, self._spans, self._work, self._make = base, bench, spans, work, make
        self._file = work / "reported.jsonl"
        work.mkdir(parents=True, exist_ok=True)
        self._known: dict[str, list[float]] = dict(read_kept(self._file))
        self.lengths = np.array([len(tokens) - start for tokens, start in spans])

    @staticmethod
    def key(plan: Plan) -> str:
        """What a plan's figures are kept under."""
        return plan.model_dump_json(exclude={"tuned"}) + (" tuned" if plan.tuned else "")

    def knows(self, plan: Plan) -> bool:
        """Whether the plan was measured before."""
        return self.key(plan) in self._known

    def take(self, plan: Plan, directory: Path) -> None:
        """Measure ``plan`` in the checkpoint that was made of it already."""
        import numpy as np

        if self.knows(plan):
            return
        reference = self._work / "reported.npz"
        if not reference.exists():
            self._bench.score(self._base, self._spans, save=reference)
        scores = self._bench.score(directory, self._spans, kv=plan.kv, reference=reference)
        starts = np.concatenate(([0], np.cumsum(self.lengths)[:-1]))
        sums = [float(value) for value in np.add.reduceat(scores.kl, starts)]
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps([self.key(plan), sums]) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._known[self.key(plan)] = sums

    def sums(self, plan: Plan) -> NDArray[Any]:
        """KL summed over each conversation's tokens, nats; shape (conversations,)."""
        import numpy as np

        if not self.knows(plan):
            folder = self._work / "candidate-reported"
            shutil.rmtree(folder, ignore_errors=True)  # another plan's, or half of one
            self._make(plan, folder)
            self.take(plan, folder)
        return np.array(self._known[self.key(plan)])

    def interval(self, plan: Plan) -> tuple[float, float]:
        """Mean KL per token, and half of its 95 % interval (ratio estimator over conversations)."""
        import numpy as np

        sums = self.sums(plan)
        mean = sums.sum() / self.lengths.sum()
        residuals = sums - mean * self.lengths
        error = np.sqrt(residuals.var(ddof=1) / len(sums)) / self.lengths.mean()
        return float(mean), float(CONFIDENT * error)

    def ratio(self, plan: Plan, other: Plan, seed: int = 0) -> Ratio:
        """KL of ``plan`` over KL of ``other``."""
        import numpy as np

        a, b = self.sums(plan), self.sums(other)
        picks = np.random.default_rng(seed).integers(0, len(a), size=(BOOTSTRAPS, len(a)))
        low, high = np.quantile(a[picks].sum(1) / b[picks].sum(1), (0.025, 0.975))
        return Ratio(float(a.sum() / b.sum()), float(low), float(high))
