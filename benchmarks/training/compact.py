"""Adapters that make up for quantization, and outliers kept high, by bits and bytes, on an engine in 16 bits.

    python -m benchmarks.training.compact demo --bits 4 3 2 --ranks 8 16 32
    python -m benchmarks.training.compact real --model MODEL --bits 4 --ranks 16 64 --shares 0.01
    python -m benchmarks.training.compact distilled docs/images/distill.png "responses=…/record.json" …

Every row is what the numbers stand for, in 16 bits, by a real engine's kernels: none serves all of it.
KL is to the unquantized model, over the whole vocabulary, in 1/1000 nat per token of right answers (the
demo's items) or of the model's own answers (:mod:`benchmarks.quantization.real_data`); intervals are 95 %
with conversations as independent.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.quantization import real_data
from benchmarks.quantization.real import BEST
from quantize.compact.compensate import compensate
from quantize.compact.make import take
from quantize.compact.simulated import write_simulated
from quantize.compact.steps import parse_step
from quantize.core.checkpoint import Checkpoint, open_checkpoint
from quantize.core.modules import Modules, read_modules
from quantize.core.plan import uniform
from quantize.evaluate.bench import Bench, Span
from quantize.evaluate.tasks import read_items
from quantize.make.calibration import CalibrationSet, read_calibration
from quantize.make.variant import part_store
from quantize.train.data import encode, of_item
from quantize.train.record import Record

if TYPE_CHECKING:
    from numpy.typing import NDArray

WORK = Path("var/benchmarks/compact")
DEMO = Path("deploy/assistant")
ROLES = ("core", "summarizer", "intent_classifier")
ITEMS = 40
"""Of each role."""
CONFIDENT = 1.96


@dataclass(frozen=True)
class Texts:
    """What calibrates, and what judges, by conversation: of a role, or of none."""

    calibration: CalibrationSet
    judging: Sequence[Span]
    roles: Sequence[str]


def demo_texts(checkpoint: Checkpoint) -> Texts:
    judging, roles = list[Span](), list[str]()
    for role in ROLES:
        items = [one for one in read_items(DEMO / f"data/{role}.jsonl", role) if one.suite == "task"][:ITEMS]
        lines = [of_item(item, role) for item in items]
        for one in encode(lines, checkpoint, checkpoint.max_model_len).examples:
            judging.append((list(one.ids), one.learned.index(True)))
            roles.append(role)
    return Texts(read_calibration(DEMO / "data/calibration.jsonl", checkpoint), judging, roles)


def real_texts(checkpoint: Checkpoint, work: Path) -> Texts:
    found = real_data.texts(checkpoint.path, work / "texts.json")
    return Texts(found.calibration(64), found.reported, [""] * len(found.reported))


@dataclass(frozen=True)
class Made:
    """A checkpoint in 16 bits, and the bytes that what it stands for takes."""

    label: str
    directory: Path
    bytes: int


def rows(
    checkpoint: Checkpoint, modules: Modules, texts: Texts, work: Path, options: argparse.Namespace
) -> Iterator[Made]:
    """One after another, each gone when the next one is asked for."""
    out, sequences = work / "candidate", texts.calibration.sequences
    store = part_store(work, checkpoint, modules, texts.calibration)
    for bits in options.bits:
        plan = uniform(modules, f"w{bits}a16-g32-asym", method=BEST)
        quantized = work / f"quantized-{bits}"
        shutil.rmtree(quantized, ignore_errors=True)
        store.assemble(plan, quantized)
        write_simulated(checkpoint, modules, plan, quantized, out)
        yield Made(f"{bits} bits, {BEST}", out, plan.weight_bytes(modules))
        for rank in options.ranks:
            adapter = work / f"adapter-{bits}-{rank}"
            found = compensate(
                checkpoint, modules, plan, quantized, store.smoothing, sequences, rank, adapter
            )
            write_simulated(checkpoint, modules, plan, quantized, out, adapter)
            errors = f"{100 * found.before:.1f} -> {100 * found.after:.1f} %"
            yield Made(f"… and rank {rank} ({errors})", out, plan.weight_bytes(modules) + found.bytes)
        for share in options.shares:
            shutil.rmtree(out, ignore_errors=True)
            taken = take(
                checkpoint, parse_step(f"outliers:{share:g}:int{bits}-g32-asym-importance"), sequences, out
            )
            assert taken.bytes_named is not None
            yield Made(f"{bits} bits rounded, {100 * share:g} % in 16 bits", out, taken.bytes_named)


def measure(options: argparse.Namespace) -> None:
    """Print a line of a Markdown table for every row."""
    checkpoint = open_checkpoint(options.model or DEMO / "model")
    work = WORK / options.what
    work.mkdir(parents=True, exist_ok=True)
    texts = demo_texts(checkpoint) if options.what == "demo" else real_texts(checkpoint, work)
    modules = read_modules(checkpoint)
    lengths = np.array([len(tokens) - start for tokens, start in texts.judging])
    starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    with Bench(options.python, work / "engine.log", site=Path("deploy/engine_site")) as bench:
        reference = work / "reference.npz"
        base = bench.score(checkpoint.path, texts.judging, save=reference)
        for made in rows(checkpoint, modules, texts, work, options):
            scores = bench.score(made.directory, texts.judging, reference=reference)
            sums = np.add.reduceat(scores.kl, starts)
            cells = [interval(sums, lengths)]
            if options.what == "demo":
                chosen = [np.array([one == role for one in texts.roles]) for role in ROLES]
                cells += [interval(sums[one], lengths[one]) for one in chosen]
            agreed = float((scores.top1 == base.top1).mean())
            print(
                f"| {made.label} | {made.bytes / 1e6:.2f} | {' | '.join(cells)} | {100 * agreed:.1f} % |",
                flush=True,
            )


def interval(sums: NDArray[Any], lengths: NDArray[Any]) -> str:
    """Mean KL per token and half of its 95 % interval (ratio estimator over conversations), in 1/1000."""
    mean = sums.sum() / lengths.sum()
    error = np.sqrt((sums - mean * lengths).var(ddof=1) / len(sums)) / lengths.mean()
    return f"{1000 * mean:.3g} ± {1000 * CONFIDENT * error:.2g}"


def distilled(out: Path, records: Sequence[str]) -> None:
    """The picture of students: right answers and loss of held-out items over steps."""
    import matplotlib
    from matplotlib.figure import Figure

    from deploy.report_figure import STYLE
    from quantize.report.page import GRID, MUTED, PALETTE, PAPER

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.0, 4.2), dpi=130, facecolor=PAPER)
        figure.text(0.02, 0.93, "Distillation into half of the layers", size=15, weight="bold")
        figure.text(0.42, 0.935, "held-out items, in torch, 32 bits", color=MUTED)
        loss, right = figure.add_axes((0.06, 0.13, 0.4, 0.68)), figure.add_axes((0.55, 0.13, 0.4, 0.68))
        for number, argument in enumerate(records):
            name, _, file = argument.partition("=")
            record = Record.model_validate_json(Path(file).read_text(encoding="utf-8"))
            steps = [step for step, _, _ in record.evaluations]
            look: dict[str, Any] = {"color": PALETTE[number % len(PALETTE)], "ms": 3.5, "lw": 1.6}
            loss.plot(steps, [one for _, one, _ in record.evaluations], "-o", label=name, **look)
            right.plot(steps, [100 * one for _, _, one in record.evaluations], "-o", label=name, **look)
        loss.set_ylim(bottom=0)
        loss.set_ylabel("loss, nats per token of the answer")
        right.set_ylabel("right answers, %")
        right.legend(frameon=False)
        for axes in (loss, right):
            axes.set_xlabel("steps")
            axes.grid(color=GRID, lw=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    commands = parser.add_subparsers(required=True, dest="what")
    for name in ("demo", "real"):
        measuring = commands.add_parser(name)
        measuring.add_argument("--model", type=Path, help="a checkpoint directory (default: the demo's)")
        measuring.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
        measuring.add_argument("--ranks", type=int, nargs="*", default=[8, 16, 32])
        measuring.add_argument("--shares", type=float, nargs="*", default=[0.0, 0.005, 0.01, 0.03])
        measuring.add_argument("--python", type=Path, default=Path(".venv-engine/bin/python"))
    drawing = commands.add_parser("distilled")
    drawing.add_argument("out", type=Path)
    drawing.add_argument("records", nargs="+", help="NAME=FILE")
    options = parser.parse_args()
    if options.what == "distilled":
        distilled(options.out, options.records)
    elif options.what == "real" and options.model is None:
        sys.exit("real: give --model, the directory of a chat model")
    else:
        measure(options)


if __name__ == "__main__":
    main()
