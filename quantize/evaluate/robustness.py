"""How much more a variant loses than the reference when items are asked otherwise; reported, not gated.

Both answer the same items as they are, and changed by :mod:`quantize.evaluate.perturb`, through their
engines. Where the right answer stays right, a row has the drop of each, and the variant's drop less the
reference's with an interval over items, since items and changes are the same. Of what is empty or extreme it
has the shares that were answered, by something that is no gibberish.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict
from tqdm import tqdm

from quantize.card import Paired
from quantize.evaluate.client import EngineClient, EngineError
from quantize.evaluate.grounding import words
from quantize.evaluate.journal import Entry, Job, Journal, run_jobs
from quantize.evaluate.perturb import WITH_ANSWERS, Kind, perturbed
from quantize.evaluate.tasks import Item
from quantize.gate.paired import mcnemar_p

PLAIN = "plain"
ALPHA = 0.05
REPEATED, LONG_ENOUGH = 0.5, 24
"""Share of an answer's words that are one word, and words from which on, that make it gibberish."""
SQUEEZED, LONG_TEXT = 0.12, 300
"""Bytes after compression over bytes, of an answer that goes round in circles, and its length."""
Answers = Mapping[tuple[str, str, int], str | None]
"""Kind (or ``plain``), role and item to the answer; None where the engine refused what was asked."""


class RobustnessRow(BaseModel):
    """One kind of change in one role, of one variant beside the reference."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: str
    kind: str
    variant: str
    items: int
    same_answer: int
    """Answers to changed items that are the reference's, letter by letter."""
    answered: int
    reference_answered: int
    """Items that got an answer which is no gibberish."""
    plain: int | None = None
    """Right answers to the items as they are."""
    reference_plain: int | None = None
    changed: Paired | None = None
    """Right answers to the changed items, paired with the reference's."""
    more_lost: float | None = None
    """The variant's drop less the reference's, share of items."""
    interval: tuple[float, float] | None = None
    """95 % of that."""


class Robustness(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    reference: str
    seed: int
    rows: tuple[RobustnessRow, ...]


def chosen_items(items: Sequence[Item], count: int) -> list[Item]:
    """At most ``count`` of a role's items, evenly: they are often sorted. Long contexts are left out."""
    task = [item for item in items if item.suite == "task"]
    step = max(1.0, len(task) / count)
    return [task[int(number * step)] for number in range(min(len(task), count))]


def asked(
    tasks: Mapping[str, Sequence[Item]], kinds: Sequence[Kind], seed: int
) -> dict[str, dict[str, list[Item]]]:
    """Kind to role to items, as they are first."""
    made: dict[str, dict[str, list[Item]]] = {PLAIN: {role: list(items) for role, items in tasks.items()}}
    for kind in kinds:
        made[kind] = {role: [perturbed(item, kind, seed) for item in items] for role, items in tasks.items()}
    return made


async def ask_all(
    client: EngineClient, what: Mapping[str, Mapping[str, Sequence[Item]]], name: str, journal: Journal
) -> Answers:
    """Have an engine answer everything, with a progress bar; what is in the journal is not asked again."""
    found: dict[tuple[str, str, int], str | None] = {}
    for entry in journal.read():
        found[str(entry["kind"]), str(entry["role"]), int(entry["index"])] = entry["answer"]
    jobs: list[Job] = [
        _asking(client, kind, role, index, item)
        for kind, roles in what.items()
        for role, items in roles.items()
        for index, item in enumerate(items)
        if (kind, role, index) not in found
    ]
    with tqdm(total=len(jobs), desc=f"ask {name}", unit="item", mininterval=1, disable=not jobs) as bar:
        for new in await run_jobs(jobs, journal, bar.update):
            found[str(new["kind"]), str(new["role"]), int(new["index"])] = new["answer"]
    return found


def _asking(client: EngineClient, kind: str, role: str, index: int, item: Item) -> Job:
    async def job() -> Entry:
        schema = item.json_schema if item.guided else None
        answer: str | None
        try:
            answer = await client.answer(item.messages, item.max_tokens, schema, item.chat_template_kwargs)
        except EngineError as error:
            if " answered 4" not in str(error):  # 400: it does not take this; else the engine is unwell
                raise
            answer = None
        return {"kind": kind, "role": role, "index": index, "answer": answer}

    return job


def is_gibberish(answer: str | None) -> bool:
    """Nothing, one word again and again, or a text that goes round in circles."""
    if answer is None or not answer.strip():
        return True
    found = words(answer)
    if len(found) >= LONG_ENOUGH and Counter(found).most_common(1)[0][1] > REPEATED * len(found):
        return True
    raw = answer.encode()
    return len(raw) >= LONG_TEXT and len(zlib.compress(raw)) < SQUEEZED * len(raw)


def compare(
    tasks: Mapping[str, Sequence[Item]],
    kinds: Sequence[Kind],
    variant: str,
    reference: Answers,
    answers: Answers,
) -> list[RobustnessRow]:
    """A row per role and kind."""
    return [
        _row(role, items, kind, variant, reference, answers)
        for role, items in tasks.items()
        for kind in kinds
    ]


def _row(
    role: str, items: Sequence[Item], kind: Kind, variant: str, reference: Answers, answers: Answers
) -> RobustnessRow:
    places = [(kind, role, index) for index in range(len(items))]
    made = RobustnessRow(
        role=role,
        kind=kind,
        variant=variant,
        items=len(items),
        same_answer=sum(reference[place] == answers[place] for place in places),
        answered=sum(not is_gibberish(answers[place]) for place in places),
        reference_answered=sum(not is_gibberish(reference[place]) for place in places),
    )
    if kind not in WITH_ANSWERS:
        return made

    def is_right(item: Item, given: str | None, own: str | None) -> bool:
        # Where nobody has said what is right, the reference's answer to the same question stands for it.
        if item.check == "reference":
            item = item.model_copy(update={"expected": own or ""})
        return item.is_right(given or "")

    def right(given: Answers, how: str) -> list[bool]:
        places = [(how, role, index) for index in range(len(items))]
        return [is_right(item, given[at], reference[at]) for item, at in zip(items, places, strict=True)]

    plain, plain_reference = right(answers, PLAIN), right(reference, PLAIN)
    changed, changed_reference = right(answers, kind), right(reference, kind)
    more = [
        (int(p) - int(c)) - (int(rp) - int(rc))
        for p, c, rp, rc in zip(plain, changed, plain_reference, changed_reference, strict=True)
    ]
    mean, interval = mean_interval(more)
    to_bad = sum(r and not v for r, v in zip(changed_reference, changed, strict=True))
    to_good = sum(v and not r for r, v in zip(changed_reference, changed, strict=True))
    return made.model_copy(
        update={
            "plain": sum(plain),
            "reference_plain": sum(plain_reference),
            "changed": Paired(
                items=len(items),
                good=sum(changed),
                reference_good=sum(changed_reference),
                flips_to_bad=to_bad,
                flips_to_good=to_good,
                mcnemar_p=mcnemar_p(to_bad, to_good),
            ),
            "more_lost": mean,
            "interval": interval,
        }
    )


def mean_interval(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """The mean of differences, and its 95 % interval by Student's t with one difference of either sign added.

    Without those, items that all agree would have an interval of no width, as if nothing could be otherwise
    (Agresti and Min, Statistics in Medicine 2005;24:729, add half an item to each cell of such a table).
    """
    from scipy.special import stdtrit

    count = len(values) + 2
    mean = math.fsum(values) / len(values)
    middle = math.fsum(values) / count
    squares = math.fsum((value - middle) ** 2 for value in (*values, 1.0, -1.0))
    half = float(stdtrit(count - 1, 1 - ALPHA / 2)) * math.sqrt(squares / (count - 1) / count)
    return mean, (middle - half, middle + half)
