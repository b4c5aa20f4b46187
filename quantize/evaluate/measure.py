"""Asks one engine everything a gate needs, and keeps the answers so that variants can be paired.

The reference is measured first: what its engine computed of every scored token is kept in a file beside its
journal (:mod:`quantize.evaluate.reference`), and the variants' engines return the KL to it. Every answer and
every scored conversation goes to a journal as it comes, some at a time: a killed evaluation goes on where it
was. What is asked depends on the items and the engine's tokenizer alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from quantize.evaluate.client import TOPS_IN_JSON, EngineClient
from quantize.evaluate.journal import Entry, Job, Journal, run_jobs
from quantize.evaluate.reference import ReferenceFile
from quantize.evaluate.rendered import Part, as_kept, right_answer
from quantize.evaluate.scores import Scored
from quantize.evaluate.tasks import BEGINNING, Item, by_first_role

SCORED_TOKENS, SCORED_CONVERSATIONS = 1000, 80
"""Per role: tokens of right answers that are scored, spread over so many conversations: of answers that are
longer than their part of it, a stretch is. All conversations of a long context are scored as they are."""
OWN_TOKENS, OWN_CONVERSATIONS = 12_000, 256
"""The same of the reference's own answers, by which alone such a role is judged: a conversation's share of
first choices is known well enough from about 30 tokens on."""
QUESTIONS = 4
"""Raised whenever the code asks something else of the same items; kept measurements are made anew."""
SERVER = "vllm"
"""Under which what the engine calls its version is kept, whichever engine it is."""
Tasks = Mapping[str, Sequence[Item]]
"""Role name to its held-out items, of all suites."""


@dataclass(frozen=True)
class ScoredAnswer:
    """A right answer in its conversation: its tokens, and the engine's scores of them."""

    tokens: tuple[int, ...]
    prompt_tokens: int
    """Tokens of the whole conversation."""
    scored: Scored


@dataclass
class Measurement:
    """What one engine answered in one pass. Roles to items by their place in the role's list."""

    answers: dict[str, dict[int, str]] = field(default_factory=dict)
    scored: dict[str, dict[int, ScoredAnswer]] = field(default_factory=dict)
    engine: dict[str, str] = field(default_factory=dict)
    done: bool = False

    def add(self, entry: Entry) -> None:
        """Take in a journal's entry. Raises KeyError or ValueError."""
        if "engine" in entry:
            self.engine, self.done = dict(entry["engine"]), True
            return
        role, index = str(entry["role"]), int(entry["index"])
        if "answer" in entry:
            self.answers.setdefault(role, {})[index] = str(entry["answer"])
        else:
            self.scored.setdefault(role, {})[index] = ScoredAnswer(
                tuple(entry["tokens"]), int(entry["prompt_tokens"]), Scored.from_json(entry["scored"])
            )


def tasks_sha256(tasks: Tasks) -> str:
    """Changes whenever an item, or what is measured on it, changes."""
    listing: dict[str, Any] = {role: [item.model_dump() for item in tasks[role]] for role in sorted(tasks)}
    amounts = (SCORED_TOKENS, SCORED_CONVERSATIONS, OWN_TOKENS, OWN_CONVERSATIONS, BEGINNING)
    listing["settings"] = [QUESTIONS, *amounts, *TOPS_IN_JSON]
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()


def measurement_key(tasks: Tasks, engine: Mapping[str, str]) -> str:
    """What a kept measurement is found by: other tasks, or another processor or setting, is another one."""
    listing = {"tasks": tasks_sha256(tasks), "engine": dict(engine)}
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()


def read_measurement(journal: Journal, reference: Path | None = None) -> Measurement:
    """What the journal holds so far; ``done`` when nothing is missing.

    ``reference`` is the file that a variant is compared with. Figures to what is not in it any more (it was
    lost, or is of another run) are left out, as are a reference's own that are not in its file: they are
    taken anew.
    """
    measurement = Measurement()
    for entry in journal.read():
        measurement.add(entry)
    beside, given = ReferenceFile(reference_path(journal)), ReferenceFile(reference) if reference else None

    def is_outdated(role: str, index: int, against: str) -> bool:
        if against == "":
            return given is not None or beside.digest(role, index) is None
        return given is not None and given.digest(role, index) != against

    outdated = [
        (role, index)
        for role, answers in measurement.scored.items()
        for index, answer in answers.items()
        if is_outdated(role, index, answer.scored.against)
    ]
    for role, index in outdated:
        del measurement.scored[role][index]
    measurement.done = measurement.done and not outdated
    return measurement


def reference_path(journal: Journal) -> Path:
    """Where what is kept of a reference lies: beside its journal."""
    return journal.path.with_name(journal.path.name + ".reference")


def for_all_roles(measurement: Measurement, tasks: Tasks) -> Measurement:
    """The same with what was asked once for several roles under each of them."""
    first = by_first_role(tasks)
    return replace(
        measurement,
        answers={role: measurement.answers[one] for role, one in first.items() if one in measurement.answers},
        scored={role: measurement.scored[one] for role, one in first.items() if one in measurement.scored},
    )


async def measure(
    client: EngineClient,
    tasks: Tasks,
    engine: dict[str, str],
    name: str,
    journal: Journal,
    *,
    reference: Path | None = None,
    backwards: bool = False,
) -> Measurement:
    """Answer every item greedily and score right answers, with a progress bar; what is there is kept. What
    roles have in common is asked for the first of them (:func:`for_all_roles`).

    Without ``reference`` this is the reference's own measurement, and what variants need of it is kept in
    :func:`reference_path`, which is a variant's ``reference``. ``backwards`` asks in the opposite order, so
    that other requests share the engine's batches. Raises TaskError where the variant splits a right answer
    into other tokens than the reference, the reference's file lacks it, or nothing of it is left to score.
    """
    measurement = read_measurement(journal, reference)
    if measurement.done:
        return measurement
    tasks = {role: tasks[role] for role in dict.fromkeys(by_first_role(tasks).values())}
    if reference is None:
        _take_own_answers(measurement, tasks, journal)
    kept = ReferenceFile(reference or reference_path(journal))
    places = [(role, index) for role, items in tasks.items() for index in range(len(items))]
    jobs: list[Job] = [
        _answering(client, tasks[role][index], role, index)
        for role, index in places
        if index not in measurement.answers.get(role, {})
    ]
    for role, items in tasks.items():
        for index, tokens, start in await _chosen(client, items, role, kept if reference else None):
            if index not in measurement.scored.get(role, {}):
                jobs.append(_scoring(client, role, index, tokens, start, kept, own=reference is None))
    with tqdm(total=len(jobs), desc=f"evaluate {name}", unit="item", mininterval=1) as bar:
        for entry in await run_jobs(jobs[::-1] if backwards else jobs, journal, bar.update):
            measurement.add(entry)
    last = {"engine": {**engine, SERVER: await client.version()}}
    journal.append([last])
    measurement.add(last)
    return measurement


def _take_own_answers(measurement: Measurement, tasks: Tasks, journal: Journal) -> None:
    """Answers of the reference's first pass that are known: an item that was made of one."""
    known: list[Entry] = [
        {"role": role, "index": index, "answer": item.expected}
        for role, items in tasks.items()
        for index, item in enumerate(items)
        if item.check == "reference" and index not in measurement.answers.get(role, {})
    ]
    journal.append(known)
    for entry in known:
        measurement.add(entry)


def _answering(client: EngineClient, item: Item, role: str, index: int) -> Job:
    async def job() -> Entry:
        schema = item.json_schema if item.guided else None
        text = await client.answer(item.messages, item.max_tokens, schema, item.chat_template_kwargs)
        return {"role": role, "index": index, "answer": text}

    return job


def _scoring(
    client: EngineClient, role: str, index: int, tokens: list[int], start: int, kept: ReferenceFile, own: bool
) -> Job:
    async def job() -> Entry:
        if own:
            scored, record = await client.score_and_keep(tokens, start)
            kept.append(role, index, tokens, start, record)  # before the journal says that it is there
        else:
            record = kept.read(role, index)
            scored = replace(await client.score_against(tokens, start, record), against=record.digest)
        return {
            "role": role,
            "index": index,
            "tokens": tokens[start:],
            "prompt_tokens": len(tokens),
            "scored": scored.to_json(),
        }

    return job


async def _chosen(
    client: EngineClient, items: Sequence[Item], role: str, kept: ReferenceFile | None = None
) -> list[Part]:
    """Stretches of right answers that are scored; with ``kept`` those that were scored of the reference.

    Conversations are what a gate counts, so none of them takes the tokens of others.
    """
    task = [index for index, item in enumerate(items) if item.suite == "task"]
    own = all(items[index].check == "reference" for index in task)
    budget, count = (OWN_TOKENS, OWN_CONVERSATIONS) if own else (SCORED_TOKENS, SCORED_CONVERSATIONS)
    step = max(1.0, len(task) / count)  # evenly, for items are often sorted
    task = [task[int(number * step)] for number in range(min(len(task), count))]
    others = [index for index, item in enumerate(items) if item.suite != "task"]
    answers = (right_answer(client, items[index], role, index) for index in [*task, *others])
    found = await asyncio.gather(*answers)
    most = _spread([len(tokens) - start for _, tokens, start in found[: len(task)]], budget)
    stretches = [*(_stretch(*one, most) for one in found[: len(task)]), *found[len(task) :]]
    return stretches if kept is None else as_kept(kept, role, found, stretches)


def _spread(lengths: Sequence[int], budget: int) -> int:
    """Tokens that each answer may give, so that all of them together give ``budget`` at most; at least 1."""
    left, most = budget, max(lengths, default=1)
    for place, length in enumerate(sorted(lengths)):
        part = left // (len(lengths) - place)
        if length > part:
            return max(1, part)
        left -= length
    return max(1, most)


def _stretch(index: int, tokens: list[int], start: int, most: int) -> Part:
    """At most ``most`` tokens of an answer, from a place that the conversation's own tokens decide: so the
    beginning of answers counts no more than the rest."""
    spare = len(tokens) - start - most
    if spare > 0:
        digest = hashlib.sha256(json.dumps(tokens).encode()).digest()
        start += int.from_bytes(digest[:8], "big") % (spare + 1)
    return index, tokens[: start + most], start
