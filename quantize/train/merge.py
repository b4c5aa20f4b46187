"""Complete checkpoints from what was trained: a base with an adapter merged into it, or trained as a whole.

Written in the base's own types, each number rounded once; the tokenizer, the template and all else that
travels with weights are copied byte for byte. What comes out is a model as any other.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.core.checkpoint import Checkpoint, base_sha256, copy_companions, open_checkpoint
from quantize.core.dequantize import read_tensor
from quantize.core.files import whole_directory, writing
from quantize.core.modules import read_modules
from quantize.core.tensors import Part, overwrite, read_parts, refuse_not_finite
from quantize.train.adapters import changes
from quantize.train.base import Base, refuse_untrainable
from quantize.train.identity import tokenizer_sha256
from quantize.train.loop import TrainError
from quantize.train.record import Record, read_record

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def merge(checkpoint: Checkpoint, adapter: Path, out: Path, record: Record | None = None) -> None:
    """Write ``checkpoint`` with ``adapter`` merged into it as a directory ``out``, whole or not at all.

    ``record`` is the adapter's, which says of what base it is. Raises TrainError for an adapter of another
    base or another tokenizer, one that does not fit, or an ``out`` that is there; CheckpointError.
    """
    modules = read_modules(checkpoint)
    refuse_untrainable(checkpoint, modules)
    refuse_other_base(checkpoint, record)
    parts = read_parts(checkpoint.path)
    found = changes(adapter, parts)

    def changed() -> Iterator[tuple[str, Tensor]]:
        for change in found:
            name = f"{change.module}.weight"
            if (part := parts.get(name)) is None:
                raise TrainError(f"{adapter} changes {change.module}, which {checkpoint.path} does not have")
            if part.shape != (shape := (change.b.shape[0], change.a.shape[1])):
                raise TrainError(
                    f"{adapter}: {change.module} is {shape} there and {part.shape} in {checkpoint.path}; it "
                    "is an adapter of another model"
                )
            stored = read_tensor(part)
            yield name, (stored.float() + change.added()).to(stored.dtype)

    _write(checkpoint, out, changed())


def refuse_other_base(checkpoint: Checkpoint, record: Record | None) -> None:
    """Raise TrainError where an adapter was trained on another base, or with another tokenizer."""
    if record is None:
        return
    if record.run["tokenizer"] != tokenizer_sha256(checkpoint):
        raise TrainError(
            f"{checkpoint.path}: its tokenizer or chat template has changed since the adapter was trained: "
            "what was learned are other tokens; put the old files back, or train again"
        )
    if record.run["model"] != base_sha256(checkpoint):
        raise TrainError(
            f"{checkpoint.path} is not the base that the adapter was trained on ({record.base}); give that"
        )


def write_full(base: Base, out: Path) -> None:
    """Write a model that was trained as a whole, in the types of the checkpoint that it began as."""
    parts = read_parts(base.checkpoint.path)

    def changed() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in base.model.named_parameters(remove_duplicate=False):
            stored = base.blocks.stored(name)
            if stored is not None and stored in parts:
                yield stored, parameter.detach().cpu().to(type_of(parts[stored]))

    if out.exists():
        shutil.rmtree(out)  # of a run that was stopped after it was written
    _write(base.checkpoint, out, changed())


def type_of(part: Part) -> torch.dtype:
    """The type, in torch, that a tensor is stored in."""
    import torch

    names = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
    return names[part.dtype]


def _write(checkpoint: Checkpoint, out: Path, changed: Iterable[tuple[str, Tensor]]) -> None:
    """The checkpoint's files in ``out`` with some tensors changed, one of them in memory at a time."""
    if out.exists():
        raise TrainError(f"{out} is there already; remove it, or name another directory")
    try:
        with whole_directory(out) as partial:
            copy_companions(checkpoint, partial)
            for file in checkpoint.files:
                if not (partial / file).exists():
                    source = checkpoint.path / file
                    with writing(partial / file, source.stat().st_size):
                        shutil.copyfile(source, partial / file)
            parts = read_parts(partial)
            for name, tensor in changed:
                overwrite(parts, {name: tensor})
            refuse_not_finite(partial)
            open_checkpoint(partial)
    except BlockingIOError:
        raise TrainError(f"{out} is being written by another process; wait until it is there") from None


def record_of(adapter: Path) -> Record | None:
    """The record beside an adapter, if it was trained here."""
    for place in (adapter, adapter.parent):
        if (place / "record.json").is_file():
            return read_record(place)
    return None
