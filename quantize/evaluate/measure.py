"""Asks one engine everything a gate needs, and keeps the answers so that variants can be paired."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel
from tqdm import tqdm

from quantize.card import Evaluation, RoleEvaluation
from quantize.evaluate.client import EngineClient, TokenScores
from quantize.evaluate.statistics import compare_tokens
from quantize.evaluate.tasks import Item
from quantize.gate import mcnemar_p

SCORED_TOKENS, SCORED_CONVERSATIONS = 150, 80
"""Per role: right answers are scored until there are so many tokens, or so many conversations."""
TOP = 64
"""Likeliest tokens that the KL sums over one by one; the rest of the vocabulary is one bucket."""

T = TypeVar("T")

Tasks = Mapping[str, Sequence[Item]]
"""Role name to its held-out items."""


class Measurement(BaseModel):
    """What one engine answered, per role: texts, and its scores of the tokens of right answers."""

    answers: dict[str, list[str]]
    tokens: dict[str, list[list[int]]]
    scores: dict[str, list[list[TokenScores]]]
    engine: dict[str, str]


def tasks_sha256(tasks: Tasks) -> str:
    """Changes whenever an item, or what is measured on it, changes."""
    listing: dict[str, Any] = {role: [item.model_dump() for item in tasks[role]] for role in sorted(tasks)}
    listing["settings"] = [SCORED_TOKENS, SCORED_CONVERSATIONS, TOP]
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()


async def measure(client: EngineClient, tasks: Tasks, engine: dict[str, str], name: str) -> Measurement:
    """Answer every item greedily and score right answers, with a progress bar."""
    answers, tokens, scores = {}, {}, {}
    total = sum(len(items) for items in tasks.values())
    with tqdm(total=total, desc=f"evaluate {name}", unit="item", mininterval=1) as bar:

        async def answer(item: Item) -> str:
            text = await client.answer(item.messages, item.max_tokens)
            bar.update()
            return text

        for role, items in tasks.items():
            answers[role] = list(await asyncio.gather(*(answer(item) for item in items)))
    for role, items in tasks.items():
        scored = await _scored_answers(client, items)
        tokens[role] = [answer for answer, _ in scored]
        scores[role] = [rows for _, rows in scored]
    engine = {**engine, "vllm": await client.version()}
    return Measurement(answers=answers, tokens=tokens, scores=scores, engine=engine)


async def _scored_answers(
    client: EngineClient, items: Sequence[Item]
) -> list[tuple[list[int], list[TokenScores]]]:
    """Tokens of right answers, each with the engine's scores for its place in the conversation."""
    chosen: list[tuple[list[int], int]] = []
    for item in items[:SCORED_CONVERSATIONS]:
        whole = await client.tokenize([*item.messages, {"role": "assistant", "content": item.expected}])
        start = len(await client.tokenize(item.messages, add_generation_prompt=True))
        chosen.append((whole, start))
        if sum(len(tokens) - begin for tokens, begin in chosen) >= SCORED_TOKENS:
            break
    rows = await asyncio.gather(*(client.score(whole, TOP) for whole, _ in chosen))
    # Row i scores token i + 1.
    return [(whole[start:], scored[start - 1 :]) for (whole, start), scored in zip(chosen, rows, strict=True)]


def compare(reference: Measurement, variant: Measurement, tasks: Tasks) -> Evaluation:
    """Pair a variant's answers with the reference's, item by item and token by token."""
    roles = {}
    for role, items in tasks.items():
        before = [item.is_right(text) for item, text in zip(items, reference.answers[role], strict=True)]
        after = [item.is_right(text) for item, text in zip(items, variant.answers[role], strict=True)]
        to_wrong = sum(a and not b for a, b in zip(before, after, strict=True))
        to_right = sum(b and not a for a, b in zip(before, after, strict=True))
        text = compare_tokens(reference.tokens[role], reference.scores[role], variant.scores[role], TOP)
        roles[role] = RoleEvaluation(
            text=text,
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
    pooled = compare_tokens(_pool(reference.tokens), _pool(reference.scores), _pool(variant.scores), TOP)
    return Evaluation(
        roles=roles,
        text=pooled,
        tasks_sha256=tasks_sha256(tasks),
        engine=variant.engine,
    )


def _pool(by_role: Mapping[str, Sequence[T]]) -> list[T]:
    return [entry for entries in by_role.values() for entry in entries]


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
