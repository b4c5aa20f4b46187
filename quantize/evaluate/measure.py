"""Asks one engine everything a gate needs, and keeps the answers so that variants can be paired."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from tqdm import tqdm

from quantize.card import Evaluation, RoleEvaluation
from quantize.evaluate.client import EngineClient, TokenScores
from quantize.evaluate.statistics import compare_tokens
from quantize.evaluate.tasks import Item
from quantize.gate import mcnemar_p

SCORED_TOKENS = 1200
"""Tokens of held-out conversations that perplexity and KL are measured on."""
TOP = 128
"""Likeliest tokens that the KL sums over one by one; the rest of the vocabulary is one bucket."""

Tasks = Mapping[str, Sequence[Item]]
"""Role name to its held-out items."""


class Measurement(BaseModel):
    """What one engine answered: texts per role, and token scores on held-out conversations."""

    answers: dict[str, list[str]]
    sequences: list[list[int]]
    scores: list[list[TokenScores]]
    engine: dict[str, str]


def tasks_sha256(tasks: Tasks) -> str:
    """Changes whenever an item, or what is measured on it, changes."""
    listing: dict[str, Any] = {role: [item.model_dump() for item in tasks[role]] for role in sorted(tasks)}
    listing["settings"] = [SCORED_TOKENS, TOP]
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()


async def measure(client: EngineClient, tasks: Tasks, engine: dict[str, str], name: str) -> Measurement:
    """Answer every item greedily and score held-out conversations, with a progress bar."""
    conversations = _conversations(tasks)
    total = sum(len(items) for items in tasks.values()) + len(conversations)
    with tqdm(total=total, desc=f"evaluate {name}", unit="item", mininterval=1) as bar:

        async def answer(item: Item) -> str:
            text = await client.answer(item.messages, item.max_tokens)
            bar.update()
            return text

        answers = {}
        for role, items in tasks.items():
            answers[role] = list(await asyncio.gather(*(answer(item) for item in items)))
        sequences, scores, count = [], [], 0
        for messages in conversations:
            if count < SCORED_TOKENS:
                tokens = await client.tokenize(messages)
                sequences.append(tokens)
                scores.append(await client.score(tokens, TOP))
                count += len(tokens) - 1
            bar.update()
    engine = {**engine, "vllm": await client.version()}
    return Measurement(answers=answers, sequences=sequences, scores=scores, engine=engine)


def _conversations(tasks: Tasks) -> list[list[dict[str, str]]]:
    """Items with their right answers, taken from the roles in turn."""
    queues = [list(items) for items in tasks.values()]
    rounds = [queue[i] for i in range(max(map(len, queues), default=0)) for queue in queues if i < len(queue)]
    return [[*item.messages, {"role": "assistant", "content": item.expected}] for item in rounds[:200]]


def compare(reference: Measurement, variant: Measurement, tasks: Tasks) -> Evaluation:
    """Pair a variant's answers with the reference's, item by item and token by token."""
    roles = {}
    for role, items in tasks.items():
        before = [item.is_right(text) for item, text in zip(items, reference.answers[role], strict=True)]
        after = [item.is_right(text) for item, text in zip(items, variant.answers[role], strict=True)]
        to_wrong = sum(a and not b for a, b in zip(before, after, strict=True))
        to_right = sum(b and not a for a, b in zip(before, after, strict=True))
        roles[role] = RoleEvaluation(
            items=len(items),
            correct=sum(after),
            reference_correct=sum(before),
            flips_to_wrong=to_wrong,
            flips_to_right=to_right,
            same_answer=sum(
                a == b for a, b in zip(reference.answers[role], variant.answers[role], strict=True)
            ),
            mcnemar_p=mcnemar_p(to_wrong, to_right),
        )
    return Evaluation(
        roles=roles,
        text=compare_tokens(reference.sequences, reference.scores, variant.scores, TOP),
        tasks_sha256=tasks_sha256(tasks),
        engine=variant.engine,
    )


def save_measurement(measurement: Measurement, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(gzip.compress(measurement.model_dump_json().encode(), compresslevel=3))
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def load_measurement(path: Path) -> Measurement | None:
    """A saved measurement, or None if there is none that can be read."""
    try:
        return Measurement.model_validate_json(gzip.decompress(path.read_bytes()))
    except (FileNotFoundError, OSError, EOFError, ValueError):
        return None
