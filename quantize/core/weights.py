"""The weights of a checkpoint directory: which files they are, and what their headers say.

One source is read, the one that an engine reads:

1. ``model.safetensors.index.json`` and the shards that it names;
2. without it, ``model.safetensors``.

Whatever else lies there (an older ``model.safetensors`` beside newer shards, Mistral's ``consolidated.*``
and ``params.json``, pickles, GGUF) is no second source: :func:`ignored_files` names it, and nothing of it is
carried along, since engines prefer some of it to what was made.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
"""Weights in formats that can run code when they are read."""
OTHER_WEIGHTS = (*PICKLES, ".safetensors", ".gguf", ".onnx", ".h5", ".msgpack", ".npz")
MISTRAL = ("params.json", "consolidated.safetensors.index.json")
"""Mistral's own format, which vLLM prefers where it finds it."""
CONFIGS = ("config.json", "quantize_config.json", "quant_config.json")
MAX_HEADER_BYTES = 100_000_000
"""As in the safetensors library."""
DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}


class CheckpointError(ValueError):
    """A directory is not a checkpoint that can be used. The text says what is missing and the fix."""


@dataclass(frozen=True)
class Tensor:
    """What a safetensors header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint, by name. Raises CheckpointError, with the fix, if there are none
    or one is missing."""
    index = path / INDEX
    names = sorted(set(_weight_map(index).values())) if index.is_file() else [SINGLE]
    missing = [name for name in names if not (path / name).is_file()]
    if missing and index.is_file():
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{path} has no {missing[0]}{more}, which {INDEX} names; download the checkpoint again"
        )
    if missing:
        raise CheckpointError(f"{path} has no {SINGLE} and no {INDEX}{_instead(path)}")
    return [path / name for name in names]


def _instead(path: Path) -> str:
    """What to do with what lies there in place of the weights."""
    files = sorted(file.name for file in path.iterdir() if file.is_file())
    shards = [name for name in files if name.endswith(".safetensors")]
    if any(name.startswith("consolidated") for name in shards):
        return "; it holds Mistral's own format: download the files in Hugging Face's as well"
    if len(shards) > 1:
        return f", but {len(shards)} shards; download {INDEX} as well"
    if shards:
        return f", but {shards[0]}; rename it to {SINGLE}"
    if any(name.endswith(PICKLES) for name in files):
        return f", but pickles, which are not read here. Convert them:\n{conversion(path)}"
    if any(name.endswith(".gguf") for name in files):
        return "; GGUF is not read: give the checkpoint that it was made from"
    return "; complete the checkpoint (safetensors is the format)"


def conversion(path: Path) -> str:
    """Two lines for a shell that write a checkpoint of pickles as safetensors, beside it. transformers
    reads pickles with ``weights_only``, which runs no code of theirs."""
    made = path.with_name(f"{path.name}-safetensors")
    return (
        "  python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('"
        f"{path}', dtype='auto').save_pretrained('{made}')\"\n"
        f"  find '{path}' -maxdepth 1 \\( -name '*token*' -o -name 'vocab*' -o -name 'merges.txt' "
        f"-o -name '*.jinja' \\) -exec cp -n {{}} '{made}' \\;"
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        what = "has no weight_map" if isinstance(error, KeyError) else f"is not a JSON object ({error})"
        raise CheckpointError(f"{index} {what}; download it again") from None
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise CheckpointError(f"{index}: weight_map must name a file for each tensor; download it again")
    for name in found.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {name!r} is no safetensors file of this directory")
    return dict(found)


def ignored_files(path: Path) -> tuple[str, ...]:
    """Names of files that hold weights, or make an engine look for others, and are not read."""
    read = {file.name for file in weight_files(path)}
    return tuple(
        file.name
        for file in sorted(path.iterdir())
        if file.name not in read and (file.suffix in OTHER_WEIGHTS or file.name in MISTRAL)
    )


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: tensor name to dtype, shape and data offsets.

    The format is eight bytes of little-endian length, then JSON
    (https://github.com/huggingface/safetensors#format). Raises CheckpointError if the file is cut or damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise CheckpointError(f"{path} is cut short or not a safetensors file; download it again")
        try:
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"of {length} bytes")
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
            wrong = _wrong_size(header)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(
                f"{path}: its header cannot be read ({type(error).__name__}: {error}); download it again"
            ) from None
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path} has {size} bytes, its header says {8 + length + end}; download it again"
        )
    if wrong:
        raise CheckpointError(f"{path}: {wrong}; download it again")
    return header


def _wrong_size(header: Mapping[str, Any]) -> str | None:
    """Which tensor's bytes are not those of its shape and dtype."""
    for name, tensor in header.items():
        begin, end = tensor["data_offsets"]
        count = 1
        for size in tensor["shape"]:
            count *= int(size)
        width = DTYPE_BYTES.get(tensor["dtype"])
        if width is not None and end - begin != width * count:
            return f"{name} of {tensor['shape']} in {tensor['dtype']} cannot have {end - begin} bytes"
    return None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by name, from the headers of its files.

    Raises CheckpointError when a tensor is stored twice, or is not where the index says.
    """
    found: dict[str, Tensor] = {}
    where: dict[str, str] = {}
    for shard in weight_files(path):
        for name, tensor in read_header(shard).items():
            if name in found:
                raise CheckpointError(
                    f"{path}: {name} is in {where[name]} and in {shard.name}; download the checkpoint again"
                )
            begin, end = tensor["data_offsets"]
            found[name] = Tensor(tensor["dtype"], tuple(tensor["shape"]), end - begin)
            where[name] = shard.name
    if (index := path / INDEX).is_file():
        listed = _weight_map(index)
        if lost := sorted(name for name, file in listed.items() if where.get(name) != file):
            raise CheckpointError(
                f"{path}: {INDEX} says that {lost[0]} is in {listed[lost[0]]}, which does not hold it; "
                "shards and index are of different checkpoints: download them again"
            )
        if more := sorted(where.keys() - listed.keys()):
            raise CheckpointError(
                f"{path}: {where[more[0]]} holds {more[0]}, which {INDEX} does not list; "
                "shards and index are of different checkpoints: download them again"
            )
    return found


def weight_bytes(path: Path) -> int:
    """Bytes of all tensors of a checkpoint: weights, scales, zero points, embeddings and head."""
    return sum(tensor.bytes for tensor in read_tensors(path).values())


def stored_dtype(tensors: Iterable[Tensor]) -> str:
    """The floating-point type that most bytes are stored in: ``BF16``, ``F16``, ``F32`` …; the type of most
    bytes where nothing is a 16- or 32-bit float."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.bytes
    floats = {dtype: size for dtype, size in sizes.items() if dtype in ("BF16", "F16", "F32", "F64")}
    return max(floats or sizes or {"BF16": 0}, key=lambda dtype: (floats or sizes or {"BF16": 0})[dtype])
