"""The embedded detectors on labelled answers: balanced accuracy and AUC with their intervals.

    python -m benchmarks.watch.detectors

HaluEval QA has 500 questions, each with a right and a made-up answer. Its made-up answers are sentences and
its right ones mostly a few words, so that length alone tells them apart; a row shows what that is worth, and
another looks only at pairs of about the same length. The second set is ours: sentences about generated
records, half of them with one value replaced by another of its kind, or by a value of the same record that
belongs to something else.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.quantization.data import SHARED, present
from deploy.assistant.records import make_record
from gateway.quality.detectors import LEXICAL_LIMIT, Lexical, Rules

WORK = Path("var/benchmarks/watch")
RECORDS, SEEDS = 500, 44_000_000
ALIKE = 1.5
"""Longest ratio of the lengths of a pair that counts as of about the same length."""
BOOTSTRAPS = 1000


@dataclass(frozen=True)
class Case:
    """A right and a made-up answer to the same question."""

    context: str
    right: str
    wrong: str


Score = Callable[[str, str], tuple[float, bool]]
"""(answer, context) to how sure it is that the answer is made up, and whether it says so."""


def halueval() -> list[Case]:
    path = present(SHARED / "halueval_qa.jsonl", "500 lines of HaluEval's QA data")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Case(row["knowledge"], row["right_answer"], row["hallucinated_answer"]) for row in rows]


def records(kind: str) -> list[Case]:
    """``invented``: the value is of another record; ``swapped``: of another line of the same one."""
    rng = random.Random(0)
    cases = []
    for number in range(RECORDS):
        one, other = make_record(SEEDS + 2 * number), make_record(SEEDS + 2 * number + 1)
        fact = rng.choice([fact for fact in one.facts if fact in one.summary])
        if kind == "invented":
            choices = [fact for fact in other.facts if fact not in one.text]
        else:
            choices = [value for value in one.facts if value not in (fact,) and value not in fact]
        if choices:
            cases.append(Case(one.text, one.summary, one.summary.replace(fact, rng.choice(choices))))
    return cases


def auc(wrong: np.ndarray, right: np.ndarray) -> float:
    """The chance that a made-up answer scores higher than a right one; ties count half."""
    return float((wrong[:, None] > right[None]).mean() + 0.5 * (wrong[:, None] == right[None]).mean())


def measure(cases: Sequence[Case], score: Score) -> dict[str, tuple[float, float, float]]:
    """Figures with 95 % bootstrap intervals over cases."""
    found = [(score(case.wrong, case.context), score(case.right, case.context)) for case in cases]
    wrong, right = (np.array([pair[side][0] for pair in found]) for side in (0, 1))
    caught, spared = (np.array([pair[side][1] for pair in found]) for side in (0, 1))
    picks = np.random.default_rng(0).integers(0, len(cases), size=(BOOTSTRAPS, len(cases)))

    def interval(value: Callable[[np.ndarray], float]) -> tuple[float, float, float]:
        every = np.arange(len(cases))
        low, high = np.quantile([value(pick) for pick in picks], (0.025, 0.975))
        return value(every), float(low), float(high)

    return {
        "auc": interval(lambda pick: auc(wrong[pick], right[pick])),
        "balanced": interval(lambda pick: float(caught[pick].mean() + 1 - spared[pick].mean()) / 2),
        "sensitivity": interval(lambda pick: float(caught[pick].mean())),
        "specificity": interval(lambda pick: float(1 - spared[pick].mean())),
    }


def main() -> None:
    rules, lexical = Rules(), Lexical()
    scores: dict[str, Score] = {
        "rules": lambda answer, context: ((f := rules.check(answer, context)).risk, f.bad > 0),
        f"lexical (limit {LEXICAL_LIMIT:g})": lambda answer, context: (
            (f := lexical.check(answer, context)).risk,
            f.bad > 0,
        ),
        "length alone (more than 8 words)": lambda answer, _: (len(answer.split()), len(answer.split()) > 8),
    }
    whole = halueval()
    alike = [
        case
        for case in whole
        if max(len(case.right), len(case.wrong)) <= ALIKE * min(len(case.right), len(case.wrong))
    ]
    sets = {
        "HaluEval QA": whole,
        f"of those, lengths within {ALIKE:g} times": alike,
        "records, a value of another record": records("invented"),
        "records, a value of another line": records("swapped"),
    }
    results = {}
    print("| set | pairs | detector | AUC | balanced accuracy | sensitivity | specificity |")
    print("|---|---|---|---|---|---|---|")
    for title, cases in sets.items():
        for name, score in scores.items():
            figures = results[f"{title}: {name}"] = measure(cases, score)
            cells = " | ".join("{:.3f} ({:.3f}–{:.3f})".format(*figures[key]) for key in figures)
            print(f"| {title} | {len(cases)} | {name} | {cells} |")
    WORK.mkdir(parents=True, exist_ok=True)
    (WORK / "detectors.json").write_text(json.dumps(results, indent=1))
    print(f"written to {WORK / 'detectors.json'}", file=sys.stderr)


if __name__ == "__main__":
    main()
