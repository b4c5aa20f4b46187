"""A LoRA adapter on a quantized variant of its base: does it belong there, and what the card says of it."""

from __future__ import annotations

from pathlib import Path

from quantize.card import Card
from quantize.core.checkpoint import Checkpoint
from quantize.core.engine_figures import RANKS, AdapterCarried
from quantize.core.tensors import read_file_parts
from quantize.train.adapters import CONFIG, WEIGHTS, adapter_sha256, read_config
from quantize.train.identity import tokenizer_sha256
from quantize.train.loop import TrainError
from quantize.train.merge import record_of

ADAPTER_FILES = (CONFIG, WEIGHTS)
CARRIED = (
    *("scheme", "method", "schemes", "methods", "kv", "weight_bits", "module_bits", "bits_per_weight"),
    *("kv_bytes_per_token", "target", "calibration", "versions", "notes"),
)
"""Fields of a carrier's card that hold with an adapter on it as well."""


def examine_adapter(adapter: Path, carrier: Card, directory: Path, merged: Checkpoint) -> AdapterCarried:
    """What the card says of it. Raises TrainError for an adapter of another base than the carrier's, a rank
    that no engine takes, or a carrier that reads text otherwise than the model does."""
    config = read_config(adapter)
    rank, where = int(config["r"]), f"{carrier.id} ({carrier.version})"
    if carrier.adapter is not None:
        raise TrainError(f"{where} carries an adapter already; name the variant that it was put on")
    if rank > RANKS[-1]:
        raise TrainError(f"{adapter}: rank {rank}; engines take {RANKS[-1]} at most: merge it")
    record = record_of(adapter)
    if record is not None and record.run["model"] != carrier.base_sha256:
        raise TrainError(
            f"{adapter} was trained on another base than {where} was made of; name a variant of {record.base}"
        )
    if tokenizer_sha256(Checkpoint(directory, {})) != tokenizer_sha256(merged):
        raise TrainError(f"{where} has another tokenizer or chat template than {merged.path}; merge it anew")
    found = f"{carrier.id}@{carrier.version}"
    return AdapterCarried(
        rank=rank, sha256=adapter_sha256(adapter), bytes=adapter_bytes(adapter), carrier=found
    )


def adapter_bytes(adapter: Path) -> int:
    """Bytes of an adapter's tensors; 0 where there is none."""
    file = adapter / WEIGHTS
    return sum(part.bytes for part in read_file_parts(file).values()) if file.is_file() else 0
