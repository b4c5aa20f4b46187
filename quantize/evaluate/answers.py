"""The reference's own answers to conversations: what stands in for labels where nobody has any.

Every answer is greedy, and kept with the tokens that the engine wrote, so that scores are of exactly those.
Answers belong to a version of the reference, to the conversations and what was asked of them, and to the
engine; a killed run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from quantize.core.checkpoint import CheckpointError
from quantize.evaluate.client import EngineClient
from quantize.evaluate.conversations import Conversation, without_system
from quantize.evaluate.journal import Entry, Journal, run_jobs
from quantize.evaluate.tasks import BEGINNING, Item

Messages = Sequence[dict[str, str]]
Encode = Callable[[Messages], Sequence[int]]
"""Token ids of a conversation; raises CheckpointError where the chat template refuses it."""


STRUCTURED = 3
"""How many times longer an answer may be that is to match a schema."""


@dataclass(frozen=True)
class Asking:
    """How conversations are asked."""

    max_tokens: int
    template: Mapping[str, Any] = field(default_factory=dict)
    """For the chat template."""

    def most(self, one: Conversation) -> int:
        """Tokens of an answer: JSON that is cut off shows nothing."""
        return self.max_tokens * (STRUCTURED if one.json_schema else 1)


@dataclass(frozen=True)
class Answer:
    """What the reference wrote."""

    text: str
    tokens: tuple[int, ...]
    """As the engine wrote them, the one that ended the answer included; empty where it does not tell."""
    whole: bool
    """It ended by itself, not at the limit."""


def answers_path(
    directory: Path, version: str, asking: Asking, all_of: Sequence[Conversation], engine: Mapping[str, str]
) -> Path:
    """Where the answers of a reference's version lie, below the model's variants."""
    listing = {
        "conversations": [one.model_dump(exclude_none=True) for one in all_of],
        "asking": [asking.max_tokens, STRUCTURED, dict(asking.template)],
        "engine": dict(engine),
    }
    digest = hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()
    return directory / ".answers" / f"{version}-{digest[:12]}.json.gz"


def read_answers(journal: Journal) -> dict[str, Answer]:
    """Answers that are there, by the conversation's id."""
    return {
        str(entry["id"]): Answer(str(entry["answer"]), tuple(entry["tokens"]), bool(entry["whole"]))
        for entry in journal.read()
    }


async def answer_all(
    client: EngineClient, conversations: Sequence[Conversation], asking: Asking, journal: Journal
) -> dict[str, Answer]:
    """Have the reference's engine answer what it has not answered yet, with a progress bar."""
    known = read_answers(journal)
    missing = [one for one in conversations if one.id not in known]

    def job(one: Conversation) -> Callable[[], Any]:
        async def ask() -> Entry:
            text, tokens, whole = await client.written(one.messages, asking.most(one), asking.template)
            return {"id": one.id, "answer": text, "tokens": tokens, "whole": whole}

        return ask

    if missing:
        with tqdm(
            total=len(missing), desc="the reference answers", unit="conversation", mininterval=1
        ) as bar:
            await run_jobs([job(one) for one in missing], journal, bar.update)
        known = read_answers(journal)
    return known


def fitting(
    conversations: Iterable[Conversation],
    encode: Encode,
    context: int,
    asking: Asking,
    *,
    as_they_are: bool = False,
) -> list[Conversation]:
    """Those whose prompt and answer are at most ``context`` tokens, as the model's chat template takes them:
    without a system message where it knows none, unless they are to stay ``as_they_are``. What it refuses
    even so is left out."""
    found = []
    for one in conversations:
        others = () if as_they_are else (_frozen(without_system(one.messages)),)
        for messages in dict.fromkeys((_frozen(one.messages), *others)):
            given = tuple(dict(message) for message in messages)
            try:
                length = len(encode(given))
            except CheckpointError:
                continue
            if length + asking.most(one) <= context:
                found.append(one.model_copy(update={"messages": given}))
            break
    return found


def _enough(answer: Answer, most: int) -> int:
    """Tokens with which another answer shows whether it begins alike, with some to spare."""
    share = min(1.0, BEGINNING / max(1, len(answer.text)))
    return min(most, math.ceil(share * len(answer.tokens)) + 8) if answer.tokens else most


def _frozen(messages: Messages) -> tuple[tuple[tuple[str, str], ...], ...]:
    return tuple(tuple(message.items()) for message in messages)


def items_of(
    conversations: Sequence[Conversation], answers: Mapping[str, Answer], asking: Asking
) -> list[Item]:
    """Items whose right answer is the reference's own; conversations without an answer are left out."""
    return [
        Item(
            messages=one.messages,
            expected=answer.text,
            expected_tokens=answer.tokens,
            check="reference",
            max_tokens=asking.most(one) if one.json_schema else _enough(answer, asking.max_tokens),
            chat_template_kwargs=dict(asking.template) or None,
            json_schema=one.json_schema,
        )
        for one in conversations
        if (answer := answers.get(one.id)) is not None and (answer.tokens or answer.text)
    ]
