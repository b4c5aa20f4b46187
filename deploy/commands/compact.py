"""``tiercel quantize compact``: a smaller or sparser model from a checkpoint, step by step."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.commands import add_json, print_json, say
from quantize.core.checkpoint import Checkpoint, open_checkpoint
from quantize.core.jsonl import read_lines
from quantize.core.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from quantize.compact.compare import Compared
    from quantize.compact.make import Taken
    from quantize.compact.steps import Step

PROMPTS = 96
"""Conversations of the product that calibrate, where no file does."""
HELD_OUT = 4
"""One in so many of them is kept for the comparison."""
KINDS = (
    "magnitude:0.5, wanda:0.5 or wanda:2:4 (masks), neurons:0.25, heads:1, layers:2 (smaller matrices), "
    "svd:0.5 (low rank), outliers:0.01:int3-g32-asym-importance (sparse beside quantized)"
)


def add_compact(commands: Any) -> None:
    text = "make a smaller or sparser model of a checkpoint, to be quantized and judged like any other"
    compacting = commands.add_parser("compact", help=text, description=text)
    compacting.add_argument("model", type=Path, help="a checkpoint directory")
    compacting.add_argument("out", type=Path, help="the directory of the new model")
    compacting.add_argument("steps", nargs="+", help=f"one after another, of {KINDS}")
    compacting.add_argument(
        "--calibration", type=Path, help="JSON Lines of conversations (default: prompts of Tiercel's)"
    )
    add_json(compacting)
    compacting.set_defaults(run=compact)


def compact(options: argparse.Namespace) -> None:
    from quantize.compact.compare import compare
    from quantize.compact.steps import parse_step

    steps = [parse_step(text) for text in options.steps]
    from quantize.check import refuse_unfit
    from quantize.compact.make import refuse
    from quantize.core.modules import read_modules

    checkpoint = open_checkpoint(options.model)
    refuse_unfit(checkpoint)
    modules = read_modules(checkpoint)
    for step in steps:
        refuse(checkpoint, modules, step, options.out)
    sequences = _sequences(checkpoint, options.calibration)
    spans = _spans(checkpoint, sequences[::HELD_OUT], options.calibration)
    calibrating = [one for number, one in enumerate(sequences) if number % HELD_OUT]
    done = _taken(checkpoint, steps, calibrating, options.out)
    compared = compare(checkpoint, open_checkpoint(options.out), spans)
    if options.json:
        print_json({"steps": [one.model_dump() for one in done], "compared": compared.model_dump()})
    else:
        print(format_taken(done, compared))
    say(
        f"{options.out} is a model: put it under models in the YAML file, beside the one that it was made "
        "of, and name both in a role's models; `tiercel quantize` makes its variants, the gate judges them "
        "by their own answers"
    )


def _sequences(checkpoint: Checkpoint, calibration: Path | None) -> Sequence[Sequence[int]]:
    from deploy.unlabelled import prompts_for
    from quantize.make.calibration import read_calibration

    found = read_calibration(calibration, checkpoint) if calibration else prompts_for(checkpoint, PROMPTS)
    return found.sequences


def _spans(
    checkpoint: Checkpoint, sequences: Sequence[Sequence[int]], calibration: Path | None
) -> list[tuple[Sequence[int], int]]:
    """Held-out conversations, and where what is compared begins: at the answers where there are any."""
    starts = [1] * len(sequences)
    if calibration is not None:
        tokenizer = load_tokenizer(checkpoint.path)
        held_out = [json.loads(line)["messages"] for _, line in read_lines(calibration)[::HELD_OUT]]
        for number, (messages, sequence) in enumerate(zip(held_out, sequences, strict=True)):
            prompt = encode_prompt(tokenizer, messages[:-1]) if messages[-1]["role"] == "assistant" else []
            if prompt and list(sequence[: len(prompt)]) == prompt:
                starts[number] = len(prompt)
    return list(zip(sequences, starts, strict=True))


def encode_prompt(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids up to where an answer begins; none of a conversation that begins with one."""
    if not messages:
        return []
    encoded = tokenizer.apply_chat_template(
        list(messages), tokenize=True, return_dict=True, add_generation_prompt=True
    )
    return [int(token) for token in encoded["input_ids"]]


def _taken(
    checkpoint: Checkpoint, steps: Sequence[Step], sequences: Sequence[Sequence[int]], out: Path
) -> list[Taken]:
    """All steps; what lies between two of them is gone afterwards."""
    from quantize.compact.make import take

    done, between = [], list[Path]()
    try:
        for number, step in enumerate(steps, 1):
            last = number == len(steps)
            target = out if last else out.with_name(f".partial-{out.name}-{number}")
            if not last:
                shutil.rmtree(target, ignore_errors=True)
                between.append(target)
            done.append(take(checkpoint, step, sequences, target))
            checkpoint = open_checkpoint(target)
    finally:
        for directory in between:
            shutil.rmtree(directory, ignore_errors=True)
    return done


def format_taken(done: Sequence[Taken], compared: Compared) -> str:
    """What each step took, what an engine makes of it, and the loss beside the first model's."""
    from quantize.report.tables import align, megabytes

    rows = [["step", "parameters", "zeros", "bytes", "mean error of outputs", "what went"]]
    for one in done:
        errors = [group.error for group in one.groups]
        rows.append(
            [
                one.step,
                f"{one.parameters_before:,} -> {one.parameters_after:,}",
                f"{one.zeros:,}",
                f"{megabytes(one.bytes_before)} -> {megabytes(one.bytes_after)}",
                f"{100 * sum(errors) / len(errors):.1f} %" if errors else "-",
                one.what,
            ]
        )
    lines = [align(rows), *(f"{one.step}: an engine exploits {one.exploited}" for one in done)]
    lines += [
        f"{one.step}: {one.bytes_named:,} bytes as it is named, {one.bytes_after:,} as it is stored"
        for one in done
        if one.bytes_named is not None
    ]
    lines.append(
        f"loss {compared.loss_before:.4f} -> {compared.loss_after:.4f} nats per token, "
        f"KL {compared.kl:.4g}, same first choice {100 * compared.agreement:.1f} %, on "
        f"{compared.tokens:,} held-out tokens of calibration's (of answers, where it has any); simulated, a "
        "gate measures the engine"
    )
    return "\n".join(lines)
