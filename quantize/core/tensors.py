"""Tensors of safetensors files by their place on disk: read one at a time, or copied without being read."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.core.checkpoint import read_header, weight_files

COPY_BYTES = 1 << 22


@dataclass(frozen=True)
class Part:
    """A tensor's place: the file, its offset there, and what the header says of it."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]
    bytes: int


def read_parts(directory: Path) -> dict[str, Part]:
    """Every tensor of a checkpoint with its place on disk."""
    found = {}
    for file in weight_files(directory):
        with file.open("rb") as opened:
            start = 8 + struct.unpack("<Q", opened.read(8))[0]
        for name, tensor in read_header(file).items():
            begin, end = tensor["data_offsets"]
            found[name] = Part(file, start + begin, tensor["dtype"], tuple(tensor["shape"]), end - begin)
    return found


def write_tensors(tensors: Mapping[str, Part], path: Path) -> None:
    """Write a safetensors file of tensors that lie in other files, without reading any into memory whole."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, part in tensors.items():
        header[name] = {
            "dtype": part.dtype,
            "shape": list(part.shape),
            "data_offsets": [at, at + part.bytes],
        }
        at += part.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for part in tensors.values():
            with part.file.open("rb") as source:
                source.seek(part.offset)
                left = part.bytes
                while left:
                    block = source.read(min(left, COPY_BYTES))
                    out.write(block)
                    left -= len(block)
        out.flush()
        os.fsync(out.fileno())
    partial.rename(path)
