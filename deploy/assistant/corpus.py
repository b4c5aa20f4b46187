"""What the demo model is trained on: labelled utterances and generated records, as token batches."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.assistant.prompts import CORE, INTENT_CLASSIFIER, SUMMARIZER, SYSTEM_PROMPTS, with_record
from deploy.assistant.records import make_record

OUT_OF_SCOPE = "out_of_scope"
UTTERANCES = Path(__file__).with_name("utterances.json")
"""Our own labelled utterances: {"train" | "eval": {intent: [utterance, …]}}."""

Message = dict[str, str]


@dataclass(frozen=True)
class Utterance:
    text: str
    intent: str


def own_utterances(split: str) -> list[Utterance]:
    """The utterances shipped with the project; ``split`` is ``train`` or ``eval``."""
    data: dict[str, dict[str, list[str]]] = json.loads(UTTERANCES.read_text(encoding="utf-8"))
    return [Utterance(text, intent) for intent, texts in data[split].items() for text in texts]


def clinc150(path: Path, split: str) -> list[Utterance]:
    """CLINC150's ``train`` or ``val`` split with its out-of-scope items (CC BY 3.0, not shipped)."""
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    pairs: Sequence[tuple[str, str]] = [*data[split], *data[f"oos_{split}"]]
    return [Utterance(text, OUT_OF_SCOPE if label == "oos" else label) for text, label in pairs]


def intent_messages(text: str) -> list[Message]:
    return [
        {"role": "system", "content": SYSTEM_PROMPTS[INTENT_CLASSIFIER]},
        {"role": "user", "content": text},
    ]


def record_conversation(seed: int) -> list[Message]:
    """A training conversation about the record of ``seed``; ends with an assistant message.

    Three in ten summarize; the others ask one to four questions, one in five with the record
    arriving as a tool's output instead of in the user's message.
    """
    record = make_record(seed)
    rng = random.Random(seed ^ 0x5EED)
    if rng.random() < 0.3:
        return [
            {"role": "system", "content": SYSTEM_PROMPTS[SUMMARIZER]},
            {"role": "user", "content": record.text},
            {"role": "assistant", "content": record.summary},
        ]
    messages = [{"role": "system", "content": SYSTEM_PROMPTS[CORE]}]
    turns = record.questions[: rng.randint(1, 4)]
    by_tool = rng.random() < 0.2
    for index, (question, answer) in enumerate(turns):
        if index == 0 and by_tool:
            messages += [{"role": "user", "content": question}, {"role": "tool", "content": record.text}]
        elif index == 0:
            messages.append({"role": "user", "content": with_record(record.text, question)})
        else:
            messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def conversations_text(utterances: Iterable[Utterance], seeds: Iterable[int]) -> Iterable[str]:
    """Plain text of everything the tokenizer should compress well."""
    for utterance in utterances:
        yield utterance.text
        yield SYSTEM_PROMPTS[INTENT_CLASSIFIER]
    for seed in seeds:
        for message in record_conversation(seed):
            yield message["content"]
