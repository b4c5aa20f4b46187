"""The second stage of quantization-aware training: the whole student at once is to say what the reference
says.

The loss is KL(reference || student) over the whole vocabulary, at every token of the text or from the one on
at which its answers begin, in thousandths of a nat, and, if asked for, the relative squared error of the last
hidden states. Of the reference nothing but these hidden states is kept, from one pass over the text with a
block in memory; its logits are made of them by the head, some tokens at a time. The student's blocks are all
in memory, with latent weights in 32 bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantize.core.modules import HEAD, Modules
from quantize.core.plan import Plan
from quantize.core.schemes import scheme
from quantize.core.tensors import Part
from quantize.make.ranges import round_inputs
from quantize.train.loop import Outcome, Place, Settings, train
from quantize.train.qat_blocks import LOSS_UNIT
from quantize.train.qat_passes import Passes, Sequences, real_rows
from quantize.train.qat_student import Cache, Seated, Student, attention_names, fixed_weight

HEAD_TOKENS = 256
"""Tokens whose logits are in memory at a time."""
Logits = Callable[[Tensor], Tensor]


class Distillation:
    """A student in all blocks of a model, and the reference's hidden states at some text."""

    def __init__(
        self, passes: Passes, modules: Modules, plan: Plan, tensors: Mapping[str, Part], student: Student
    ) -> None:
        self.passes, self.blocks = passes, passes.blocks
        self._stack = contextlib.ExitStack()
        for layer in range(len(self.blocks)):
            self._stack.enter_context(self.blocks.loaded(layer))
        layers = range(len(self.blocks))
        self.seat = self._stack.enter_context(Seated(student, self.blocks, layers, tensors))
        names = attention_names(modules)
        self._caches = [
            Cache(student, names[layer]) if student.cache else None for layer in range(len(self.blocks))
        ]
        head = next((group for group in modules if group.kind == HEAD), None)
        how = scheme(plan.groups[head.name]) if head is not None else None
        self._head = None
        if head is not None and how is not None and how.weights is not None:
            self._head = fixed_weight(tensors, head.members[0].name, how), how.activations

    def __enter__(self) -> Distillation:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def train(
        self,
        sequences: Sequences,
        wanted: Sequence[Tensor],
        settings: Settings,
        place: Place,
        hidden: float,
        evaluate: Callable[[int], Mapping[str, float]],
        starts: Sequence[int],
    ) -> Outcome:
        """Train the student on the tokens of ``sequences`` from ``starts`` on (1: all that can be predicted),
        at which the reference's last hidden states are ``wanted``.

        ``hidden`` is the weight of their relative error beside the KL."""

        def loss(_step: int, numbers: Sequence[int]) -> tuple[Tensor, float]:
            self.seat.put()
            total, tokens = torch.zeros(()), 0
            found = list(self._rows(sequences, numbers, wanted))
            with self.blocks.head_only() as logits_of:
                for rows, aim, of in found:
                    learned = torch.cat(
                        [torch.arange(1, len(sequences[number])) >= starts[number] for number in of]
                    )
                    rows, aim = rows[learned], aim[learned]
                    total = total + self._divergence(rows, aim, logits_of)
                    if hidden:
                        error = (rows - aim).square().sum(-1) / aim.square().sum(-1).clamp_min(1e-12)
                        total = total + hidden * error.sum()
                    tokens += len(aim)
            return total * LOSS_UNIT, tokens

        student = self.seat.student
        return train(
            student.trained(), loss, len(sequences), settings, place, evaluate, student.rates(), "distil"
        )

    def predictions(
        self, sequences: Sequences, wanted: Sequence[Tensor], starts: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The student's and the reference's logits (tokens, vocabulary), sequence by sequence in order; of
        the predictions of the tokens from ``starts`` on."""
        with torch.no_grad():
            self.seat.put()
            found: dict[int, tuple[Tensor, Tensor]] = {}
            for at in range(0, len(sequences), 16):
                numbers = list(range(at, min(at + 16, len(sequences))))
                found.clear()
                for rows, aim, of in self._rows(sequences, numbers, wanted):
                    sizes = [len(sequences[number]) - 1 for number in of]
                    pairs = zip(torch.split(rows, sizes), torch.split(aim, sizes), strict=True)
                    found |= dict(zip(of, pairs, strict=True))
                for number in numbers:
                    first = (starts[number] if starts is not None else 1) - 1
                    with self.blocks.head_only() as logits_of:
                        mine, theirs = (part[first:] for part in found[number])
                        reference = logits_of(theirs.unsqueeze(0))[0].float()
                        with self._own_head():
                            yield logits_of(mine.unsqueeze(0))[0].float(), reference

    def _rows(
        self, sequences: Sequences, numbers: Sequence[int], wanted: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
        """The student's and the reference's last hidden states (tokens, hidden) that predict a token,
        float32, and of which sequences they are."""
        batches = self.passes.batches(sequences, numbers, None)
        for batch in batches:
            rows = batch.hidden
            for layer in range(len(self.blocks)):
                rows = self.passes.through(layer, batch, rows, self._caches[layer])
            batch.lengths = [
                length - 1 for length in batch.lengths
            ]  # the last one predicts nothing that is there
            aim = torch.cat([wanted[number][:-1] for number in batch.numbers])
            yield real_rows(batch, rows).float(), aim.float(), batch.numbers

    def _divergence(self, rows: Tensor, aim: Tensor, logits_of: Logits) -> Tensor:
        """The sum of KL over tokens, whose gradient reaches ``rows``; logits are made some tokens at a
        time."""
        total, slopes = 0.0, []
        for at in range(0, len(rows), HEAD_TOKENS):
            with torch.no_grad():
                p = torch.log_softmax(logits_of(aim[at : at + HEAD_TOKENS].unsqueeze(0))[0].float(), -1)
            part = rows[at : at + HEAD_TOKENS].detach().requires_grad_()
            with torch.enable_grad(), self._own_head():
                q = torch.log_softmax(logits_of(part.unsqueeze(0))[0].float(), -1)
                value = (p.exp() * (p - q)).sum()
            slopes.append(torch.autograd.grad(value, part)[0])
            total += float(value.detach())
        linear = (rows * torch.cat(slopes)).sum()
        return linear + (total - linear.detach())

    @contextlib.contextmanager
    def _own_head(self) -> Iterator[None]:
        """The head is the student's, where the plan quantizes it."""
        if self._head is None:
            yield
            return
        weight, inputs = self._head
        module: Any = self.blocks.model.get_output_embeddings()
        before = module.weight

        def rounding(_module: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            assert inputs is not None
            return (given[0] + (round_inputs(given[0], inputs) - given[0]).detach(), *given[1:])

        hook = module.register_forward_pre_hook(rounding) if inputs is not None else None
        module.weight = torch.nn.Parameter(weight.to(before), requires_grad=False)
        try:
            yield
        finally:
            module.weight = before
            if hook is not None:
                hook.remove()
