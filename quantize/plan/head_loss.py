"""What errors of a model's own head, at every choice, do to the likelihood of labels drawn from the model.

The part of :mod:`quantize.plan.backward` that lies behind the last block.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from quantize.core.dequantize import linear_weight
from quantize.core.modules import Group
from quantize.core.schemes import scheme
from quantize.make.blocks import Blocks
from quantize.make.parts import PartStore
from quantize.make.ranges import round_inputs
from quantize.make.streaming import Choice
from quantize.plan.sums import Sums

if TYPE_CHECKING:
    from torch import Tensor


class HeadLoss:
    """Watches the head while it computes, as a context; ``sums`` are of its group at its choices.

    Memory: the head in 32 bits, and its change at every choice.
    """

    def __init__(self, parts: PartStore, blocks: Blocks, group: Group, choices: Sequence[Choice]) -> None:
        (member,) = group.members
        self.sums = {(group.name, choice): Sums() for choice in choices}
        self._weight = blocks.head().float()
        self._changes = {}
        for choice in choices:
            stored = parts.tensors(parts.file(group.name, choice))
            quantized = linear_weight(stored, member.name, scheme(choice[0])).to(blocks.device)
            self._changes[group.name, choice] = quantized.sub_(self._weight)
        self._module: Any = blocks.model.get_output_embeddings()
        self._hooks: list[Any] = []
        self._products = dict.fromkeys(self.sums, 0.0)
        self._signals = dict.fromkeys(self.sums, 0.0)
        self._noises = dict.fromkeys(self.sums, 0.0)
        self.out: Tensor
        """What the head computed last, (1, tokens, vocabulary)."""

    def __enter__(self) -> HeadLoss:
        def seen(_module: Any, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            self._inputs, self.out = inputs[0].detach(), out

        self._hooks.append(self._module.register_forward_hook(seen))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def see(self, gradient: Tensor) -> None:
        """Some tokens of a sequence: the gradient of their labels with respect to ``out``."""
        x, slopes = self._inputs[0].float(), gradient[0].float()
        clean = x @ self._weight.T
        for key, change in self._changes.items():
            how = scheme(key[1][0]).activations
            rounded = round_inputs(x, how) if how is not None else x
            error = (rounded - x) @ self._weight.T if how is not None else 0.0
            error = rounded @ change.T + error
            self._products[key] += float((slopes * error).sum())
            self._noises[key] += float(error.square().sum())
            self._signals[key] += float(clean.square().sum())

    def finish(self, energies: bool) -> None:
        """The end of a sequence, whose tokens' errors act together; ``energies`` are kept of one draw."""
        for key, one in self.sums.items():
            one.add(
                self._products[key] ** 2,
                *((self._signals[key], self._noises[key]) if energies else (0.0, 0.0)),
            )
            self._products[key] = self._signals[key] = self._noises[key] = 0.0
