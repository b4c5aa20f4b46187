"""Writes the demo model's calibration set, the roles' held-out items and the demo's messages.

Everything comes from our own utterances and generated records: calibration from training material,
the rest from held-out utterances and seeds. ``python -m deploy.assistant.data`` writes the files
that are kept in the repository; the same code always writes the same bytes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deploy.assistant.corpus import intent_messages, own_utterances, record_conversation
from deploy.assistant.prompts import CORE, INTENT_CLASSIFIER, SUMMARIZER, SYSTEM_PROMPTS, with_record
from deploy.assistant.records import HELD_OUT_SEED, NOT_STATED, make_record
from deploy.team.tickets import CONTACT, DETAILS

DATA = Path(__file__).with_name("data")
CALIBRATION_PER_JOB = 80
INTENTS_PER_LABEL = 3
RECORD_ITEMS = 160
LONG_CONTEXT_ITEMS = 40
LONG_CONTEXT_RECORDS = 20
"""Records of a long context; with them it has about 890 of the model's 1,024 tokens."""
MESSAGES = 200
_MESSAGE_SEED = HELD_OUT_SEED + 1_000_000

Row = dict[str, Any]


def calibration() -> list[Row]:
    utterances = own_utterances("train")
    random.Random(1).shuffle(utterances)
    intents = [
        [*intent_messages(u.text), {"role": "assistant", "content": u.intent}]
        for u in utterances[:CALIBRATION_PER_JOB]
    ]
    records = [record_conversation(20_000_000 + i) for i in range(CALIBRATION_PER_JOB)]
    return [{"messages": messages} for messages in [*intents, *records]]


def intent_items() -> list[Row]:
    taken: dict[str, int] = {}
    rows = []
    for utterance in own_utterances("eval"):
        taken[utterance.intent] = taken.get(utterance.intent, 0) + 1
        if taken[utterance.intent] <= INTENTS_PER_LABEL:
            rows.append(
                {
                    "messages": intent_messages(utterance.text),
                    "expected": utterance.intent,
                    "check": "exact",
                    "max_tokens": 8,
                }
            )
    return rows


def summary_items() -> list[Row]:
    rows = []
    for seed in range(HELD_OUT_SEED + 100_000, HELD_OUT_SEED + 100_000 + RECORD_ITEMS):
        record = make_record(seed)
        messages = [
            {"role": "system", "content": SYSTEM_PROMPTS[SUMMARIZER]},
            {"role": "user", "content": record.text},
        ]
        row = {"messages": messages, "expected": record.summary, "check": "contains"}
        rows.append({**row, "facts": record.facts, "max_tokens": 96, "grounds": [record.text]})
    return rows


def answer_items() -> list[Row]:
    rows = []
    for seed in range(HELD_OUT_SEED + 200_000, HELD_OUT_SEED + 200_000 + RECORD_ITEMS):
        record = make_record(seed)
        question, answer = record.questions[0]
        messages = [
            {"role": "system", "content": SYSTEM_PROMPTS[CORE]},
            {"role": "user", "content": with_record(record.text, question)},
        ]
        # Where the record does not say, nothing of it answers the question.
        grounds = [record.text.partition("\n")[0] if answer == NOT_STATED else record.text]
        row = {"messages": messages, "expected": answer, "check": "exact", "max_tokens": 48}
        rows.append({**row, "grounds": grounds})
    return rows


def long_context_items() -> list[Row]:
    """A question about one record among many, which the question names by its identifier.

    The place of the record goes from the first to the last, item by item.
    """
    rows: list[Row] = []
    seed = HELD_OUT_SEED + 300_000
    while len(rows) < LONG_CONTEXT_ITEMS:
        records = [make_record(seed + i) for i in range(LONG_CONTEXT_RECORDS)]
        seed += LONG_CONTEXT_RECORDS
        place = len(rows) % LONG_CONTEXT_RECORDS
        record = records[place]
        identifier = record.text.partition("\n")[0].split()[1]
        named = [pair for pair in record.questions if identifier in pair[0] and pair[1] != NOT_STATED]
        if not named:
            continue
        question, answer = named[0]
        text = "\n\n".join(one.text for one in records)
        messages = [
            {"role": "system", "content": SYSTEM_PROMPTS[CORE]},
            {"role": "user", "content": with_record(text, question)},
        ]
        rows.append({"messages": messages, "expected": answer, "check": "exact", "max_tokens": 48})
    return rows


def customer_messages() -> list[Row]:
    """What the demo's customers send: words with an intent, and a question about their record.

    The utterances are those of the held-out split that the gate's items leave out.
    """
    per_intent: dict[str, list[str]] = {}
    for utterance in own_utterances("eval"):
        per_intent.setdefault(utterance.intent, []).append(utterance.text)
    spare = [(t, intent) for intent, texts in per_intent.items() for t in texts[INTENTS_PER_LABEL:]]
    random.Random(2).shuffle(spare)
    rows = []
    for number, (text, intent) in enumerate(spare[:MESSAGES]):
        record = make_record(_MESSAGE_SEED + number)
        question, answer = record.questions[0]
        rows.append(
            {
                "id": f"message-{number:03d}",
                "message": text,
                "intent": intent,
                "record": record.text,
                "question": question,
                "answer": answer,
                "summary": record.summary,
                "facts": record.facts,
                "specialists": {
                    CONTACT: dict(zip(("question", "answer"), record.contact, strict=True)),
                    DETAILS: dict(zip(("question", "answer"), record.details, strict=True)),
                },
            }
        )
    return rows


def write(name: str, rows: Iterable[Row]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (DATA / name).write_text(text, encoding="utf-8")


def main() -> None:
    DATA.mkdir(exist_ok=True)
    write("calibration.jsonl", calibration())
    write(f"{INTENT_CLASSIFIER}.jsonl", intent_items())
    write(f"{SUMMARIZER}.jsonl", summary_items())
    write(f"{CORE}.jsonl", answer_items())
    write("long_context.jsonl", long_context_items())
    write("messages.jsonl", customer_messages())


if __name__ == "__main__":
    main()
