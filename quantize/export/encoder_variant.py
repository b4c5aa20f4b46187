"""A classifier as a model of the fleet: its variants are ONNX files, which onnxruntime serves.

Its vocabulary, as far as it answers, is its labels: an answer is one token, a label, so that accuracy, first
choices and KL mean what they mean of any other model.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.card import ONNX
from quantize.core.checkpoint import Checkpoint, base_sha256, copy_companions
from quantize.core.resources import measured
from quantize.export.encoder import DYNAMIC, FLOAT, MODEL_FILE, STATIC, export_encoder, open_encoder
from quantize.export.types import ExportError

if TYPE_CHECKING:
    from quantize.card import Card
    from quantize.registry import Registry

KINDS = {FLOAT: 32, DYNAMIC: 8, STATIC: 8}
"""Type to bits of a weight."""


def add_classifier(
    registry: Registry, checkpoint: Checkpoint, variant: str, kind: str, texts: Sequence[str] = ()
) -> Card:
    """Make a variant of the classifier in ``checkpoint``, or return it if the same inputs made it before. The
    reference is made in the same way, of type ``fp32``. Raises ExportError."""
    encoder = open_encoder(checkpoint.path)
    if not encoder.labels:
        raise ExportError(
            f"{checkpoint.path} has no classifier's head; train one with `tiercel export classifier`"
        )
    if (variant == registry.reference) != (kind == FLOAT):
        raise ExportError(f"the reference {registry.reference!r} of a classifier is {FLOAT}, and it alone is")
    packages = {name: version(name) for name in ("tiercel", "onnx", "onnxruntime", "torch")}
    inputs = {
        "base": base_sha256(checkpoint),
        "onnx": kind,
        "texts": list(texts) if kind == STATIC else [],
        "versions": packages,
    }

    def fill(partial: Path) -> dict[str, Any]:
        with measured() as taken:
            export_encoder(encoder, kind, partial / MODEL_FILE, texts)
        copy_companions(checkpoint, partial)
        shutil.copyfile(checkpoint.path / "config.json", partial / "config.json")
        bits = KINDS[kind]
        linears = [name for name, one in checkpoint.tensors.items() if len(one.shape) == 2]
        weights = sum(
            one.shape[0] * one.shape[1] for one in checkpoint.tensors.values() if len(one.shape) == 2
        )
        size = (partial / MODEL_FILE).stat().st_size
        return {
            "target": ONNX,
            "scheme": kind,
            "method": "none" if kind == FLOAT else "minmax",
            "weight_bits": bits,
            "module_bits": {} if kind == FLOAT else {name.rpartition(".")[0]: bits for name in linears},
            "bits_per_weight": 8 * size / weights,
            "weight_bytes": size,
            "kv_bytes_per_token": 0,
            "max_model_len": encoder.longest,
            "making": asdict(taken),
            "versions": packages,
            "notes": (f"a classifier of {len(encoder.labels)} labels, which are its answers",),
        }

    return registry.take_in(variant, inputs, fill, checkpoint)
