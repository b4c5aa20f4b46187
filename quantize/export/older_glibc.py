"""Lets a shared library that was built against a newer glibc be loaded by an older one.

Compilers of today let ``strtol`` and its like be ``__isoc23_strtol`` (C23's, which also read ``0b1``), and
these came with glibc 2.38; so the wheel of ``llama-cpp-py-sync`` asks for that version although it is called
manylinux2014 and needs nothing else of it. Where glibc is older, a copy of the libraries is made in which
these functions are the ones that they replaced: each symbol's name is moved behind its prefix, its version is
taken off, and the need of the newer version is marked weak, as the linker does for what may be missing.
Format: System V ABI, and the Linux Standard Base on symbol versions. Little-endian, 64 bits.
"""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
from pathlib import Path

PREFIX = b"__isoc23_"
NEWER = "GLIBC_2.38"
_DYNSYM, _VERSYM, _VERNEED = 11, 0x6FFFFFFF, 0x6FFFFFFE
_WEAK, _UNVERSIONED = 2, 1


class ElfError(ValueError):
    """A library is not as expected here, or needs more of the newer glibc than these functions."""


def loadable_copies(libraries: Path, name: str) -> Path:
    """A directory with copies of all ``*.so*`` in ``libraries`` that an older glibc loads.

    It is kept in the user's cache, under ``name``. Raises ElfError.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tiercel"
    place = cache / name
    if place.is_dir():
        return place
    cache.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".partial-{name}-", dir=cache))
    try:
        for file in libraries.glob("*.so*"):
            (made / file.name).write_bytes(without_newer(file.read_bytes(), file.name))
        made.chmod(0o755)
        try:
            made.rename(place)
        except OSError:  # another process was first
            shutil.rmtree(made)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return place


def without_newer(library: bytes, name: str) -> bytes:
    """The library with older functions in place of C23's. Raises ElfError."""
    data = bytearray(library)
    if data[:6] != b"\x7fELF\x02\x01":
        raise ElfError(f"{name} is no library of 64 bits, little-endian")
    sections = _sections(data)
    for kind, offset, _, link in sections:
        if kind == _VERNEED:
            _rename(data, sections, _weaken(data, offset, sections[link][1]), name)
    return bytes(data)


def _sections(data: bytearray) -> list[tuple[int, int, int, int]]:
    """(type, offset, size, link) of every section."""
    (start,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    found = []
    for at in range(count):
        _, kind, _, _, offset, length, link = struct.unpack_from("<IIQQQQI", data, start + at * size)
        found.append((kind, offset, length, link))
    return found


def _weaken(data: bytearray, offset: int, names: int) -> set[int]:
    """Mark the needs of the newer version weak; their numbers."""
    found = set()
    while True:
        _, count, _, first, following = struct.unpack_from("<HHIII", data, offset)
        at = offset + first
        for _ in range(count):
            _, flags, number, text, more = struct.unpack_from("<IHHII", data, at)
            if _text(data, names + text) == NEWER.encode():
                struct.pack_into("<H", data, at + 4, flags | _WEAK)
                found.add(number)
            at += more
        if not following:
            return found
        offset += following


def _rename(data: bytearray, sections: list[tuple[int, int, int, int]], indexes: set[int], name: str) -> None:
    """Let the symbols that are of these versions be the older functions."""
    (_, symbols, size, link) = next(one for one in sections if one[0] == _DYNSYM)
    (_, versions, _, _) = next(one for one in sections if one[0] == _VERSYM)
    names = sections[link][1]
    for number in range(size // 24):
        (version,) = struct.unpack_from("<H", data, versions + 2 * number)
        if version & 0x7FFF not in indexes:
            continue
        at = symbols + 24 * number
        (text,) = struct.unpack_from("<I", data, at)
        symbol = _text(data, names + text)
        if not symbol.startswith(PREFIX):
            raise ElfError(f"{name} needs {symbol.decode()} of {NEWER}, which older ones lack")
        struct.pack_into("<I", data, at, text + len(PREFIX))
        struct.pack_into("<H", data, versions + 2 * number, _UNVERSIONED)


def _text(data: bytearray, at: int) -> bytes:
    return bytes(data[at : data.index(0, at)])
