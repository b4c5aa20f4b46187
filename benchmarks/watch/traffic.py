"""Requests as the demo team sends them, with their right answers: utterances of CLINC150 and made-up
records."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from benchmarks.quantization.data import clinc_path
from deploy.assistant.corpus import clinc150
from deploy.assistant.prompts import CORE, INTENT_CLASSIFIER, SUMMARIZER, SYSTEM_PROMPTS, with_record
from deploy.assistant.records import make_record

SEEDS = 43_000_000
"""Records that no training run, calibration or gate has seen."""
MAX_TOKENS = {INTENT_CLASSIFIER: 8, SUMMARIZER: 64, CORE: 64}


@dataclass(frozen=True)
class Question:
    """A request of one role. ``right`` says whether a text is a right answer."""

    role: str
    user: str
    right: Callable[[str], bool]

    @property
    def messages(self) -> list[dict[str, str]]:
        return [
            {"role": "system", "content": SYSTEM_PROMPTS[self.role]},
            {"role": "user", "content": self.user},
        ]


@dataclass(frozen=True)
class Answered:
    """How it was answered: by which variant, why there (of an error: its status), in how many seconds, at
    what time of the run."""

    role: str
    variant: str
    reason: str
    right: bool
    seconds: float
    at: float


def questions(roles: Sequence[str], count: int, first: int = 0) -> list[Question]:
    """``count`` questions, the roles in turn; another ``first`` gives others."""
    utterances = clinc150(clinc_path(), "val")
    order = random.Random(1).sample(range(len(utterances)), len(utterances))
    made = []
    for number in range(first, first + count):
        role = roles[number % len(roles)]
        if role == INTENT_CLASSIFIER:
            one = utterances[order[number % len(order)]]
            made.append(Question(role, one.text, lambda text, intent=one.intent: text.strip() == intent))
            continue
        record = make_record(SEEDS + number)
        if role == SUMMARIZER:
            facts = record.facts
            made.append(
                Question(role, record.text, lambda text, facts=facts: all(fact in text for fact in facts))
            )
        else:
            question, answer = record.questions[number % len(record.questions)]
            user = with_record(record.text, question)
            made.append(Question(role, user, lambda text, answer=answer: text.strip() == answer.strip()))
    return made


async def send(
    session: aiohttp.ClientSession,
    url: str,
    asked: Sequence[Question],
    concurrency: int = 8,
    temperature: float = 0.0,
    stop: Callable[[], bool] = lambda: False,
) -> AsyncIterator[Answered]:
    """Ask them all, so many at a time, until ``stop()``; answers in the order in which they end."""
    began = time.monotonic()
    left = iter(asked)
    done: asyncio.Queue[Answered | None] = asyncio.Queue()

    async def work() -> None:
        for question in left:
            if stop():
                break
            body: dict[str, Any] = {
                "model": "assistant",
                "messages": question.messages,
                "max_tokens": MAX_TOKENS[question.role],
                "temperature": temperature,
            }
            sent = time.monotonic()
            headers = {"x-agent-role": question.role}
            async with session.post(url + "/v1/chat/completions", json=body, headers=headers) as response:
                reply = await response.json()
                now = time.monotonic()
                good = response.status == 200
                text = reply["choices"][0]["message"]["content"] or "" if good else ""
                await done.put(
                    Answered(
                        question.role,
                        response.headers.get("x-tiercel-variant", ""),
                        response.headers["x-tiercel-route-reason"] if good else str(response.status),
                        question.right(text),
                        now - sent,
                        now - began,
                    )
                )
        await done.put(None)

    tasks = [asyncio.create_task(work()) for _ in range(concurrency)]
    try:
        ended = 0
        while ended < concurrency:
            answered = await done.get()
            if answered is None:
                ended += 1
            else:
                yield answered
            for task in tasks:
                if task.done() and task.exception():
                    raise task.exception() or RuntimeError
    finally:
        for task in tasks:
            task.cancel()
