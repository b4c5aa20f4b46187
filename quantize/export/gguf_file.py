"""What a GGUF file says of itself: its settings and the places of its tensors, without reading those.

The format: "GGUF" in little-endian, version 2 or 3; a list of keys with typed values; a list of tensors with
shape (the fastest dimension first), type and offset; then the tensors. Whatever a foreign file says is
checked against its size before it is followed.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.export.types import ExportError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
MOST_ENTRIES = 1 << 20
"""Keys or tensors of one file; more cannot be meant."""
DEEPEST = 2
"""Arrays within arrays."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its type by llama.cpp's name, its shape as torch has it, its bytes."""

    type: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def weights(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class GgufFile:
    """``fields`` by their whole keys; arrays are lists."""

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return str(self.fields.get("general.architecture", "unknown"))

    def of_architecture(self, key: str) -> Any:
        """A setting such as ``block_count``; None where the file has none."""
        return self.fields.get(f"{self.architecture}.{key}")

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors.values())


def read_gguf(path: Path) -> GgufFile:
    """Raises ExportError for what is no whole GGUF file."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).file()
    except FileNotFoundError:
        raise ExportError(f"{path} does not exist; give a GGUF file") from None
    except (ValueError, struct.error, UnicodeDecodeError, IndexError) as error:
        if isinstance(error, ExportError):
            raise
        raise ExportError(f"{path} is no whole GGUF file ({error}); download it again") from None


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, 0

    def file(self) -> GgufFile:
        if self._data[:4] != MAGIC:
            raise ExportError(f"{self._path} does not begin as GGUF files do; give a file that does")
        self._at = 4
        if (version := self._number("I")) not in VERSIONS:
            raise ExportError(f"{self._path} is GGUF version {version}; versions 2 and 3 are read")
        tensors, keys = self._count(), self._count()
        fields = {}
        for _ in range(keys):
            key = self._text()
            fields[key] = self._value(self._number("I"))
        if int(fields.get("split.count", 1)) > 1:
            raise ExportError(f"{self._path} is one of {fields['split.count']} parts; join them first")
        found = [self._tensor() for _ in range(tensors)]
        alignment = int(fields.get("general.alignment", 32))
        begin = -(-self._at // alignment) * alignment
        end = max((begin + offset + tensor.bytes for _, tensor, offset in found), default=begin)
        if end > len(self._data):
            raise ExportError(
                f"{self._path} has {len(self._data)} bytes, its header says {end}; download it again"
            )
        return GgufFile(self._path, fields, {name: tensor for name, tensor, _ in found})

    def _number(self, kind: str) -> Any:
        (value,) = struct.unpack_from(f"<{kind}", self._data, self._at)
        self._at += struct.calcsize(kind)
        return value

    def _count(self) -> int:
        if (count := int(self._number("Q"))) > MOST_ENTRIES:
            raise ExportError(f"{self._path}: its header lists {count} entries; download it again")
        return count

    def _text(self) -> str:
        size = int(self._number("Q"))
        raw = self._data[self._at : self._at + size]
        if len(raw) != size:
            raise ExportError(f"{self._path} ends within a text; download it again")
        self._at += size
        return raw.decode("utf-8", errors="surrogateescape")

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            if kind not in _SCALARS:
                raise ExportError(f"{self._path}: a value of type {kind}, which GGUF does not have")
            return self._number(_SCALARS[kind])
        inner, count = self._number("I"), int(self._number("Q"))
        if count > len(self._data) - self._at or depth == DEEPEST:
            raise ExportError(f"{self._path}: a list of {count} values does not fit; download it again")
        if inner in _SCALARS:
            form = f"<{count}{_SCALARS[inner]}"
            values = struct.unpack_from(form, self._data, self._at)
            self._at += struct.calcsize(form)
            return list(values)
        return [self._value(inner, depth + 1) for _ in range(count)]

    def _tensor(self) -> tuple[str, GgufTensor, int]:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self._text()
        dimensions = [int(self._number("Q")) for _ in range(min(int(self._number("I")), 4))]
        number, offset = int(self._number("I")), int(self._number("Q"))
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise ExportError(
                f"{self._path}: {name} is of type {number}, which is not known here; update gguf"
            ) from None
        block, size = GGML_QUANT_SIZES[kind]
        count = 1
        for dimension in dimensions:
            count *= dimension
        return name, GgufTensor(kind.name, tuple(dimensions[::-1]), count // block * size), offset
