"""What plans are calibrated on, chosen on, and reported on: three disjoint sets of conversations.

| set         | CLINC150                   | generated records | WikiText-2  |
|-------------|----------------------------|-------------------|-------------|
| calibration | training utterances        | seeds from 40 M   | none        |
| chosen      | one half of validation     | seeds from 41 M   | first half  |
| reported    | other half of validation   | seeds from 42 M   | second half |

CLINC150's file here has no test split; the validation split was never trained on. Record seeds are such
as no training run reaches. No conversation is in two sets, though a record's question may be worded alike.
WikiText-2 is off the models' domain; it shows what a plan loses on text that calibration never saw, and is
left out unless asked for. Everything is decided by fixed seeds.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.assistant.corpus import Utterance, clinc150, intent_messages, record_conversation
from quantize.card import Calibration
from quantize.core.files import sha256_of
from quantize.evaluate.bench import Span
from quantize.make.calibration import CalibrationSet, load_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"
CALIBRATION_SEEDS, CHOSEN_SEEDS, REPORTED_SEEDS = 40_000_000, 41_000_000, 42_000_000
PARAGRAPH_WORDS = (20, 120)
"""Shortest paragraph of WikiText-2 that is taken, and where longer ones are cut, in words."""

Conversation = list[dict[str, str]]


@dataclass(frozen=True)
class Sources:
    """Where the data files lie."""

    clinc150: Path = SHARED / "clinc150.json"
    wikitext2: Path = SHARED / "wikitext2_valid.txt"


def present(path: Path, what: str) -> Path:
    """``path``; ends the program with a sentence where there is no such file."""
    if not path.is_file():
        sys.exit(f"benchmark data {path} is missing: place {what} there")
    return path


def clinc_path(sources: Sources | None = None) -> Path:
    path = (sources or Sources()).clinc150
    return present(path, "CLINC150 (data_full.json of clinc/oos-eval, with train, val, oos_train, oos_val)")


def _some(pool: Sequence[Any], count: int, name: str) -> list[Any]:
    if not 0 <= count <= len(pool):
        raise ValueError(f"{name}={count}: give a number from 0 to {len(pool)}, which is what the set has")
    return list(pool[:count])


def _mixed(
    split: str, half: int, utterances: int, records: int, first_seed: int, sources: Sources | None = None
) -> list[Conversation]:
    """``half`` 0 or 1 of a split's utterances, shuffled by a fixed seed, then records."""
    everything: Sequence[Utterance] = clinc150(clinc_path(sources), split)
    shuffled = random.Random(0).sample(everything, len(everything))
    picked = _some(shuffled[half::2], utterances, "utterances")
    if not 0 <= records <= CHOSEN_SEEDS - CALIBRATION_SEEDS:
        raise ValueError(f"records={records}: give a number from 0 to {CHOSEN_SEEDS - CALIBRATION_SEEDS}")
    intents = [
        [*intent_messages(one.text)[:2], {"role": "assistant", "content": one.intent}] for one in picked
    ]
    return intents + [record_conversation(first_seed + number) for number in range(records)]


def paragraphs(half: int, count: int, sources: Sources | None = None) -> list[Conversation]:
    """``count`` paragraphs of the first (0) or second (1) half of WikiText-2, each as a user's message.

    The halves are contiguous, so at most the article at the cut is in both. Headings are left out.
    """
    if count == 0:
        return []
    path = present((sources or Sources()).wikitext2, "WikiText-2's validation text (wiki.valid.tokens)")
    low, high = PARAGRAPH_WORDS
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    texts = [words[:high] for words in lines if len(words) >= low and words[0] != "="]
    middle = len(texts) // 2
    own = texts[:middle] if half == 0 else texts[middle:]
    picked = _some(random.Random(0).sample(own, len(own)), count, "wikitext")
    return [[{"role": "user", "content": " ".join(words)}] for words in picked]


def encode(model: Path, conversations: Sequence[Conversation]) -> list[list[int]]:
    """Token ids by the chat template of the checkpoint directory ``model``."""
    tokenizer: Any = load_tokenizer(model)
    return [
        list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])
        for messages in conversations
    ]


def calibration_conversations(
    utterances: int = 192, records: int = 64, sources: Sources | None = None
) -> list[Conversation]:
    return _mixed("train", 0, utterances, records, CALIBRATION_SEEDS, sources)


def calibration(
    model: Path, utterances: int = 192, records: int = 64, sources: Sources | None = None
) -> CalibrationSet:
    """256 conversations from training data unless said otherwise."""
    sequences = encode(model, calibration_conversations(utterances, records, sources))
    tokens = sum(len(sequence) for sequence in sequences)
    described = Calibration(
        source="clinc150 train, records",
        sha256=sha256_of(clinc_path(sources))[:32] + f"{utterances:016x}{records:016x}",
        samples=len(sequences),
        tokens=tokens,
    )
    return CalibrationSet(sequences, described)


def planting_conversations(sources: Sources | None = None) -> list[Conversation]:
    """64 of those on which plans are chosen, to see what planted outliers do."""
    return _mixed("val", 0, 44, 20, CHOSEN_SEEDS, sources)


def _spans(model: Path, conversations: Sequence[Conversation]) -> list[Span]:
    return [(sequence, 1) for sequence in encode(model, conversations)]


def chosen(
    model: Path, utterances: int = 100, records: int = 30, wikitext: int = 0, sources: Sources | None = None
) -> list[Span]:
    """Conversations on which plans are chosen: every token but the first is scored.

    Raises ValueError when the set has fewer than asked for (1,550 utterances of CLINC150).
    """
    conversations = _mixed("val", 0, utterances, records, CHOSEN_SEEDS, sources)
    return _spans(model, conversations + paragraphs(0, wikitext, sources))


def reported(
    model: Path, utterances: int = 400, records: int = 80, wikitext: int = 0, sources: Sources | None = None
) -> list[Span]:
    """Conversations on which plans are reported; all of the other half is ``utterances=1500`` and more.

    Raises ValueError as :func:`chosen` does.
    """
    conversations = _mixed("val", 1, utterances, records, REPORTED_SEEDS, sources)
    return _spans(model, conversations + paragraphs(1, wikitext, sources))
