"""The first stage of quantization-aware training: block by block, so that each says again what the block of
the reference says (arXiv:2407.11062, block-wise training of all parameters).

A block is given what the trained blocks before it made of the calibration text, and is to come out with what
the reference has there: so it mends what they lost as well. Beside the model one block is in memory, with its
gradients. The error of a token is relative to its size, for a token that attention rests on is a thousand
times as large.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantize.core.modules import Modules
from quantize.core.plan import Plan
from quantize.core.tensors import Part
from quantize.train.loop import Place, Settings, train
from quantize.train.qat_passes import Passes, Sequences, real_rows
from quantize.train.qat_student import Cache, Original, Seated, Student, attention_names, begin

LOSS_UNIT = 1000.0
"""Losses are in thousandths."""


@dataclass(frozen=True)
class BlockFigures:
    """Of one block: the mean relative squared error of what comes out of it, in thousandths, before and
    after."""

    layer: int
    before: float
    after: float


def reconstruct(
    passes: Passes,
    modules: Modules,
    plan: Plan,
    tensors: Mapping[str, Part],
    original: Original,
    sequences: Sequences,
    settings: Settings | None,
    saturating: bool,
    place: Place,
) -> tuple[Student, list[BlockFigures]]:
    """Train every block's weights, step sizes and norms; the student, and what it took off.

    ``tensors`` are of the checkpoint that is begun with. Without ``settings`` nothing is trained: the student
    is as it begins. A block that was finished before is taken over from ``place``, as is one that was left
    half done.
    """
    blocks, attention = passes.blocks, attention_names(modules)
    student, figures = Student(), list[BlockFigures]()
    reference: list[Tensor] | None = None
    trained: list[Tensor] | None = None
    for layer in range(len(blocks)):
        groups = [group for group in modules if group.layer == layer]
        with blocks.loaded(layer) as block:
            norms = norm_names(blocks.model, block)
            mine = begin(tensors, groups, plan, norms, original, saturating, blocks.device)
            student.add(mine)
            if settings is None:
                continue
            reference = passes.all_through(layer, sequences, reference)
            with Seated(mine, blocks, [layer], tensors) as seat:
                cache = Cache(mine, attention[layer]) if mine.cache else None
                work = _Block(passes, layer, seat, sequences, trained, reference, cache)
                if mine.weights:
                    each = replace(settings, seed=settings.seed + layer)
                    at = Place(place.directory / f"block-{layer}", place.run)
                    label = f"block {layer + 1}/{len(blocks)}"
                    outcome = train(
                        mine.trained(), work.loss, len(sequences), each, at, work.figures, mine.rates(), label
                    )
                    first, last = outcome.evaluations[0], outcome.evaluations[-1]
                    figures.append(BlockFigures(layer, first.figures["error"], last.figures["error"]))
                with torch.no_grad():
                    seat.put()
                trained = passes.all_through(layer, sequences, trained, cache)
    return student, figures


class _Block:
    """What one block's training asks: its loss on some sequences, and on a few that are always the same."""

    def __init__(
        self,
        passes: Passes,
        layer: int,
        seat: Seated,
        sequences: Sequences,
        states: Sequence[Tensor] | None,
        wanted: Sequence[Tensor],
        cache: Cache | None,
    ) -> None:
        self.passes, self.layer, self.seat, self.cache = passes, layer, seat, cache
        self.sequences, self.states, self.wanted = sequences, states, wanted

    def loss(self, _step: int, numbers: Sequence[int]) -> tuple[Tensor, float]:
        self.seat.put()
        total, tokens = torch.zeros(()), 0
        for batch in self.passes.batches(self.sequences, numbers, self.states):
            out = real_rows(batch, self.passes.through(self.layer, batch, batch.hidden, self.cache))
            aim = torch.cat([self.wanted[number] for number in batch.numbers]).float()
            error = (out.float() - aim).square().sum(-1) / aim.square().sum(-1).clamp_min(1e-12)
            total, tokens = total + error.sum(), tokens + len(aim)
        return total * LOSS_UNIT, tokens

    def figures(self, _step: int) -> Mapping[str, float]:
        with torch.no_grad():
            some = range(0, len(self.sequences), max(1, len(self.sequences) // 32))
            total, tokens = self.loss(0, list(some))
        return {"error": float(total) / max(1, tokens)}


def norm_names(model: Any, block: Any) -> list[str]:
    """Norm modules of a block: those with a vector of weights, by their names in the model."""
    inside = {id(module) for module in block.modules()}
    found = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if id(module) in inside and weight is not None and weight.ndim == 1:
            found.append(name)
    return found
