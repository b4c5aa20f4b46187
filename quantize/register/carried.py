"""A LoRA adapter on a quantized variant of its base: may it go there, and what the card says of it.

Whether a variant can carry an adapter at all its card says (:func:`refuse_carrier`). An adapter reads what
goes into a matrix and adds to what comes out. Where channels of these were scaled to lose less (``smooth``),
the adapter is scaled as the matrix was: with s of its inputs, and r that its rows were divided by, A becomes
A · s and B becomes B / r, which is exact. Transforms whose scales are not kept leave nothing to do it by.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.card import Card
from quantize.core.checkpoint import Checkpoint
from quantize.core.dequantize import read_tensor
from quantize.core.engine_figures import RANKS, AdapterCarried
from quantize.core.files import link_or_copy
from quantize.core.methods import QAT, SMOOTH, SOLVERS
from quantize.core.modules import read_modules
from quantize.core.tensors import read_file_parts, read_parts
from quantize.train.adapters import CONFIG, PREFIX, WEIGHTS, adapter_sha256, changes, read_config
from quantize.train.identity import tokenizer_sha256
from quantize.train.loop import TrainError
from quantize.train.merge import record_of
from quantize.train.state import write_state

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_FILES = (CONFIG, WEIGHTS)
CARRIED = (
    *("scheme", "method", "schemes", "methods", "kv", "weight_bits", "module_bits", "bits_per_weight"),
    *("kv_bytes_per_token", "target", "calibration", "versions", "notes"),
)
"""Fields of a carrier's card that hold with an adapter on it as well."""
SCALED = "the adapter is scaled as the channels of the variant that carries it"
SERVED_BY = "vllm"
"""What the names of targets begin with whose engine takes adapters here."""
LIKE = 0.99
"""Of a merged matrix's numbers, the share that must be what base and adapter come to."""


@dataclass(frozen=True)
class Carrying:
    """An adapter and what is to carry it. ``directory`` holds the carrier's files, ``merged`` is the base
    with the adapter merged into it, and ``scales`` are the carrier's, where it is smoothed."""

    adapter: Path
    carrier: Card
    directory: Path
    base: Checkpoint
    merged: Checkpoint
    scales: Mapping[str, Tensor] | None = None


def is_smoothed(card: Card) -> bool:
    """Whether a variant's channels are scaled as only what was kept beside it tells."""
    return card.origin == "made" and any(SMOOTH in _transforms(method) for method in _methods(card))


def refuse_carrier(card: Card) -> None:
    """Raise TrainError for a variant that carries no adapter, by its card alone."""
    where = f"{card.id} ({card.version})"
    if card.adapter is not None:
        raise TrainError(f"{where} carries an adapter already; name {card.adapter.carrier}")
    if card.state == "broken":
        raise TrainError(f"{where} is broken, the engine cannot load it; name another variant")
    if card.target is not None and not card.target.startswith(SERVED_BY):
        raise TrainError(
            f"{where} is served by {card.target}, to which no adapter is given here; name a variant that "
            "vLLM serves, or quantize the merged model"
        )
    for method in _methods(card):
        done = _transforms(method)
        lost = [one for one in done if one != SMOOTH or card.origin == "registered"]
        trained = method.endswith(f"+{QAT}") and SMOOTH in done
        if lost or trained:
            why = f"by how much is not kept ({lost[0]})" if lost else "its norms were trained after that"
            raise TrainError(
                f"{where}, made by {method}, has channels that are scaled otherwise than those which the "
                f"adapter was trained on, and {why}; name a variant made by another method (`tiercel "
                "quantize make --scheme`), or quantize the merged model"
            )


def _methods(card: Card) -> tuple[str, ...]:
    return tuple(dict.fromkeys((card.method, *card.methods.values())))


def _transforms(method: str) -> tuple[str, ...]:
    """What a method does to channels. Of one that was made elsewhere its words tell; what nobody knows may
    have been done."""
    if method == "none":
        return ()
    return tuple(word for word in method.split("+") if word not in (*SOLVERS, QAT))


def examine_adapter(asked: Carrying) -> AdapterCarried:
    """What the card says of it. Raises TrainError for an adapter that does not belong there: of another base
    than the carrier's, of modules that take none, another one than was merged, of a rank that no engine
    takes; and for a carrier that takes none, or reads text otherwise than the model does."""
    adapter, carrier = asked.adapter, asked.carrier
    refuse_carrier(carrier)
    config = read_config(adapter)
    rank, where = int(config["r"]), f"{carrier.id} ({carrier.version})"
    if rank > RANKS[-1]:
        raise TrainError(f"{adapter}: rank {rank}; engines take {RANKS[-1]} at most: merge it")
    record = record_of(adapter)
    if record is not None and record.run["model"] != carrier.base_sha256:
        raise TrainError(
            f"{adapter} was trained on another base than {where} was made of; name a variant of {record.base}"
        )
    if tokenizer_sha256(Checkpoint(asked.directory, {})) != tokenizer_sha256(asked.merged):
        raise TrainError(
            f"{where} has another tokenizer or chat template than {asked.merged.path}; merge it anew"
        )
    _refuse_modules(asked)
    _refuse_other_merge(asked)
    if is_smoothed(carrier):
        _refuse_other_scales(asked)
    found = f"{carrier.id}@{carrier.version}"
    return AdapterCarried(
        rank=rank, sha256=adapter_sha256(adapter), bytes=adapter_bytes(adapter), carrier=found
    )


def _refuse_modules(asked: Carrying) -> None:
    linears = {one.name: one for one in read_modules(asked.base).linears}
    for change in changes(asked.adapter):
        if (linear := linears.get(change.module)) is None:
            raise TrainError(
                f"{asked.adapter} changes {change.module}, which is no linear module of a block of "
                f"{asked.base.path}; merge it"
            )
        shape = (change.b.shape[0], change.a.shape[1])
        if shape != (linear.out_features, linear.in_features):
            raise TrainError(
                f"{asked.adapter}: {change.module} is {shape} there and "
                f"{(linear.out_features, linear.in_features)} in {asked.base.path}; it is an adapter of "
                "another model"
            )


def _refuse_other_merge(asked: Carrying) -> None:
    """Raise TrainError where the merged model is not base and adapter, by the first matrix they change."""
    base, merged = read_parts(asked.base.path), read_parts(asked.merged.path)
    for change in changes(asked.adapter):
        name = f"{change.module}.weight"
        if name not in base or name not in merged:
            continue
        before, after = read_tensor(base[name]), read_tensor(merged[name])
        added = change.added()
        if before.shape != after.shape or added.count_nonzero() == 0:
            continue
        same = ((before.float() + added).to(after.dtype) == after).float().mean()
        if same < LIKE:
            raise TrainError(
                f"{asked.merged.path} is not {asked.base.path} with {asked.adapter} merged into it: "
                f"{change.module} differs; merge it anew (`tiercel train merge`)"
            )
        return


def _refuse_other_scales(asked: Carrying) -> None:
    """Raise TrainError where the carrier's scales are gone, or its norms, which may have been tuned after
    that, are not nearer to those that go with them than to the base's."""
    carrier = asked.carrier
    where = f"{carrier.id} ({carrier.version})"
    if asked.scales is None:
        raise TrainError(
            f"{where} is smoothed, and its scales are no longer beside it; make it again, or quantize the "
            "merged model"
        )
    mine, base = read_parts(asked.directory), read_parts(asked.base.path)
    for name, scaled in asked.scales.items():
        if name.endswith((".columns", ".rows")) or name not in base:
            continue
        before, now = read_tensor(base[name]).float(), read_tensor(mine[name]).float()
        if (now - scaled.float()).norm() > (now - before).norm() / 2 and not (scaled.float() == before).all():
            raise TrainError(
                f"{where} is smoothed by other scales than those that are beside it now; make it again"
            )


def write_carried(asked: Carrying, out: Path) -> None:
    """The adapter's files in the directory ``out``, scaled as the carrier is."""
    out.mkdir()
    for name in ADAPTER_FILES if asked.scales is None else (CONFIG,):
        link_or_copy(asked.adapter / name, out / name)
    if asked.scales is not None:
        write_state(out / WEIGHTS, _scaled(asked.adapter, asked.scales), {})
        shutil.copystat(asked.adapter / WEIGHTS, out / WEIGHTS)


def _scaled(adapter: Path, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors, in 32 bits, as they stand in the scaled model."""
    found: dict[str, Tensor] = {}
    for change in changes(adapter):
        a, b = change.a.float(), change.b.float()
        if (columns := scales.get(f"{change.module}.columns")) is not None:
            a = a * columns
        if (rows := scales.get(f"{change.module}.rows")) is not None:
            b = b / rows.unsqueeze(1)
        found[f"{PREFIX}{change.module}.lora_A.weight"] = a
        found[f"{PREFIX}{change.module}.lora_B.weight"] = b
    return found


def adapter_bytes(adapter: Path) -> int:
    """Bytes of an adapter's tensors; 0 where there is none."""
    file = adapter / WEIGHTS
    return sum(part.bytes for part in read_file_parts(file).values()) if file.is_file() else 0
