"""Over what one scale spans: a tensor, a channel, a group of inputs, one number.

A channel is a row along the last axis: an output of an (N, K) weight, a token of (…, K) inputs. A tensor's
numbers are laid out as ranges (…, ranges, size) of which each has one scale; a last group that is not full is
filled with zeros, which are in every range.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from quantize.numerics.formats import FormatError

if TYPE_CHECKING:
    from torch import Tensor

Span = Literal["tensor", "channel", "group", "element"]


@dataclass(frozen=True)
class Granularity:
    """``size`` is of groups alone: inputs along the last axis that share a scale."""

    span: Span = "tensor"
    size: int = 0

    def __post_init__(self) -> None:
        if (self.span == "group") != (self.size > 0):
            raise FormatError(
                f"groups, and nothing else, have a size of 1 or more; got {self.span}, {self.size}"
            )

    @property
    def name(self) -> str:
        return f"g{self.size}" if self.span == "group" else self.span

    def ranges(self, x: Tensor) -> Tensor:
        """``x`` as (…, ranges, size)."""
        import torch

        match self.span:
            case "tensor":
                return x.reshape(1, -1)
            case "channel":
                return x.unsqueeze(-2)
            case "element":
                return x.unsqueeze(-1)
        groups = -(-x.shape[-1] // self.size)
        padded = torch.nn.functional.pad(x, (0, groups * self.size - x.shape[-1]))
        return padded.reshape(*x.shape[:-1], groups, self.size)

    def spread(self, scale: Tensor, x: Tensor) -> Tensor:
        """Scales (…, ranges) so that they broadcast with ``x``."""
        if self.span == "group":
            return scale.repeat_interleave(self.size, -1)[..., : x.shape[-1]]
        return scale

    def count(self, shape: tuple[int, ...]) -> int:
        """Scales of a tensor of that shape."""
        total = 1
        for size in shape[:-1]:
            total *= size
        match self.span:
            case "tensor":
                return 1
            case "channel":
                return total
            case "element":
                return total * shape[-1]
        return total * -(-shape[-1] // self.size)


PER_TENSOR, PER_CHANNEL, PER_ELEMENT = Granularity("tensor"), Granularity("channel"), Granularity("element")
_GROUP = re.compile(r"g([1-9]\d*)")


def granularity(name: str) -> Granularity:
    """``tensor``, ``channel``, ``element``, or ``g128`` for groups of that size. Raises FormatError."""
    for known in (PER_TENSOR, PER_CHANNEL, PER_ELEMENT):
        if known.span == name:
            return known
    if (found := _GROUP.fullmatch(name)) is None:
        raise FormatError(
            f"unknown granularity {name!r}; known: tensor, channel, element, and groups such as g128"
        )
    return Granularity("group", int(found[1]))
