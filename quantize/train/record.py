"""The record of a training run, ``record.json``: on what, how, what it did, and what it took."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from quantize.card import Paired
from quantize.core.engine_figures import Strict
from quantize.core.files import write_whole
from quantize.core.refusals import first_fault
from quantize.gate.paired import mcnemar_p
from quantize.train.loop import TrainError

RECORD = "record.json"


class DataUsed(Strict):
    """A set of examples, as they were encoded."""

    source: str
    sha256: str
    examples: int
    tokens: int
    labels: int = Field(description="tokens that are learned, or scored")
    cut: int = Field(default=0, description="examples that lost their end to the greatest length")


class HeldOut(Strict):
    """What held-out examples say of the model before training and after it."""

    loss_before: float = Field(description="nats per token of the answers")
    loss_after: float
    right: Paired = Field(description="right answers after training, against before")
    answers_before: str = Field(description="1 for a right answer, 0 for a wrong one, in the items' order")
    answers_after: str


class MemoryUsed(Strict):
    """Bytes beside the program itself, which takes ``program``."""

    predicted: int
    measured: int | None
    program: int
    device: str
    parts: dict[str, int] = Field(description="of the prediction")
    checkpointing: bool


class Record(Strict):
    """All of it."""

    format: Literal[1] = 1
    method: Literal["lora", "qlora", "full"]
    base: str = Field(description="name of the checkpoint's directory")
    run: dict[str, str] = Field(description="what the result depends on, as digests")
    data: DataUsed
    held_out_data: DataUsed
    settings: dict[str, Any]
    lora: dict[str, Any] | None = None
    teaching: dict[str, Any] | None = Field(
        default=None, description="who taught it, and what of that counts"
    )
    curve: list[tuple[int, float, float, float]] = Field(
        description="step, loss, length of the gradient, rate"
    )
    evaluations: list[tuple[int, float, float]] = Field(
        description="step, held-out loss, share of right answers"
    )
    held_out: HeldOut
    seconds: float
    memory: MemoryUsed
    versions: dict[str, str]
    created: str


def paired(after: Sequence[bool], before: Sequence[bool]) -> Paired:
    """Right answers to the same items, after against before."""
    to_bad = sum(was and not now for now, was in zip(after, before, strict=True))
    to_good = sum(now and not was for now, was in zip(after, before, strict=True))
    return Paired(
        items=len(after),
        good=sum(after),
        reference_good=sum(before),
        flips_to_bad=to_bad,
        flips_to_good=to_good,
        mcnemar_p=mcnemar_p(to_bad, to_good),
    )


def write_record(record: Record, directory: Path) -> None:
    write_whole(directory / RECORD, record.model_dump_json(indent=1) + "\n")


def read_record(directory: Path) -> Record:
    """Raises TrainError where there is none, or it cannot be read."""
    path = directory / RECORD
    try:
        return Record.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TrainError(f"{directory} has no {RECORD}: nothing was trained there to its end") from None
    except ValidationError as error:
        raise TrainError(f"{path}: {first_fault(error)}; train again into another directory") from None
