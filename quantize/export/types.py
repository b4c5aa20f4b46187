"""The types that a GGUF file is quantized to here, by llama.cpp's names for them.

======== ==================================================================================================
``f16``  16-bit floats; ``bf16`` as the checkpoint has them
``q8_0`` 8 bits in blocks of 32, a scale each
``q6_k`` 6 bits in blocks of 16 within 256
``q5_k_m``, ``q4_k_m``, ``q3_k_m``  that many bits in blocks of 32 (3 bits: 16) within 256, whose scales are
         6-bit numbers; half of the value and down matrices, and the head, have more
``q4_0`` 4 bits in blocks of 32, a scale each: what processors without much else compute fastest
``q2_k`` 2 bits in blocks of 16 within 256; value and down matrices have more
======== ==================================================================================================

Which matrix gets what is llama.cpp's choice. Rows that 256 does not divide cannot have the types with ``k``:
llama.cpp takes the next one with blocks of 32 for those, and the card lists what each matrix has got.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DEFAULT_TYPE = "q4_k_m"


class ExportError(ValueError):
    """A model cannot be exported. The text says why, and what can."""


@dataclass(frozen=True)
class ExportType:
    """One of the types: llama.cpp's number for it, and the bits that most weights have."""

    name: str
    number: int
    bits: int
    wants_importance: bool = False
    """Whether its ranges use an importance matrix."""


TYPES: Mapping[str, ExportType] = {
    one.name: one
    for one in (
        ExportType("f16", 1, 16),
        ExportType("bf16", 32, 16),
        ExportType("q8_0", 7, 8),
        ExportType("q6_k", 18, 6, True),
        ExportType("q5_k_m", 17, 5, True),
        ExportType("q4_k_m", 15, 4, True),
        ExportType("q4_0", 2, 4, True),
        ExportType("q3_k_m", 12, 3, True),
        ExportType("q2_k", 10, 2, True),
    )
}
FLOATS = ("f16", "bf16")


def export_type(name: str) -> ExportType:
    """Raises ExportError."""
    if name.lower() not in TYPES:
        raise ExportError(f"--type: {name!r} is not made here; known: {', '.join(TYPES)}")
    return TYPES[name.lower()]


def bits_of(kind: str) -> int:
    """Bits of a weight in a tensor of llama.cpp's type, such as ``Q5_K``, ``IQ4_NL`` or ``BF16``."""
    digits = "".join(letter if letter.isdigit() else " " for letter in kind).split()
    return int(digits[0]) if digits else 0
