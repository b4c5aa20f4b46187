"""A quantizer: a format, over what its scales span, how ranges are found, and how scales are stored.

By name, ``<format>[-<granularity>][-<observer>]``:

>>> quantizer("int4-g128").fake(weight)
>>> quantizer("int8-asym-tensor-percentile").quantize(inputs)       # codes, scale, zero
>>> quantizer("nf4-dq").bits_per_number((4096, 4096))               # 4.127

``int1`` … ``int16`` (``-asym``, ``-narrow``), ``e4m3``, ``e5m2``, ``e2m1``, ``nf4`` (groups of 64; ``-dq``:
their scales quantized once more), ``mxfp4``, ``mxfp6``, ``mxfp8`` (groups of 32 with powers of two as
scales), ``log4``, ``power4``, ``ternary``, ``binary``. Without a granularity a scale spans a channel.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

from quantize.numerics.codebooks import BINARY, TERNARY, logarithmic, normal_float, power_law
from quantize.numerics.formats import E2M1, E3M2, E4M3, FLOATS, Format, FormatError, Integer
from quantize.numerics.granularity import PER_CHANNEL, Granularity, granularity
from quantize.numerics.observers import MIN_MAX, OBSERVERS, Observer, usual_observer

if TYPE_CHECKING:
    from torch import Tensor

StoredAs = Literal["float32", "bf16", "e8m0", "double"]
SCALE_BITS: dict[StoredAs, float] = {"float32": 32, "bf16": 16, "e8m0": 8, "double": 8 + 32 / 256}
DOUBLE_BLOCK = 256
"""Scales that share a scale of their own, where they are quantized once more (QLoRA, section 3)."""
MX_BLOCK = 32
NF_BLOCK = 64
E8M0_BIAS = 127


@dataclass(frozen=True)
class Quantized:
    """Codes of the shape that was quantized; scales and zero points (…, ranges), as they are stored."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


@dataclass(frozen=True)
class Quantizer:
    """``stored`` is what scales are stored as: what is searched and rounded to is what is stored.

    ``e8m0``    a power of two, 2^(floor(log2 max|x|) - exponent of the format's largest number) (OCP MX 1.0)
    ``double``  8-bit floats with a float32 scale per 256 of them, after their mean is taken off
    """

    form: Format
    granularity: Granularity = PER_CHANNEL
    observer: Observer = MIN_MAX
    stored: StoredAs = "float32"

    @property
    def name(self) -> str:
        more = "" if self.stored == "float32" else f"-{self.stored}"
        return f"{self.form.name}-{self.granularity.name}-{self.observer.name}{more}"

    def scales(self, x: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of every range of ``x``, float32 (…, ranges). ``weights``, of numbers as they
        matter, broadcast with ``x``; observers that do not weigh do not look at them."""
        ranges = self.granularity.ranges(x)
        mine = None if weights is None else self.granularity.ranges(weights.float().expand(x.shape))
        low, high = self.observer.range(ranges, self.form, self._settle, mine)
        scale = self._settle(self.form.scale_of(low, high))
        if self.stored == "double":
            scale = twice_quantized(scale)
        return scale, self.form.zero_of(low, scale)

    def _settle(self, scale: Tensor) -> Tensor:
        """Scales that can be stored; of ``double`` ones only all together can tell."""
        import torch

        match self.stored:
            case "bf16":
                return scale.to(torch.bfloat16).float()
            case "e8m0":
                return power_of_two(scale * self.form.top, self.form.top)
        return scale

    def quantize(self, x: Tensor, weights: Tensor | None = None) -> Quantized:
        scale, zero = self.scales(x, weights)
        wide = self.granularity.spread(scale, x)
        wide_zero = None if zero is None else self.granularity.spread(zero, x)
        return Quantized(self.form.quantize(x, wide, wide_zero), scale, zero)

    def dequantize(self, found: Quantized) -> Tensor:
        """Float32."""
        wide = self.granularity.spread(found.scale, found.codes)
        zero = None if found.zero is None else self.granularity.spread(found.zero, found.codes)
        return self.form.dequantize(found.codes, wide, zero)

    def fake(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """``x`` through codes and back, in its own dtype."""
        scale, zero = self.scales(x, weights)
        wide_zero = None if zero is None else self.granularity.spread(zero, x)
        return self.form.fake(x, self.granularity.spread(scale, x), wide_zero)

    def bits_per_number(self, shape: tuple[int, ...]) -> float:
        """Bits that a number of a tensor of that shape takes, with its part of scales and zero points."""
        of_scale = SCALE_BITS[self.stored] + (0 if self.form.symmetric else self.form.bits)
        return self.form.bits + self.granularity.count(shape) * of_scale / math.prod(shape)


def power_of_two(most: Tensor, top: float) -> Tensor:
    """The E8M0 scale of a block whose largest magnitude is ``most``, for a format that ends at ``top``."""
    import torch

    _, power = torch.frexp(most.float().clamp_min(2.0**-126))
    return torch.exp2((power - 1 - math.floor(math.log2(top))).clamp(-E8M0_BIAS, E8M0_BIAS).float())


def twice_quantized(scale: Tensor) -> Tensor:
    """Scales as they come back from E4M3, in blocks of 256, after the mean of all is taken off
    (Dettmers et al., arXiv:2305.14314, "Double Quantization")."""
    flat = scale.reshape(1, -1)
    mean = flat.mean()
    inner = Quantizer(E4M3, Granularity("group", DOUBLE_BLOCK))
    found = inner.fake(flat - mean) + mean
    # A scale that was small beside the mean could come back as nothing or less.
    return found.clamp_min(flat.min()).reshape(scale.shape)


_NAME = re.compile(r"(int|nf|log|power|mxfp)(\d+)")
_MX = {4: E2M1, 6: E3M2, 8: E4M3}


@cache
def quantizer(name: str) -> Quantizer:
    """The quantizer of that name. Raises FormatError."""
    head, *rest = name.split("-")
    flags: set[str] = {flag for flag in ("asym", "narrow", "dq") if flag in rest}
    form, spanned, stored = _format(head, flags, name)
    observer = usual_observer(form)
    for word in rest:
        if word in flags:
            continue
        if word in OBSERVERS:
            observer = OBSERVERS[word]
        else:
            spanned = granularity(word)
    return Quantizer(form, spanned, observer, stored)


def _format(head: str, flags: set[str], name: str) -> tuple[Format, Granularity, StoredAs]:
    """Format, usual granularity, and what scales are stored as."""
    named: dict[str, Format] = {one.name: one for one in (*FLOATS, BINARY, TERNARY)}
    if flags - {"asym", "narrow"} and not head.startswith("nf"):
        raise FormatError(f"{name!r}: only normal floats quantize their scales once more; leave dq out")
    if flags & {"asym", "narrow"} and not head.startswith("int"):
        raise FormatError(f"{name!r}: asym and narrow are of integers; leave them out")
    if head in named:
        return named[head], PER_CHANNEL, "float32"
    found = _NAME.fullmatch(head)
    if found is None or (found[1] == "mxfp" and int(found[2]) not in _MX):
        raise FormatError(
            f"unknown format {head!r} in {name!r}; known: int1 to int16, {', '.join(named)}, nf2 to nf8, "
            "mxfp4, mxfp6, mxfp8, log2 to log8, power2 to power12"
        )
    bits = int(found[2])
    match found[1]:
        case "int":
            return Integer(bits, "asym" not in flags, "narrow" in flags), PER_CHANNEL, "float32"
        case "nf":
            return (
                normal_float(bits),
                Granularity("group", NF_BLOCK),
                "double" if "dq" in flags else "float32",
            )
        case "log":
            return logarithmic(bits), PER_CHANNEL, "float32"
        case "power":
            return power_law(bits), PER_CHANNEL, "float32"
    return _MX[bits], Granularity("group", MX_BLOCK), "e8m0"
