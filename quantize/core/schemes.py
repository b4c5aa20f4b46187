"""Numeric layouts by name: what a linear module's weights and inputs, or the KV cache, are stored in.

A scheme's name says all of it, so that a plan is a readable table:

==================== =====================================================================
``bf16``             not quantized
``w4a16-g128``       weights in 4-bit integers, one scale per 128 inputs; inputs stay 16 bits
``w4a16``            the same, one scale per output channel
``w4a16-g64-asym``   with a zero point per group
``w8a8``             8-bit integers, weights per channel, inputs per token at run time (dynamic)
``w8a8-r7``          the same with weights in -64 … 63: a CPU without VNNI adds products in pairs in 16
                     bits, which overflow at the full range (oneDNN, "Nuances of int8 computations")
``w8a8-static``      as ``w8a8``, one calibrated scale for all inputs of a module
``w8a8-asym``        the same as ``w8a8``, inputs with a zero point
``fp8``              E4M3 weights and inputs, one calibrated scale per tensor each
``fp8-dynamic``      E4M3 weights per channel, inputs per token at run time
``fp8-block``        E4M3 weights per 128 x 128 block, inputs per 128 values at run time
``fp8a16``           E4M3 weights per channel; inputs stay 16 bits
``nvfp4``, ``nvfp4a16``, ``mxfp4``   4-bit floats with block scales (Blackwell)
==================== =====================================================================

Names follow compressed-tensors' conventions. Nothing here says whether a target can load a scheme:
that is :mod:`quantize.core.targets`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

Kind = Literal["int", "float"]
Strategy = Literal["tensor", "channel", "group", "block", "token", "tensor_group"]

BF16_BYTES = 2


class SchemeError(ValueError):
    """A scheme's name is not understood. The text lists what is."""


@dataclass(frozen=True)
class Numbers:
    """How one tensor is quantized, in compressed-tensors' words."""

    bits: int
    kind: Kind
    strategy: Strategy
    group_size: int | None = None
    symmetric: bool = True
    dynamic: bool | Literal["local"] = False

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of compressed-tensors' ``QuantizationArgs``."""
        made: dict[str, Any] = {
            "num_bits": self.bits,
            "type": self.kind,
            "symmetric": self.symmetric,
            "strategy": self.strategy,
            "dynamic": self.dynamic,
        }
        if self.strategy == "block":
            made["block_structure"] = [BLOCK, BLOCK]
        elif self.group_size:
            made["group_size"] = self.group_size
        return made


BLOCK = 128
"""Rows and columns of an FP8 block scale."""


@dataclass(frozen=True)
class Scheme:
    """A named layout of a linear module. ``weights`` is None for ``bf16``."""

    name: str
    weights: Numbers | None = None
    activations: Numbers | None = None
    range_bits: int | None = None
    """Bits of the range that is used, where it is less than the stored one."""

    @property
    def weight_bits(self) -> int:
        return self.weights.bits if self.weights else 16

    @property
    def activation_bits(self) -> int:
        return self.activations.bits if self.activations else 16

    @property
    def needs_calibration(self) -> bool:
        """Whether input scales are fixed before serving, so that even ``rtn`` needs data."""
        return self.activations is not None and self.activations.dynamic is not True

    def stored_bytes(self, n: int, k: int) -> int:
        """Bytes on disk and in memory of one (N outputs, K inputs) weight with its scales and zero points.

        Exact for what llm-compressor writes in the compressed-tensors format; biases are not counted.
        """
        w = self.weights
        if w is None:
            return n * k * BF16_BYTES
        groups = -(-k // w.group_size) if w.group_size else 1
        if w.kind == "int" and self.activations is None:
            total = n * _words(k, w.bits) * 4 + n * groups * BF16_BYTES + SHAPE_BYTES
            return total if w.symmetric else total + _words(n, w.bits) * groups * 4
        if w.kind == "int":  # with quantized inputs, llm-compressor stores a byte per weight
            return n * k + n * groups * BF16_BYTES + self._input_scale_bytes()
        total = math.ceil(n * k * w.bits / 8)
        match w.strategy:
            case "tensor":
                total += BF16_BYTES
            case "channel":
                total += n * BF16_BYTES
            case "block":
                total += -(-n // BLOCK) * -(-k // BLOCK) * BF16_BYTES
            case _:
                total += n * -(-k // (w.group_size or k))
        if w.strategy == "tensor_group":
            total += 4
        return total + self._input_scale_bytes()

    def _input_scale_bytes(self) -> int:
        if self.activations is None or self.activations.dynamic is True:
            return 0
        return BF16_BYTES if self.activations.dynamic is False else 4

    def bits_per_weight(self, n: int, k: int) -> float:
        return 8 * self.stored_bytes(n, k) / (n * k)


def _words(values: int, bits: int) -> int:
    """32-bit words that ``values`` integers of ``bits`` bits are packed into."""
    return -(-values * bits // 32)


SHAPE_BYTES = 16
"""compressed-tensors stores the shape of a packed weight beside it as two 64-bit integers."""

_INT_TOKEN = Numbers(8, "int", "token", dynamic=True)
_FP8_TOKEN = Numbers(8, "float", "token", dynamic=True)

_NAMED: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("bf16"),
        Scheme("w8a8", Numbers(8, "int", "channel"), _INT_TOKEN),
        Scheme("w8a8-static", Numbers(8, "int", "channel"), Numbers(8, "int", "tensor")),
        Scheme("w8a8-r7", Numbers(8, "int", "channel"), _INT_TOKEN, range_bits=7),
        Scheme("w8a8-asym", Numbers(8, "int", "channel"), replace(_INT_TOKEN, symmetric=False)),
        Scheme("fp8", Numbers(8, "float", "tensor"), Numbers(8, "float", "tensor")),
        Scheme("fp8-dynamic", Numbers(8, "float", "channel"), _FP8_TOKEN),
        Scheme("fp8-block", Numbers(8, "float", "block"), Numbers(8, "float", "group", BLOCK, dynamic=True)),
        Scheme("fp8a16", Numbers(8, "float", "channel")),
        Scheme(
            "nvfp4",
            Numbers(4, "float", "tensor_group", 16),
            Numbers(4, "float", "tensor_group", 16, dynamic="local"),
        ),
        Scheme("nvfp4a16", Numbers(4, "float", "tensor_group", 16)),
        Scheme("mxfp4", Numbers(4, "float", "group", 32), Numbers(4, "float", "group", 32, dynamic=True)),
    )
}
_INTEGER = re.compile(r"w([1-8])a(16|8)(?:-g(\d+))?(-asym)?")


@cache
def scheme(name: str) -> Scheme:
    """The scheme of that name. Raises SchemeError."""
    if name in _NAMED:
        return _NAMED[name]
    if not (found := _INTEGER.fullmatch(name)):
        raise SchemeError(
            f"unknown scheme {name!r}; known: {', '.join(_NAMED)}, and integers such as w4a16-g128, "
            "w4a16-g64-asym, w8a16 or w4a8-g128"
        )
    bits, activation_bits, group = int(found[1]), int(found[2]), int(found[3] or 0)
    weights = Numbers(bits, "int", "group" if group else "channel", group or None, symmetric=found[4] is None)
    return Scheme(name, weights, _INT_TOKEN if activation_bits == 8 else None)


@dataclass(frozen=True)
class KvScheme:
    """A layout of the KV cache, by vLLM's ``--kv-cache-dtype``. ``auto`` is the model's own 16 bits."""

    name: str
    bits: int
    calibrated: bool = False
    scale_bytes: int = 0
    """Bytes of scales per token, layer and head, for keys and values each."""

    def bytes_per_token(self, layers: int, kv_heads: int, head_dim: int) -> int:
        """Keys and values of one token over all layers, scales included."""
        return 2 * layers * kv_heads * (head_dim * self.bits // 8 + self.scale_bytes)

    def arguments(self) -> dict[str, Any] | None:
        """compressed-tensors' ``kv_cache_scheme``, for schemes whose scales are in the checkpoint."""
        if not self.calibrated:
            return None
        return Numbers(8, "float", "tensor").arguments()


KV_SCHEMES: dict[str, KvScheme] = {
    kv.name: kv
    for kv in (
        KvScheme("auto", 16),
        KvScheme("fp8", 8, calibrated=True),
        KvScheme("fp8_e5m2", 8),
        KvScheme("int8_per_token_head", 8, scale_bytes=4),
        KvScheme("int4_per_token_head", 4, scale_bytes=4),
    )
}
"""``fp8`` is E4M3 with one calibrated scale per layer for keys and one for values."""


def kv_scheme(name: str) -> KvScheme:
    """Raises SchemeError."""
    if name not in KV_SCHEMES:
        raise SchemeError(f"unknown KV-cache scheme {name!r}; known: {', '.join(KV_SCHEMES)}")
    return KV_SCHEMES[name]


PACKED_FLOATS = ("mxfp4", "nvfp4", "nvfp4a16")
"""Schemes that no part of this project makes or turns back into numbers: shown, not planned with."""
LADDER: tuple[str, ...] = (
    "w4a16", "w4a16-asym",
    "w4a16-g128", "w4a16-g128-asym", "w4a16-g64", "w4a16-g64-asym", "w4a16-g32", "w4a16-g32-asym",
    "w4a16-g16", "w4a16-g16-asym",
    "mxfp4", "nvfp4", "nvfp4a16",
    "w8a16", "w8a16-g128", "w8a16-g64", "w8a16-g32",
    "w8a8", "w8a8-r7", "w8a8-asym", "fp8-dynamic", "fp8", "fp8-block", "fp8a16",
    "bf16",
)  # fmt: skip
"""The schemes that are shown, from few bytes to many."""
PLANNED = tuple(name for name in LADDER if name not in PACKED_FLOATS)
"""The schemes that plans are made of."""
