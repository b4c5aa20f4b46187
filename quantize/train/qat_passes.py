"""Passes of single sequences through blocks, for quantization-aware training: hidden states are kept per
sequence, so that a step can take any of them together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from quantize.make.blocks import BATCH_TOKENS, Batch, Blocks, batched
from quantize.train.qat_student import Cache

Sequences = Sequence[Sequence[int]]


class Passes:
    """A model's blocks, and the arithmetic in which they compute: float32, or bfloat16 matrix products."""

    def __init__(self, blocks: Blocks, narrow: bool) -> None:
        self.blocks, self.narrow = blocks, narrow

    @contextlib.contextmanager
    def arithmetic(self) -> Iterator[None]:
        with torch.autocast(self.blocks.device.type, torch.bfloat16, enabled=self.narrow):
            yield

    def batches(
        self, sequences: Sequences, numbers: Sequence[int], states: Sequence[Tensor] | None
    ) -> list[Batch]:
        """The sequences of those ``numbers``, padded together; ``batch.numbers`` are among them. ``states``
        are hidden states (tokens, hidden) by number, without them those before the first block."""
        found = self.blocks.start([sequences[number] for number in numbers]).batches
        for batch in found:
            batch.numbers = [numbers[place] for place in batch.numbers]
            if states is not None:
                batch.hidden = torch.zeros_like(batch.hidden, dtype=states[batch.numbers[0]].dtype)
                for line, number in enumerate(batch.numbers):
                    batch.hidden[line, : batch.lengths[line]] = states[number]
        return found

    def through(self, layer: int, batch: Batch, hidden: Tensor, cache: Cache | None = None) -> Tensor:
        """One batch through a loaded block."""
        with self.arithmetic():
            return self.blocks.through(layer, batch, hidden, cache)

    def all_through(
        self, layer: int, sequences: Sequences, states: Sequence[Tensor] | None, cache: Cache | None = None
    ) -> list[Tensor]:
        """Hidden states of all sequences after a loaded block, without gradients."""
        found: dict[int, Tensor] = {}
        with torch.no_grad():
            for numbers in batched(list(map(len, sequences)), BATCH_TOKENS):
                for batch in self.batches(sequences, numbers, states):
                    out = self.through(layer, batch, batch.hidden, cache)
                    for line, number in enumerate(batch.numbers):
                        found[number] = out[line, : batch.lengths[line]].clone()
        return [found[number] for number in range(len(sequences))]

    def last(self, sequences: Sequences, label: str) -> list[Tensor]:
        """Hidden states after the last block of the model as it is, a block in memory at a time."""
        states: list[Tensor] | None = None
        for layer in tqdm(range(len(self.blocks)), desc=label, unit="block", delay=2):
            with self.blocks.loaded(layer):
                states = self.all_through(layer, sequences, states)
        assert states is not None
        return states


def real_rows(batch: Batch, rows: Tensor) -> Tensor:
    """(sequences, tokens, hidden) without padding, as (tokens, hidden), sequence by sequence."""
    found: Any = [rows[line, : batch.lengths[line]] for line in range(len(batch.lengths))]
    return torch.cat(found)
