"""Asks one engine everything a gate needs, and keeps the answers so that variants can be paired.

Every answer and every scored conversation goes to a journal as it comes, some at a time: a killed
evaluation goes on where it was. What is asked depends on the items and the engine's tokenizer alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from quantize.evaluate.client import TOP, TOP_IN_JSON, WHOLE_VOCABULARY, EngineClient
from quantize.evaluate.journal import Entry, Journal
from quantize.evaluate.scores import Scored
from quantize.evaluate.tasks import Item

SCORED_TOKENS, SCORED_CONVERSATIONS = 1000, 80
"""Per role: right answers are scored until there are so many tokens, or so many conversations. All
conversations of a long context are scored."""
QUESTIONS = 2
"""Raised whenever the code asks something else of the same items; kept measurements are made anew."""
BATCH = 32
"""Results that are written at once; so many may have to be asked again after a kill."""

Tasks = Mapping[str, Sequence[Item]]
"""Role name to its held-out items, of all suites."""
Job = Callable[[], Awaitable[Entry]]


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
    listing["settings"] = [QUESTIONS, SCORED_TOKENS, SCORED_CONVERSATIONS, TOP, TOP_IN_JSON, WHOLE_VOCABULARY]
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()


def measurement_key(tasks: Tasks, engine: Mapping[str, str]) -> str:
    """What a kept measurement is found by: other tasks, or another processor or setting, is another one."""
    listing = {"tasks": tasks_sha256(tasks), "engine": dict(engine)}
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()


def read_measurement(journal: Journal) -> Measurement:
    """What the journal holds so far; ``done`` when nothing is missing."""
    measurement = Measurement()
    for entry in journal.read():
        measurement.add(entry)
    return measurement


async def measure(
    client: EngineClient,
    tasks: Tasks,
    engine: dict[str, str],
    name: str,
    journal: Journal,
    backwards: bool = False,
) -> Measurement:
    """Answer every item greedily and score right answers, with a progress bar; what is there is kept.

    ``backwards`` asks in the opposite order, so that other requests share the engine's batches.
    """
    measurement = read_measurement(journal)
    if measurement.done:
        return measurement
    vocabulary = await client.vocabulary()
    places = [(role, index) for role, items in tasks.items() for index in range(len(items))]
    jobs: list[Job] = [
        _answering(client, tasks[role][index], role, index)
        for role, index in places
        if index not in measurement.answers.get(role, {})
    ]
    for role, items in tasks.items():
        for index, tokens, start in await _chosen(client, items):
            if index not in measurement.scored.get(role, {}):
                jobs.append(_scoring(client, role, index, tokens, start, vocabulary))
    with tqdm(total=len(jobs), desc=f"evaluate {name}", unit="item", mininterval=1) as bar:
        for entry in await _run(jobs[::-1] if backwards else jobs, journal, bar.update):
            measurement.add(entry)
    last = {"engine": {**engine, "vllm": await client.version()}}
    journal.append([last])
    measurement.add(last)
    return measurement


async def _run(jobs: Sequence[Job], journal: Journal, advance: Callable[[], object]) -> list[Entry]:
    """Results of all jobs; whatever happens, those that came are in the journal."""
    entries: list[Entry] = []
    written = 0

    async def run(job: Job) -> None:
        nonlocal written
        entries.append(await job())
        advance()
        if len(entries) - written >= BATCH:
            written, first = len(entries), written
            journal.append(entries[first:])

    try:
        async with asyncio.TaskGroup() as group:
            for job in jobs:
                group.create_task(run(job))
    finally:
        journal.append(entries[written:])
    return entries


def _answering(client: EngineClient, item: Item, role: str, index: int) -> Job:
    async def job() -> Entry:
        schema = item.json_schema if item.guided else None
        text = await client.answer(item.messages, item.max_tokens, schema, item.chat_template_kwargs)
        return {"role": role, "index": index, "answer": text}

    return job


def _scoring(
    client: EngineClient, role: str, index: int, tokens: list[int], start: int, vocabulary: int | None
) -> Job:
    async def job() -> Entry:
        scored = await client.score(tokens, start, vocabulary)
        return {
            "role": role,
            "index": index,
            "tokens": tokens[start:],
            "prompt_tokens": len(tokens),
            "scored": scored.to_json(),
        }

    return job


async def _chosen(client: EngineClient, items: Sequence[Item]) -> list[tuple[int, list[int], int]]:
    """Items whose right answers are scored: place, tokens of the conversation, the answer's first."""

    async def conversation(index: int) -> tuple[int, list[int], int]:
        item = items[index]
        more = item.chat_template_kwargs
        answered = [*item.messages, {"role": "assistant", "content": item.expected}]
        whole = await client.tokenize(answered, template=more)
        return index, whole, len(await client.tokenize(item.messages, True, more))

    task = [index for index, item in enumerate(items) if item.suite == "task"]
    step = max(1.0, len(task) / SCORED_CONVERSATIONS)  # evenly, for items are often sorted
    task = [task[int(number * step)] for number in range(min(len(task), SCORED_CONVERSATIONS))]
    others = [index for index, item in enumerate(items) if item.suite != "task"]
    found = await asyncio.gather(*(conversation(index) for index in [*task, *others]))
    kept, count = [], 0
    for index, tokens, start in found:
        if items[index].suite != "task":
            kept.append((index, tokens, start))
        elif count < SCORED_TOKENS:
            kept.append((index, tokens, start))
            count += len(tokens) - start
    return kept
