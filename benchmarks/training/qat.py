"""Text to train the demo's variants on, and the picture of what training took off.

    python -m benchmarks.training.qat text qat-text.jsonl
    tiercel train qat int4 --data qat-text.jsonl
    python -m benchmarks.training.qat real-text var/benchmarks/real/model real-text.jsonl --each 150
    python -m benchmarks.training.qat draw docs/images/qat.png "4 bits=var/variants/.training/…/report.json"

The text is of the demo's training utterances, and of records of seeds that nothing else has; of a real
model its own greedy answers to prompts that no set of :mod:`benchmarks.quantization.real_data` holds.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.quantization import real_data
from deploy.assistant.corpus import intent_messages, own_utterances, record_conversation
from deploy.report_figure import STYLE
from quantize.make.calibration import load_tokenizer
from quantize.report.page import GRID, MUTED, PALETTE, PAPER

SEEDS = 43_000_000
EACH = 1500
WIDTH, HEIGHT = 12.0, 4.2


def text(path: Path) -> None:
    """Write conversations as JSON Lines."""
    utterances = own_utterances("train")
    random.Random(43).shuffle(utterances)
    intents = [
        [*intent_messages(one.text), {"role": "assistant", "content": one.intent}]
        for one in utterances[:EACH]
    ]
    records = [record_conversation(SEEDS + number) for number in range(EACH)]
    lines = (json.dumps({"messages": one}, ensure_ascii=False) + "\n" for one in [*intents, *records])
    path.write_text("".join(lines), encoding="utf-8")


def real_text(directory: Path, path: Path, each: int) -> None:
    """Write prompts, ``each`` of every kind that are left, with the BF16 model's own greedy answers."""
    import torch
    from transformers import AutoModelForCausalLM

    used = sum(real_data.SIZES.values())
    asked = [one for kind in real_data.prompts() for one in kind[used : used + each]]
    model = AutoModelForCausalLM.from_pretrained(
        real_data.real_model(directory), dtype=torch.bfloat16, local_files_only=True
    ).eval()
    tokenizer = load_tokenizer(directory)
    lines = []
    for messages, (ids, start) in zip(asked, real_data.answered(model, tokenizer, asked), strict=True):
        said = tokenizer.decode(ids[start:], skip_special_tokens=True)
        if not said.strip():  # the model ended its turn at once
            continue
        conversation = [*messages, {"role": "assistant", "content": said}]
        lines.append(json.dumps({"messages": conversation}, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def draw(path: Path, reports: Mapping[str, Mapping[str, Any]]) -> None:
    """Loss over steps of the second stage, and the share of it that is gone."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), dpi=130, facecolor=PAPER)
        figure.text(0.02, 0.93, "Quantization-aware training", size=15, weight="bold")
        figure.text(0.30, 0.935, "KL to BF16 on conversations that it did not see, in torch", color=MUTED)
        _curves(figure.add_axes((0.06, 0.13, 0.52, 0.68)), reports)
        _left(figure.add_axes((0.72, 0.13, 0.25, 0.68)), reports)
        figure.savefig(path)


def _curves(axes: Axes, reports: Mapping[str, Mapping[str, Any]]) -> None:
    for number, (name, one) in enumerate(reports.items()):
        steps = [step for step, _ in one["curve"]["evaluations"]]
        kl = [figures["kl"] for _, figures in one["curve"]["evaluations"]]
        colour = PALETTE[number % len(PALETTE)]
        before = -0.06 * max(steps)
        axes.plot([before, *steps], [one["before"], *kl], "-o", color=colour, ms=3.5, lw=1.6)
        axes.annotate(
            name, (steps[-1], kl[-1]), (5, 0), textcoords="offset points", va="center", color=colour
        )
    axes.set_yscale("log")
    axes.set_xlim(
        right=1.22 * max(step for one in reports.values() for step, _ in one["curve"]["evaluations"])
    )
    axes.set_xlabel(
        "steps of distillation; the first point is what it began with, the second after all blocks"
    )
    axes.set_ylabel("nats per token")
    axes.grid(color=GRID, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _left(axes: Axes, reports: Mapping[str, Mapping[str, Any]]) -> None:
    for row, (name, one) in enumerate(reversed(list(reports.items()))):
        colour = PALETTE[(len(reports) - 1 - row) % len(PALETTE)]
        axes.barh(row, 100 * one["recovered"], color=colour, height=0.55, alpha=0.85)
        axes.annotate(
            f"{one['recovered']:.0%}",
            (100 * one["recovered"], row),
            (5, 0),
            textcoords="offset points",
            va="center",
        )
        axes.annotate(name, (0, row), (-6, 0), textcoords="offset points", ha="right", va="center")
    axes.set_yticks([])
    axes.set_xlim(0, 115)
    axes.set_title("of the loss before, gone, %", loc="left", size=10)
    axes.spines[["top", "right", "left"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    commands = parser.add_subparsers(required=True, dest="command")
    writing = commands.add_parser("text")
    writing.add_argument("out", type=Path)
    real = commands.add_parser("real-text")
    real.add_argument("model", type=Path, help="made where it is missing")
    real.add_argument("out", type=Path)
    real.add_argument("--each", type=int, default=150, help="prompts of each of the four kinds")
    drawing = commands.add_parser("draw")
    drawing.add_argument("out", type=Path)
    drawing.add_argument("reports", nargs="+", help="NAME=FILE")
    options = parser.parse_args()
    if options.command == "text":
        text(options.out)
        return
    if options.command == "real-text":
        real_text(options.model, options.out, options.each)
        return
    named = dict(one.split("=", 1) for one in options.reports)
    draw(
        options.out,
        {name: json.loads(Path(file).read_text(encoding="utf-8")) for name, file in named.items()},
    )


if __name__ == "__main__":
    main()
