"""LoRA, QLoRA and full training of one model for one role, side by side.

    python -m benchmarks.training.run --model DIR --clinc clinc150.json --out var/training

The role is intent classification: ``--intents`` of CLINC150's, ``--examples`` to train on of each, and
``--judged`` validation questions of each to judge with. Every method sees the same examples in one order.
Printed are right answers, the share of full training's gain with its paired 95 % interval (bootstrap over
items), memory predicted and measured, and seconds. Runs go on where they were stopped.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from quantize.train.record import Record, read_record

PROMPT = "Name the intent."
RATES = {"full": 1e-4, "lora": 1e-3, "qlora": 1e-3}
RESAMPLES = 10_000


def write_data(source: Path, out: Path, intents: int, examples: int, judged: int) -> tuple[Path, Path]:
    """Items to train on and to judge with, of intents drawn by a fixed seed."""
    found = json.loads(source.read_text(encoding="utf-8"))
    drawn = random.Random(0)
    chosen = sorted(drawn.sample(sorted({label for _, label in found["train"]}), intents))
    files = []
    for part, name, most in (("train", "train.jsonl", examples), ("val", "held-out.jsonl", judged)):
        items = []
        for intent in chosen:
            texts = sorted({text for text, label in found[part] if label == intent})
            drawn.shuffle(texts)
            items += [item(text, intent) for text in texts[:most]]
        files.append(out / name)
        files[-1].write_text("".join(f"{json.dumps(one)}\n" for one in items), encoding="utf-8")
    return files[0], files[1]


def item(text: str, intent: str) -> dict[str, object]:
    messages = [{"role": "system", "content": PROMPT}, {"role": "user", "content": text}]
    return {"messages": messages, "expected": intent, "max_tokens": 12}


def trained(options: argparse.Namespace, method: str, train: Path, held_out: Path) -> Record:
    out = options.out / method
    command = [
        *(sys.executable, "-m", "deploy.cli", "train", method, "--model", str(options.model)),
        *("--data", str(train), "--held-out", str(held_out), "--out", str(out), "--judge", "100000"),
        *("--steps", str(options.steps), "--rate", str(RATES[method])),
        *("--batch", str(options.batch), "--together", str(options.together), "--keep-every", "12"),
    ]
    if options.memory is not None and method == "qlora":
        command += ["--memory", str(options.memory)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return read_record(out)


def share_of_gain(one: Record, full: Record) -> tuple[float, float, float]:
    """(right - before) / (full training's right - before), and its paired 95 % interval."""
    mine, theirs = (_answers(record.held_out.answers_after) for record in (one, full))
    before = _answers(full.held_out.answers_before)
    rows = np.random.default_rng(0).integers(0, len(mine), (RESAMPLES, len(mine)))
    gains = theirs[rows].mean(1) - before[rows].mean(1)
    shares = (mine[rows].mean(1) - before[rows].mean(1)) / np.maximum(gains, 1e-9)
    share = (mine.mean() - before.mean()) / max(theirs.mean() - before.mean(), 1e-9)
    low, high = np.percentile(shares, [2.5, 97.5])
    return float(share), float(low), float(high)


def _answers(flags: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array([float(flag) for flag in flags])


def table(records: dict[str, Record]) -> str:
    head = (
        "method",
        "right before → after",
        "loss",
        "share of full training's gain",
        "trained",
        "memory beside the program: predicted, measured",
        "s",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for method, record in records.items():
        right, memory = record.held_out.right, record.memory
        share, low, high = share_of_gain(record, records["full"])
        count = record.lora["parameters"] if record.lora else None
        measured = "-" if memory.measured is None else f"{memory.measured / 1e9:.2f} GB"
        lines.append(
            f"| `{method}` | {right.reference_good} → {right.good} of {right.items} | "
            f"{record.held_out.loss_before:.2f} → {record.held_out.loss_after:.3f} | "
            f"{'1' if method == 'full' else f'{share:.3f} ({low:.3f} to {high:.3f})'} | "
            f"{f'{count / 1e6:.1f} M' if count else 'all'} | {memory.predicted / 1e9:.2f} GB, {measured} | "
            f"{record.seconds:.0f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint directory")
    parser.add_argument("--clinc", type=Path, required=True, help="clinc150.json")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=["full", "lora", "qlora"])
    parser.add_argument("--intents", type=int, default=15)
    parser.add_argument("--examples", type=int, default=64, help="to train on, of each intent")
    parser.add_argument("--judged", type=int, default=20, help="to judge with, of each intent (at most 20)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--together", type=int, default=16)
    parser.add_argument("--memory", type=float, default=1.5, help="QLoRA's budget, GB")
    options = parser.parse_args(arguments)
    for what, path in (("--model", options.model), ("--clinc", options.clinc)):
        if not path.exists():
            print(f"skipped: {what} {path} is not there", file=sys.stderr)
            return
    options.out.mkdir(parents=True, exist_ok=True)
    train, held_out = write_data(
        options.clinc, options.out, options.intents, options.examples, options.judged
    )
    records = {method: trained(options, method, train, held_out) for method in options.methods}
    if "full" in records:
        print(table(records))


if __name__ == "__main__":
    main()
