"""What training takes: weights, gradients, the optimizer's state and activations, in bytes. No torch.

    weights      of the base at 16 bits; of QLoRA its matrices in NF4 with double quantization, the rest at 16
    gradients    of what is trained, and the optimizer's state: bytes a parameter, by optimizer
    activations  what the backward pass needs of a micro-batch of tokens (:func:`activation_bytes`)

What the process takes besides (libraries, a GPU's context) is whoever's who places it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantize.core.schemes import BF16_BYTES
from quantize.core.shape import Shape

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Of a weight: 4 bits, an 8-bit scale per 64 and a 32-bit one per 256 of those (arXiv:2305.14314)."""
RANK = 16
"""Of adapters, on all linear modules of the blocks."""
SEQUENCES, LENGTH = 4, 1024
"""Of a micro-batch: sequences, and tokens of each."""


@dataclass(frozen=True)
class Optimizer:
    """Bytes that a trained parameter takes: itself, its gradient, and the optimizer's state of it."""

    name: str
    weight: int
    gradient: int
    state: int
    what: str

    @property
    def bytes(self) -> int:
        return self.weight + self.gradient + self.state


OPTIMIZERS: Mapping[str, Optimizer] = {
    one.name: one
    for one in (
        Optimizer(
            "adamw", 2, 2, 12, "AdamW in mixed precision: BF16 weights and gradients, FP32 master and moments"
        ),
        Optimizer("adamw-bf16", 2, 2, 4, "AdamW all in BF16"),
        Optimizer("adamw-8bit", 2, 2, 2, "AdamW with 8-bit moments, BF16 weights and gradients"),
        Optimizer("sgd", 2, 2, 0, "SGD without momentum, BF16"),
    )
}
ADAPTERS = Optimizer("adapters", 4, 4, 8, "AdamW in FP32")
"""What LoRA's own parameters are trained with."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one way to train, without the process itself."""

    way: str
    what: str
    trained: int
    """Parameters that change."""
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def activation_bytes(shape: Shape, tokens: int) -> int:
    """Of a micro-batch of ``tokens`` in BF16, with gradient checkpointing and no matrix of attention scores
    kept: the input of every block; inside one block what its modules take and give; logits in 32 bits, their
    gradient and two copies."""
    heads = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    inside = 5 * shape.hidden + 2 * heads + 4 * shape.inner
    kept = shape.layers * shape.hidden
    logits = shape.vocabulary * 4 * 4
    return tokens * (BF16_BYTES * (kept + inside) + logits)


def adapter_parameters(shape: Shape, rank: int = RANK) -> int:
    """Of LoRA on every linear module of the blocks: rank x (inputs + outputs) each (arXiv:2106.09685)."""
    return sum(rank * (one.in_features + one.out_features) for one in shape.modules.linears)


def full_memory(shape: Shape, optimizer: str = "adamw", tokens: int = SEQUENCES * LENGTH) -> TrainingMemory:
    """Every parameter trained."""
    how, count = OPTIMIZERS[optimizer], shape.parameters
    return TrainingMemory(
        way="full" if optimizer == "adamw" else f"full, {optimizer}",
        what=how.what,
        trained=count,
        weights=how.weight * count,
        gradients=how.gradient * count,
        optimizer=how.state * count,
        activations=activation_bytes(shape, tokens),
    )


def lora_memory(
    shape: Shape, rank: int = RANK, tokens: int = SEQUENCES * LENGTH, quantized: bool = False
) -> TrainingMemory:
    """Adapters on a frozen base at 16 bits, or with ``quantized`` in NF4 (QLoRA)."""
    count = adapter_parameters(shape, rank)
    base = round(shape.weights * NF4_BITS / 8) if quantized else BF16_BYTES * shape.weights
    widest = max(one.weights for one in shape.modules.linears)
    return TrainingMemory(
        way="QLoRA" if quantized else "LoRA",
        what=f"rank {rank}, base in {'NF4' if quantized else 'BF16'}, adapters by {ADAPTERS.what}",
        trained=count,
        weights=shape.modules.other_bytes + base + ADAPTERS.weight * count,
        gradients=ADAPTERS.gradient * count,
        optimizer=ADAPTERS.state * count,
        # A matrix in NF4 is turned back to 16 bits while it computes.
        activations=activation_bytes(shape, tokens) + (BF16_BYTES * widest if quantized else 0),
    )
