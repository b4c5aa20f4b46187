"""A real chat model as GGUF: bytes, KL to BF16 by llama.cpp's own logits, and speed beside vLLM's W4A16.

    python -m benchmarks.edge.gguf                # files, KL and first choices: an hour of a slow core
    python -m benchmarks.edge.gguf --only q4_k_m  # rows whose label holds a word
    python -m benchmarks.edge.gguf --conversations 16              # a quarter of them, evenly
    python -m benchmarks.edge.gguf --speed        # both engines, interleaved, on an idle machine
    python -m benchmarks.edge.gguf --show         # table and picture of what was measured

Model and texts are those of ``benchmarks.quantization.real``: the 64 conversations of its set ``reported``,
of which the tokens of answers are scored. The reference is the checkpoint in BF16 by transformers; its logits
are rounded as a BF16 head rounds them. Intervals are 95 %, with conversations as independent; the ratio to
``q4_k_m`` is paired by bootstrap. Finished rows are kept under var/benchmarks/edge.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.edge.foreign import smollm2_q4_1
from benchmarks.quantization import real_data
from deploy.llama.scoring import ReferenceHead, Scoring
from quantize.core.checkpoint import open_checkpoint
from quantize.export.gguf import examine, export_gguf
from quantize.export.gguf_file import read_gguf
from quantize.export.importance import importance_of
from quantize.export.llama import LlamaModel, last_logits, library
from quantize.export.modules import bits_per_weight

REAL, WORK = Path("var/benchmarks/real"), Path("var/benchmarks/edge")
TYPES = ("f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m", "q2_k")
PLAIN = ("q4_k_m", "q4_0", "q2_k")
"""Types that are made without an importance matrix as well."""
FOREIGN = "q4_1, made elsewhere"
IMPORTANCE = 32
"""Conversations that the importance matrix is taken from."""
BOOTSTRAPS = 2000
Span = tuple[list[int], int]


def label(kind: str, weighted: bool) -> str:
    return f"{kind}{' imatrix' if weighted else ''}"


def files(only: str) -> dict[str, Path]:
    """Labels to GGUF files, made where they are missing."""
    checkpoint = open_checkpoint(real_data.real_model(REAL / "model"))
    texts = real_data.texts(REAL / "model", REAL / "texts.json")
    source, importance = None, None
    found: dict[str, Path] = {}
    wanted = [(kind, kind in PLAIN or kind in ("q6_k", "q5_k_m", "q3_k_m")) for kind in TYPES]
    wanted += [(kind, False) for kind in PLAIN]
    for kind, weighted in wanted:
        path = WORK / f"{label(kind, weighted).replace(' ', '-')}.gguf"
        if only in label(kind, weighted) and not path.is_file():
            source = source or examine(checkpoint)
            if weighted and importance is None:
                importance = importance_of(source, texts.calibration(IMPORTANCE).sequences)
            export_gguf(source, kind, path, importance if weighted else None, threads=1)
        if path.is_file() and only in label(kind, weighted):
            found[label(kind, weighted)] = path
    if only in FOREIGN:
        found[FOREIGN] = smollm2_q4_1(WORK)
    return found


def reference(spans: Sequence[Span]) -> list[bytes]:
    """The reference's final hidden states of the tokens before each scored one, kept between runs."""
    kept = WORK / "reference.npz"
    if not kept.is_file():
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(REAL / "model", dtype=torch.bfloat16).eval()
        rows = []
        with torch.inference_mode():
            for ids, start in spans:
                hidden = model.model(torch.tensor([ids])).last_hidden_state[0, start - 1 : -1]
                rows.append(hidden.contiguous().view(torch.uint16).numpy())
        np.savez(kept, *rows)
    with np.load(kept) as read:
        return [read[name].tobytes() for name in read.files]


def measured(
    path: Path, spans: Sequence[Span], hidden: Sequence[bytes], head: ReferenceHead
) -> dict[str, Any]:
    """Sums of KL, first choices that are the reference's, and tokens, of every conversation."""
    sums, same, counts = [], [], []
    with LlamaModel(path) as model:
        for (ids, start), kept in zip(spans, hidden, strict=True):
            scoring = Scoring(ids, start, head, kept)
            scoring.take(0, last_logits(model, ids, start, threads=1))
            columns = scoring.columns()
            sums.append(float(np.frombuffer(columns["kl"], "<f8").sum()))
            top1 = np.frombuffer(columns["top1"], "<i4") == np.frombuffer(columns["reference_top1"], "<i4")
            same.append(int(top1.sum()))
            counts.append(len(top1))
    file = read_gguf(path)
    return {
        "megabytes": file.weight_bytes / 1e6,
        "bits": bits_per_weight(file),
        "kl": sums,
        "same": same,
        "tokens": counts,
        "build": library().build,
    }


def interval(row: Mapping[str, Any]) -> tuple[float, float]:
    """Mean KL per token and half of its 95 % interval, conversations independent."""
    sums, counts = np.array(row["kl"]), np.array(row["tokens"])
    mean = sums.sum() / counts.sum()
    residuals = sums - mean * counts
    n = len(sums)
    error = np.sqrt(n / (n - 1) * (residuals**2).sum()) / counts.sum()
    return float(mean), float(1.998 * error)


def ratio(row: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[float, float, float]:
    """KL over another's, with its 95 % interval by bootstrap over conversations, which both share."""
    rng = np.random.default_rng(0)
    mine, theirs = np.array(row["kl"]), np.array(base["kl"])
    drawn = rng.integers(0, len(mine), (BOOTSTRAPS, len(mine)))
    ratios = mine[drawn].sum(1) / theirs[drawn].sum(1)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return float(mine.sum() / theirs.sum()), float(low), float(high)


def quality(only: str, count: int) -> None:
    texts = real_data.texts(real_data.real_model(REAL / "model"), REAL / "texts.json")
    spans = [(list(ids), start) for ids, start in texts.reported]
    hidden, head = reference(spans), ReferenceHead(REAL / "model")
    rows = read_rows()
    every = range(0, len(spans), len(spans) // count)
    for name, path in files(only).items():
        if len(rows.get(name, {}).get("kl", ())) != len(every):
            rows[name] = measured(path, [spans[n] for n in every], [hidden[n] for n in every], head)
            (WORK / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
            mean, half = interval(rows[name])
            print(f"{name}: {1000 * mean:.1f} ± {1000 * half:.1f} thousandths of a nat", flush=True)


def read_rows() -> dict[str, dict[str, Any]]:
    path = WORK / "rows.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


LOADS = {"prefill": (1, 512, 1), "decode": (1, 32, 64), "decode of 8": (8, 32, 64)}
"""Load to requests together, tokens of each prompt and of each answer."""
REPEATS = 3
THREADS = 2


async def speeds(only: str) -> None:
    """Tokens per second of each load on each engine, one after another, :data:`REPEATS` times around."""
    from benchmarks.edge.engines import llama_engine, vllm_engine

    found: dict[str, dict[str, list[float]]] = {}
    chosen = {name: path for name, path in files(only).items() if name != FOREIGN}
    async with vllm_engine(REAL, WORK, THREADS) as (int4, name):
        for _ in range(REPEATS):
            await timed(int4, found.setdefault(name, {}))
            for label_of, path in chosen.items():
                async with llama_engine(path, WORK, THREADS) as client:
                    await timed(client, found.setdefault(label_of, {}))
    (WORK / "speeds.json").write_text(json.dumps(found), encoding="utf-8")


async def timed(client: Any, into: dict[str, list[float]]) -> None:
    """Add what one engine does of each load; a request that is not counted goes before."""
    rng = random.Random(0)
    await client.write(rng.choices(range(100, 1000), k=64), 8)
    for load, (together, prompt, answer) in LOADS.items():
        prompts = [[rng.randrange(100, 1000) for _ in range(prompt)] for _ in range(together)]
        began = time.monotonic()
        await asyncio.gather(*(client.write(one, 1) for one in prompts))
        first = time.monotonic() - began
        if answer == 1:
            into.setdefault(load, []).append(together * prompt / first)
            continue
        began = time.monotonic()
        fresh = [[rng.randrange(100, 1000) for _ in range(prompt)] for _ in prompts]
        await asyncio.gather(*(client.write(one, answer) for one in fresh))
        seconds = max(1e-3, time.monotonic() - began - first)
        into.setdefault(load, []).append(together * (answer - 1) / seconds)


def table() -> str:
    """Markdown of all rows."""
    rows = read_rows()
    path = WORK / "speeds.json"
    fast = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    base = rows.get(label("q4_k_m", True))
    head = [
        "type",
        "MB",
        "bits per weight",
        "KL, thousandths of a nat",
        "of q4_k_m imatrix",
        "first choices as BF16",
    ]
    lines = ["| " + " | ".join([*head, *(f"{load}, tokens/s" for load in LOADS)]) + " |"]
    lines.append("|---" * (len(head) + len(LOADS)) + "|")
    for name, row in sorted(rows.items(), key=lambda one: -one[1]["megabytes"]):
        mean, half = interval(row)
        beside = "" if base is None or row is base else "{:.2f} [{:.2f}, {:.2f}]".format(*ratio(row, base))
        same = sum(row["same"]) / sum(row["tokens"])
        cells = [name, f"{row['megabytes']:.1f}", f"{row['bits']:.2f}"]
        cells += [f"{1000 * mean:.1f} ± {1000 * half:.1f}", beside, f"{100 * same:.1f} %"]
        lines.append("| " + " | ".join([*cells, *speed_cells(fast.get(name, {}))]) + " |")
    for name in fast.keys() - rows.keys():
        lines.append("| " + " | ".join([name, *[""] * 5, *speed_cells(fast[name])]) + " |")
    return "\n".join(lines)


def speed_cells(found: Mapping[str, Sequence[float]]) -> list[str]:
    """Medians with the slowest and the fastest."""
    cells = []
    for load in LOADS:
        values = found.get(load)
        cells.append(
            f"{statistics.median(values):.0f} ({min(values):.0f}–{max(values):.0f})" if values else ""
        )
    return cells


def picture(out: Path) -> None:
    """KL against bytes, of GGUF types and of what vLLM serves of the same model."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.2))
    for name, row in read_rows().items():
        mean, half = interval(row)
        weighted = name.endswith("imatrix") or name in ("f16", "q8_0")
        axes.errorbar(row["megabytes"], mean, yerr=half, fmt="o", color="#1f6f8b" if weighted else "#c8553d")
        axes.annotate(f" {name}", (row["megabytes"], mean), fontsize=8, va="bottom")
    for name, size, kl in (("vLLM w4a16-g32-asym", 118.1, 0.0766), ("vLLM w8a8", 163.2, 0.0275)):
        axes.plot(size, kl, "s", color="#555")
        axes.annotate(f" {name}", (size, kl), fontsize=8, va="top")
    axes.set_yscale("log")
    axes.set_xlabel("MB of weights")
    axes.set_ylabel("KL to BF16, nats per token")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out)


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--only", default="", help="rows whose label holds this")
    given.add_argument("--conversations", type=int, default=64, help="how many of the 64 are scored")
    given.add_argument("--speed", action="store_true", help="measure speed instead")
    given.add_argument("--show", action="store_true", help="table and picture of what there is")
    given.add_argument("--picture", type=Path, default=Path("docs/images/gguf.svg"))
    options = given.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1" if not options.speed else str(THREADS))
    WORK.mkdir(parents=True, exist_ok=True)
    if options.speed:
        asyncio.run(speeds(options.only))
    elif not options.show:
        quality(options.only, options.conversations)
    print(table())
    if read_rows():
        picture(options.picture)
        print(f"picture: {options.picture}", file=sys.stderr)


if __name__ == "__main__":
    main()
