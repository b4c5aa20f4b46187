"""What training takes of memory, beside the program itself, before any of it is taken.

A prediction from shapes: what the base is kept in, what is trained with its gradients and AdamW's two
moments, what a forward pass keeps for the backward pass, logits, and temporary copies. It is compared with
what was measured in ``docs/benchmarks/training.md``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from quantize.core.checkpoint import Checkpoint
from quantize.core.modules import Modules
from quantize.train.adapters import Lora
from quantize.train.base import Method
from quantize.train.loop import TrainError
from quantize.train.nf4 import BITS

MARGIN = 1.15
"""What allocators keep beside what is asked of them."""
ADAPTED = 1.5
"""Times the activations of a model with adapters, as measured (docs/benchmarks/training.md)."""
GB = 1e9


@dataclass(frozen=True)
class Need:
    """Bytes by what they are for."""

    base: int
    trained: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    temporary: int

    @property
    def total(self) -> int:
        """At once: the optimizer's temporary copies and what is kept for the backward pass are not."""
        always = self.base + self.trained + self.gradients + self.optimizer
        return int(MARGIN * (always + max(self.activations + self.logits, self.temporary)))

    def text(self) -> str:
        parts = ((one.name, getattr(self, one.name)) for one in fields(self))
        return ", ".join(f"{name} {size / GB:.2f}" for name, size in parts if size)


@dataclass(frozen=True)
class Shape:
    """Of a portion that goes through the model at once."""

    examples: int
    tokens: int
    """Of the longest."""
    places: int
    """Whose logits are computed, of each."""
    checkpointing: bool
    """Whether a block's values are computed again in the backward pass instead of being kept."""


def predict(
    checkpoint: Checkpoint, modules: Modules, method: Method, lora: Lora, shape: Shape, width: int
) -> Need:
    """``width`` is the bytes of a number that is computed with."""
    linears = sum(linear.weights for linear in modules.linears)
    other = (modules.other_bytes) // 2
    largest = max(linear.weights for linear in modules.linears)
    embedding = modules.embedding_bytes // 2
    if method == "full":
        base, trained = 0, linears + other
        copies = 3 * 4 * max(embedding, largest)
    else:
        stored = linears * BITS / 8 if method == "qlora" else linears * width
        base, trained = int(stored + other * width), lora.parameters(modules)
        # Looked up in 32 bits: indices, values, and the values in the type that is computed with.
        copies = largest * (2 + 4 + width) if method == "qlora" else 2 * largest * width
    kept = _activations(checkpoint.text_config, modules, lora if method != "full" else None, shape)
    logits = 4 * 4 * shape.examples * shape.places * int(checkpoint.text_config["vocab_size"])
    return Need(
        base=base,
        trained=4 * trained,
        gradients=4 * trained,
        optimizer=8 * trained,
        activations=int(kept * width * (1 if method == "full" else ADAPTED)),
        logits=logits,
        temporary=int(copies),
    )


def _activations(config: dict[str, Any], modules: Modules, lora: Lora | None, shape: Shape) -> int:
    """Numbers that are kept for the backward pass."""
    tokens = shape.examples * shape.tokens
    hidden, layers = int(config["hidden_size"]), modules.layers
    first = [linear for group in modules if group.layer == 0 for linear in group.members]
    outputs = sum(linear.out_features for linear in first)
    inputs = sum(linear.in_features for linear in first)
    block = 6 * hidden + 2 * outputs
    if lora is not None:
        block += lora.rank * len(first) + (2 * inputs if lora.dropout else 0)
    kept = layers * hidden + block if shape.checkpointing else layers * block
    return tokens * (kept + 4 * hidden)


def refuse_beyond(need: Need, budget: float | None, advice: str) -> None:
    """Raise TrainError where more is needed than ``budget`` GB, with the numbers."""
    if budget is not None and need.total > budget * GB:
        raise TrainError(
            f"--memory {budget:g}: {need.total / GB:.2f} GB are needed beside the program itself "
            f"({need.text()}, and {MARGIN - 1:.0%} more); {advice}"
        )
