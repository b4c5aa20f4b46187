"""Calibration data: conversations, encoded as the model will see them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from quantize.card import Calibration
from quantize.core.checkpoint import Checkpoint
from quantize.core.files import sha256_of
from quantize.core.jsonl import read_lines
from quantize.core.tokenizer import load_tokenizer

__all__ = ["CalibrationError", "CalibrationSet", "load_tokenizer", "read_calibration"]

MIN_CALIBRATION_SAMPLES = 16
TEMPLATE_MARK = re.compile(
    r"<\|\w+\|>|\[/?INST\]|<(?:start|end)_of_turn>|^#+ ?(?:Instruction|Response|Human|Assistant):",
    re.MULTILINE,
)
"""What chat templates put between messages; within most messages it shows that one was applied already."""
CALIBRATION_LENGTH = 512
"""Longest calibration sequence, tokens; longer ones are cut."""


class CalibrationError(ValueError):
    """Calibration data cannot be used. The text names the file, the line and the fix."""


@dataclass(frozen=True)
class CalibrationSet:
    """Token sequences for calibration, and where they came from."""

    sequences: list[list[int]]
    description: Calibration


def read_calibration(path: Path | None, checkpoint: Checkpoint) -> CalibrationSet:
    """Read conversations from JSON Lines ({"messages": [...]}) and encode them with the chat template.

    Raises CalibrationError when the file is missing, malformed or holds too few conversations.
    """
    if path is None:
        raise CalibrationError("calibration is not set; give a JSON Lines file of conversations in the YAML")
    try:
        lines = read_lines(path)
    except FileNotFoundError:
        raise CalibrationError(
            f"calibration file {path} does not exist; set calibration in the YAML"
        ) from None
    tokenizer = load_tokenizer(checkpoint.path)
    sequences, marks = [], list[str]()
    for number, line in lines:
        try:
            messages = json.loads(line)["messages"]
            encoded = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
        except Exception as error:  # whatever a template raises, the line is at fault
            raise CalibrationError(
                f"{path}:{number}: not a conversation ({type(error).__name__}: {error}); "
                'each line must be {"messages": [{"role": …, "content": …}, …]}'
            ) from None
        sequences.append(list(encoded["input_ids"])[:CALIBRATION_LENGTH])
        found = (TEMPLATE_MARK.search(str(message.get("content"))) for message in messages)
        marks += [mark[0] for mark in found if mark is not None][:1]
    if len(sequences) < MIN_CALIBRATION_SAMPLES:
        raise CalibrationError(
            f"{path} has {len(sequences)} conversations; calibration needs {MIN_CALIBRATION_SAMPLES} or more"
        )
    if len(marks) > len(sequences) / 2:
        raise CalibrationError(
            f"{path}: {len(marks)} of {len(sequences)} conversations hold a chat template's marks as text, "
            f"such as {marks[0]!r}; give roles and "
            "contents alone, the model's own template is put around them here"
        )
    described = Calibration(
        source=path.name,
        sha256=sha256_of(path),
        samples=len(sequences),
        tokens=sum(len(sequence) for sequence in sequences),
    )
    return CalibrationSet(sequences, described)
