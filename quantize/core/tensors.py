"""Tensors of safetensors files by their place on disk: read one at a time, or copied without being read."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.core.files import whole_file, write_whole
from quantize.core.weights import DTYPE_BYTES, INDEX, CheckpointError, read_header, weight_files

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

COPY_BYTES = 1 << 22
SHARD_BYTES = 5_000_000_000
EXPONENTS = {
    "F64": ("<u8", 0x7FF << 52),
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
"""The bits that are all set in NaN and infinity, so that bfloat16 needs no conversion to find them."""
NAN_BYTES = {"F8_E4M3": 0x7F, "F8_E5M2": 0x7C}
"""The same of a byte. E4M3 has no infinity; its NaN is all ones."""


@dataclass(frozen=True)
class Part:
    """A tensor's place: the file, its offset there, and what the header says of it."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]
    bytes: int


def blocks(part: Part, size: int = COPY_BYTES) -> Iterator[bytes]:
    """A tensor's bytes, at most ``size`` at a time. Raises CheckpointError where the file ends before."""
    with part.file.open("rb") as source:
        source.seek(part.offset)
        left = part.bytes
        while left:
            block = source.read(min(left, size))
            if not block:
                raise CheckpointError(f"{part.file} ends {left} bytes early; download it again")
            yield block
            left -= len(block)


def read_parts(directory: Path) -> dict[str, Part]:
    """Every tensor of a checkpoint with its place on disk."""
    found: dict[str, Part] = {}
    for file in weight_files(directory):
        found |= read_file_parts(file)
    return found


def read_file_parts(file: Path) -> dict[str, Part]:
    """Every tensor of one safetensors file with its place on disk."""
    with file.open("rb") as opened:
        start = 8 + struct.unpack("<Q", opened.read(8))[0]
    found = {}
    for name, tensor in read_header(file).items():
        begin, end = tensor["data_offsets"]
        found[name] = Part(file, start + begin, tensor["dtype"], tuple(tensor["shape"]), end - begin)
    return found


def write_tensors(tensors: Mapping[str, Part], path: Path, dtypes: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file of tensors that lie in other files, without reading any into memory whole.

    ``dtypes`` names tensors that are to be written as ``BF16`` or ``F16`` (rounded to nearest, ties to even).
    Nothing is left at ``path`` if it fails. Raises CheckpointError for a value beyond the range of ``F16``,
    and NoRoomError.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    wanted = {name: (dtypes or {}).get(name, part.dtype) for name, part in tensors.items()}
    at = 0
    for name, part in tensors.items():
        end = at + part.bytes // DTYPE_BYTES.get(part.dtype, 1) * DTYPE_BYTES.get(wanted[name], 1)
        header[name] = {"dtype": wanted[name], "shape": list(part.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path, 8 + len(text) + at) as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name, part in tensors.items():
            for block in blocks(part):
                out.write(_narrowed(block, part.dtype, wanted[name], name))


def write_shards(tensors: Mapping[str, Part], out: Path) -> None:
    """Write ``model.safetensors``, or shards and their index where it would be over ``SHARD_BYTES``."""
    shards: list[dict[str, Part]] = [{}]
    size = 0
    for name, part in sorted(tensors.items()):
        if size and size + part.bytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = part
        size += part.bytes
    if len(shards) == 1:
        write_tensors(shards[0], out / "model.safetensors")
        return
    index = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_tensors(shard, out / file)
        index.update(dict.fromkeys(shard, file))
    total = sum(part.bytes for part in tensors.values())
    write_whole(out / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": index}))


def overwrite(parts: Mapping[str, Part], tensors: Mapping[str, Tensor]) -> None:
    """Put ``tensors``, by name, in place of stored ones of the same size. Raises ValueError for another."""
    import torch

    for name, tensor in tensors.items():
        part, raw = parts[name], tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        if len(raw) != part.bytes:
            raise ValueError(f"{name}: {len(raw)} bytes in place of {part.bytes}")
        with part.file.open("r+b") as file:
            file.seek(part.offset)
            file.write(raw)


def _narrowed(block: bytes, stored: str, wanted: str, name: str) -> bytes:
    """Floats of one type as those of another."""
    import numpy as np

    if stored == wanted:
        return block
    if wanted == "F16":
        with np.errstate(over="ignore"):
            half = _wide(block, stored).astype("<f2")
        if not bool(np.isfinite(half).all()):
            raise CheckpointError(f"{name} has values beyond the range of float16; set dtype to bfloat16")
        return bytes(half.tobytes())
    if wanted != "BF16":
        raise ValueError(f"{name}: tensors are written as BF16 or F16, not as {wanted}")
    bits = _wide(block, stored).view("<u4")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return bytes(rounded.astype("<u2").tobytes())


def _wide(block: bytes, stored: str) -> NDArray[np.float32]:
    import numpy as np

    if stored == "BF16":
        return (np.frombuffer(block, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(block, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[stored]).astype("<f4")


def read_values(part: Part) -> NDArray[np.float32]:
    """A tensor of floats, in 32 bits; without torch."""
    import numpy as np

    found = np.empty(part.shape, np.float32)
    flat, at = found.reshape(-1), 0
    for block in blocks(part):
        values = _wide(block, part.dtype)
        flat[at : at + len(values)] = values
        at += len(values)
    return found


def same_bytes(one: Part, other: Part) -> bool:
    """Whether two tensors are the same, bit for bit."""
    if (one.dtype, one.shape, one.bytes) != (other.dtype, other.shape, other.bytes):
        return False
    return all(mine == theirs for mine, theirs in zip(blocks(one), blocks(other), strict=True))


def refuse_not_finite(directory: Path) -> None:
    """Raise CheckpointError when any float of a checkpoint, scales included, is NaN or infinite.

    Reads all of it, some GB a second.
    """
    for name, part in read_parts(directory).items():
        if not is_finite(part):
            raise CheckpointError(f"{directory}: {name} holds NaN or infinity; the checkpoint is damaged")


def is_finite(part: Part) -> bool:
    """Whether no number of a tensor is NaN or infinite, by the bits of its exponents."""
    import numpy as np

    if part.dtype in EXPONENTS:
        kind, mask = EXPONENTS[part.dtype]
    elif part.dtype in NAN_BYTES:
        kind, mask = "u1", NAN_BYTES[part.dtype]
    else:
        return True
    return not any(
        bool(((np.frombuffer(block, dtype=kind) & np.array(mask, dtype=kind)) == mask).any())
        for block in blocks(part)
    )
