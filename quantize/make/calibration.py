"""Calibration data: conversations, encoded as the model will see them. Those of a file, or those that ship
with the product; where they end with a question, with the reference's own answers, once it has given them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.card import Calibration
from quantize.core.checkpoint import Checkpoint
from quantize.core.files import sha256_of
from quantize.core.jsonl import read_json, read_lines
from quantize.core.tokenizer import encode_messages, load_tokenizer

__all__ = [
    "CalibrationError",
    "CalibrationSet",
    "calibration_of",
    "load_tokenizer",
    "read_calibration",
    "read_questions",
]

MIN_CALIBRATION_SAMPLES = 16
MORE = "give more in models.NAME.calibration, or by conversations.count where that is set"
"""What to do where there are too few."""
TEMPLATE_MARK = re.compile(
    r"<\|\w+\|>|\[/?INST\]|<(?:start|end)_of_turn>|^#+ ?(?:Instruction|Response|Human|Assistant):",
    re.MULTILINE,
)
"""What chat templates put between messages; within most messages it shows that one was applied already."""
CALIBRATION_LENGTH = 512
"""Longest calibration sequence, tokens; longer ones are cut, and those that the model does not take."""


class CalibrationError(ValueError):
    """Calibration data cannot be used. The text names the file, the line and the fix."""


@dataclass(frozen=True)
class CalibrationSet:
    """Token sequences for calibration, and where they came from."""

    sequences: list[list[int]]
    description: Calibration


def read_calibration(
    path: Path, checkpoint: Checkpoint, answers: Mapping[int, str] | None = None
) -> CalibrationSet:
    """Read conversations from JSON Lines ({"messages": [...]}) and encode them with the chat template.

    ``answers`` are the reference's to :func:`read_questions`, by line. Raises CalibrationError when the file
    is missing, malformed or holds too few conversations, or empty ones.
    """
    tokenizer, longest = load_tokenizer(checkpoint.path), calibration_length(checkpoint)
    sequences, marks = [], list[str]()
    for number, messages in _conversations(path):
        if answers and number in answers:
            messages = [*messages, {"role": "assistant", "content": answers[number]}]
        try:
            encoded = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
        except Exception as error:  # whatever a template raises, the line is at fault
            raise _no_conversation(path, number, error) from None
        sequences.append(list(encoded["input_ids"])[:longest])
        found = (TEMPLATE_MARK.search(str(message.get("content"))) for message in messages)
        marks += [mark[0] for mark in found if mark is not None][:1]
    _refuse_few(len(sequences), str(path))
    if len(marks) > len(sequences) / 2:
        raise CalibrationError(
            f"{path}: {len(marks)} of {len(sequences)} conversations hold a chat template's marks as text, "
            f"such as {marks[0]!r}; give roles and "
            "contents alone, the model's own template is put around them here"
        )
    if answers:
        return _described(sequences, f"{path.name}, questions answered by the reference", _digest(sequences))
    return _described(sequences, path.name, sha256_of(path))


def read_questions(path: Path) -> dict[int, tuple[dict[str, str], ...]]:
    """Conversations of the same file that end with a user's message and are nothing but texts, by line: what
    a reference can answer. Raises CalibrationError for what is no conversation."""
    found = {}
    for number, messages in _conversations(path):
        is_plain = all(
            isinstance(one, dict) and all(isinstance(value, str) for value in one.values())
            for one in messages
        )
        if is_plain and messages and messages[-1].get("role") == "user":
            found[number] = tuple(messages)
    return found


def _conversations(path: Path) -> Iterator[tuple[int, list[Any]]]:
    try:
        lines = read_lines(path)
    except FileNotFoundError:
        raise CalibrationError(
            f"calibration file {path} does not exist; set calibration in the YAML"
        ) from None
    for number, line in lines:
        try:
            messages = list(read_json(line)["messages"])
        except Exception as error:
            raise _no_conversation(path, number, error) from None
        yield number, messages


def _no_conversation(path: Path, number: int, error: Exception) -> CalibrationError:
    return CalibrationError(
        f"{path}:{number}: not a conversation ({type(error).__name__}: {error}); "
        'each line must be {"messages": [{"role": …, "content": …}, …]}'
    )


def calibration_of(
    conversations: Sequence[Sequence[dict[str, str]]], source: str, checkpoint: Checkpoint
) -> CalibrationSet:
    """The same of conversations that are at hand; ``source`` is what the card calls them.

    Raises CalibrationError where they are too few or empty, and CheckpointError where the chat template
    refuses one.
    """
    tokenizer, longest = load_tokenizer(checkpoint.path), calibration_length(checkpoint)
    _refuse_few(len(conversations), source)
    sequences = [
        encode_messages(tokenizer, messages, checkpoint.path)[:longest] for messages in conversations
    ]
    return _described(sequences, source, _digest(sequences))


def calibration_length(checkpoint: Checkpoint) -> int:
    """Tokens at which a model's calibration sequences are cut: an engine refuses prompts of its whole length,
    which leave no room for an answer."""
    return min(CALIBRATION_LENGTH, checkpoint.max_model_len - 1)


def _refuse_few(count: int, source: str) -> None:
    if count < MIN_CALIBRATION_SAMPLES:
        raise CalibrationError(
            f"{source} has {count} conversations; calibration needs {MIN_CALIBRATION_SAMPLES} or more: {MORE}"
        )


def _digest(sequences: list[list[int]]) -> str:
    return hashlib.sha256(json.dumps(sequences).encode()).hexdigest()


def _described(sequences: list[list[int]], source: str, sha256: str) -> CalibrationSet:
    if not all(sequences):
        empty = sequences.index([]) + 1
        raise CalibrationError(f"{source}: the chat template makes conversation {empty} empty; take it out")
    if max(map(len, sequences)) < 2:
        raise CalibrationError(
            f"{source}: no conversation has more than one token, of which nothing can be learned; give whole "
            "conversations, with a chat template that writes them out"
        )
    tokens = sum(len(sequence) for sequence in sequences)
    return CalibrationSet(
        sequences, Calibration(source=source, sha256=sha256, samples=len(sequences), tokens=tokens)
    )
