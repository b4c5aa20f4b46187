"""Formats: the numbers that codes of so many bits stand for, and the way from numbers to codes and back.

=================== ======================================================================================
:class:`Integer`    2^bits codes at equal distances, with a zero point or without (Jacob et al.,
                    arXiv:1712.05877)
:class:`Float`      sign, exponent and mantissa: E4M3, E5M2, E2M1 … (Micikevicius et al., arXiv:2209.05433;
                    OCP Microscaling Formats 1.0)
:class:`Table`      any finite set of numbers, to the nearest of which is rounded: NF4, powers of two,
                    power laws, codebooks, ternary and binary (:mod:`quantize.numerics.codebooks`)
=================== ======================================================================================

A format has no scale of its own: a code c stands for ``value(c) * scale``, of an integer for
``(c - zero) * scale``. Scales and zero points are tensors that broadcast with the numbers; over what they
span is :mod:`quantize.numerics.granularity`'s, how a range is found :mod:`quantize.numerics.observers`'.

>>> form = Integer(4)
>>> scale = form.scale_of(x.amin(), x.amax())
>>> codes = form.quantize(x, scale)                    # int8, -8 … 7
>>> form.dequantize(codes, scale) == form.fake(x, scale)

All of it computes in float32. Nothing is differentiable: whoever trains through it brings the estimator.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SMALLEST_SCALE = 1e-12
"""A scale is at least this, so that a range of zeros divides nothing by zero."""


class FormatError(ValueError):
    """No such format. The text says what there is."""


class Format(ABC):
    """Numbers that ``2 ** bits`` codes stand for at a scale of one."""

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def bits(self) -> int:
        """Of a stored code."""

    @property
    @abstractmethod
    def top(self) -> float:
        """The largest magnitude at a scale of one (of integers, half the width of their range): a range's
        largest magnitude is scaled to this."""

    @property
    def symmetric(self) -> bool:
        """Whether there is no zero point."""
        return True

    @abstractmethod
    def levels(self) -> Tensor:
        """All numbers at a scale of one and a zero point of zero: float32, rising, each once."""

    @abstractmethod
    def codes(self) -> Tensor:
        """Every code that :meth:`quantize` may give, once; what they stand for is in :meth:`levels`."""

    @abstractmethod
    def quantize(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """Codes of the nearest numbers, as they are stored; beyond the range, the range's end. Not a number
        stays so where the format has it, and is some code otherwise."""

    @abstractmethod
    def dequantize(self, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """What codes stand for, float32."""

    def fake(self, x: Tensor, scale: Tensor | None = None, zero: Tensor | None = None) -> Tensor:
        """``x`` through codes and back, in its own dtype. Without a ``scale`` from one over all of ``x``,
        from its smallest to its largest number."""
        if scale is None:
            low, high = x.float().aminmax()
            scale = self.scale_of(low, high)
            zero = self.zero_of(low, scale)
        return self.dequantize(self.quantize(x, scale, zero), scale, zero).to(x.dtype)

    def scale_of(self, low: Tensor, high: Tensor) -> Tensor:
        """The scale at which the range ``low`` … ``high`` is covered; zero is in every range."""
        import torch

        most = torch.maximum(-low, high).float().clamp_min(0)
        return (most / self.top).clamp_min(SMALLEST_SCALE)

    def zero_of(self, low: Tensor, scale: Tensor) -> Tensor | None:
        """The zero point at which ``low`` is the first code; None without zero points."""
        return None


@dataclass(frozen=True)
class Integer(Format):
    """Integers of 1 to 16 bits.

    Symmetric, codes are ``low`` … ``high`` = -2^(b-1) … 2^(b-1) - 1, and the largest magnitude is scaled to
    half the width of that, as llm-compressor does with weights; ``narrow`` leaves the first one out, so that
    the largest magnitude is the last code and its negative the first, as kernels scale inputs. Asymmetric,
    scale and zero point are S = (max - min) / (2^b - 1) and the integer nearest to Z = low - min / S
    (Jacob et al., arXiv:1712.05877, eq. 1 and section 3), so that zero itself is a code.
    """

    width: int
    symmetric_codes: bool = True
    narrow: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.width <= 16:
            raise FormatError(f"integers have 1 to 16 bits here, not {self.width}")
        if self.narrow and (self.width == 1 or not self.symmetric_codes):
            raise FormatError("a narrow range is of symmetric integers of 2 bits or more; leave narrow out")

    @property
    def name(self) -> str:
        return f"int{self.width}" + "-asym" * (not self.symmetric) + "-narrow" * self.narrow

    @property
    def bits(self) -> int:
        return self.width

    @property
    def symmetric(self) -> bool:
        return self.symmetric_codes

    @property
    def low(self) -> int:
        """The first code."""
        return int(self.narrow) - int(2 ** (self.width - 1))

    @property
    def high(self) -> int:
        """The last code."""
        return int(2 ** (self.width - 1)) - 1

    @property
    def top(self) -> float:
        return (self.high - self.low) / 2

    def levels(self) -> Tensor:
        return self.codes().float()

    def codes(self) -> Tensor:
        import torch

        return torch.arange(self.low, self.high + 1).to(self._stored)

    @property
    def _stored(self) -> torch.dtype:
        import torch

        return torch.int8 if self.width <= 8 else torch.int16

    def scale_of(self, low: Tensor, high: Tensor) -> Tensor:
        if self.symmetric:
            return super().scale_of(low, high)
        width = high.float().clamp_min(0) - low.float().clamp_max(0)
        return (width / (self.high - self.low)).clamp_min(SMALLEST_SCALE)

    def zero_of(self, low: Tensor, scale: Tensor) -> Tensor | None:
        if self.symmetric:
            return None
        return (self.low - low.float().clamp_max(0) / scale).round().clamp(self.low, self.high)

    def quantize(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        q = x.float() / scale
        if zero is not None:
            q = q + zero
        return q.round_().clamp_(self.low, self.high).to(self._stored)

    def dequantize(self, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        values = codes.float()
        if zero is not None:
            values = values - zero
        return values * scale

    def fake(self, x: Tensor, scale: Tensor | None = None, zero: Tensor | None = None) -> Tensor:
        if scale is None:
            return super().fake(x)
        q = x.float() / scale  # codes fit float32: the way over integers would be the same, and longer
        if zero is not None:
            q = (q + zero).round_().clamp_(self.low, self.high) - zero
        else:
            q = q.round_().clamp_(self.low, self.high)
        return (q * scale).to(x.dtype)


@dataclass(frozen=True)
class Float(Format):
    """A sign, ``exponent`` bits and ``mantissa`` bits, with subnormal numbers; to the nearest, ties to the
    even mantissa; beyond ``largest``, ``largest`` (infinities as well).

    Codes of the formats that torch has are of torch's own type; of others, bytes whose lower bits are sign,
    exponent and mantissa.
    """

    label: str
    exponent: int
    mantissa: int
    largest: float
    native: str | None = None

    @property
    def name(self) -> str:
        return self.label

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def top(self) -> float:
        return self.largest

    @property
    def bias(self) -> int:
        return int(2 ** (self.exponent - 1)) - 1

    def magnitudes(self) -> Tensor:
        """The numbers from zero to ``largest``: the n-th has the code n."""
        import torch

        fields = range(2 ** (self.exponent + self.mantissa))
        found = [self._magnitude(*divmod(field, 2**self.mantissa)) for field in fields]
        return torch.tensor([value for value in found if value <= self.largest])

    def _magnitude(self, exponent: int, mantissa: int) -> float:
        part = mantissa / 2**self.mantissa
        return math.ldexp(part + (exponent > 0), max(exponent, 1) - self.bias)

    def levels(self) -> Tensor:
        import torch

        positive = self.magnitudes()
        return torch.cat([-positive[1:].flip(0), positive])

    def codes(self) -> Tensor:
        import torch

        positive = torch.arange(len(self.magnitudes()), dtype=torch.uint8)
        both = torch.cat([positive, positive + 2 ** (self.bits - 1)])
        return both if self.native is None else both.view(getattr(torch, self.native))

    def rounded(self, y: Tensor) -> Tensor:
        """Float32 numbers to the format's nearest, at a scale of one."""
        import torch

        y = y.clamp(-self.largest, self.largest)
        _, power = torch.frexp(y)  # |y| < 2^power
        step = torch.ldexp(torch.ones_like(y), (power - 1).clamp_min(1 - self.bias) - self.mantissa)
        return (y / step).round_() * step

    def quantize(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        import torch

        y = x.float() / scale
        if self.native is not None:
            return y.clamp_(-self.largest, self.largest).to(getattr(torch, self.native))
        y = self.rounded(y)
        magnitudes = torch.searchsorted(self.magnitudes().to(y.device), y.abs())
        signed: Tensor = magnitudes + torch.signbit(y) * 2 ** (self.bits - 1)
        return signed.to(torch.uint8)

    def dequantize(self, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        if self.native is not None:
            return codes.float() * scale
        sign = 2 ** (self.bits - 1)
        number = codes.long()
        values = self.magnitudes().to(codes.device)[number & (sign - 1)]
        signed: Tensor = values * (1 - 2 * (number >= sign).float()) * scale
        return signed

    def fake(self, x: Tensor, scale: Tensor | None = None, zero: Tensor | None = None) -> Tensor:
        if scale is None or self.native is not None:
            return super().fake(x, scale)
        return (self.rounded(x.float() / scale) * scale).to(x.dtype)


E4M3 = Float("e4m3", 4, 3, 448.0, "float8_e4m3fn")
E5M2 = Float("e5m2", 5, 2, 57344.0, "float8_e5m2")
E2M1 = Float("e2m1", 2, 1, 6.0)
E2M3 = Float("e2m3", 2, 3, 7.5)
E3M2 = Float("e3m2", 3, 2, 28.0)
FLOATS = (E4M3, E5M2, E2M1, E2M3, E3M2)


@dataclass(frozen=True)
class Table(Format):
    """Any set of rising ``values``; codes are their places. To the nearest, ties to the lower one."""

    label: str
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.values) < 2 or any(a >= b for a, b in zip(self.values, self.values[1:], strict=False)):
            raise FormatError(f"{self.label}: a table's values are two or more, and rise")
        if len(self.values) > 1 << 16:
            raise FormatError(f"{self.label}: a table has at most {1 << 16} values, not {len(self.values)}")

    @property
    def name(self) -> str:
        return self.label

    @property
    def bits(self) -> int:
        return (len(self.values) - 1).bit_length()

    @property
    def top(self) -> float:
        return max(-self.values[0], self.values[-1])

    def levels(self) -> Tensor:
        import torch

        return torch.tensor(self.values)

    def codes(self) -> Tensor:
        import torch

        return torch.arange(len(self.values)).to(self._stored)

    @property
    def _stored(self) -> torch.dtype:
        import torch

        return torch.uint8 if len(self.values) <= 256 else torch.int32

    def quantize(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        import torch

        levels = self.levels().to(x.device)
        middles = (levels[1:].double() + levels[:-1].double()).div(2).float()
        return torch.bucketize((x.float() / scale).contiguous(), middles).to(self._stored)

    def dequantize(self, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        return self.levels().to(codes.device)[codes.long()] * scale


@cache
def integer(bits: int, symmetric: bool = True, narrow: bool = False) -> Integer:
    """Integers of ``bits`` bits. Raises FormatError."""
    return Integer(bits, symmetric, narrow)
