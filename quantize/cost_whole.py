"""What llm-compressor takes for a variant: transforms other than ``smooth``, and AutoRound.

Its times come from one small model on two cores without bfloat16 arithmetic; others may differ by a factor of
three, and AutoRound's is arithmetic alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from quantize.core.checkpoint import Checkpoint
from quantize.core.cost import Cost, active_weights
from quantize.core.methods import AUTOROUND_ITERATIONS, parse_method
from quantize.core.modules import Modules
from quantize.core.plan import Plan
from quantize.core.schemes import BF16_BYTES

LIBRARIES_BYTES = 540_000_000
"""Resident memory of torch, transformers and llm-compressor at work on a model of no size, measured."""
START_S = 12.0
MODULE_S = 0.05
COLUMN_S = 0.002
OPERATIONS_PER_S = 4e10
ROUND_PER_S = 1e8
"""Weights rounded per second, scales included."""
SPREAD = 3.0
AUTOROUND_TOKENS = AUTOROUND_ITERATIONS * 8 * 128
"""Tokens that AutoRound takes through a block: its batch is 8 rows of 128."""


def estimate_whole(checkpoint: Checkpoint, modules: Modules, plan: Plan, lengths: Sequence[int]) -> Cost:
    """Memory, disk and time of making the variant of ``plan`` with calibration sequences of those lengths."""
    chosen = parse_method(plan.method)
    tokens, longest = sum(lengths), max(lengths, default=0)
    weights = sum(group.weights for group in modules)
    model = modules.other_bytes + BF16_BYTES * weights
    hessians = chosen.solver == "gptq"
    hidden = int(checkpoint.text_config["hidden_size"])
    widest = max(group.weights for group in modules)
    states = 2 * tokens * hidden * BF16_BYTES + longest * max(m.out_features for m in modules.linears) * 16
    by_layer: dict[int, int] = {}
    for group in modules:
        squares = sum(4 * member.in_features**2 for member in group.members)
        by_layer[group.layer] = by_layer.get(group.layer, 0) + squares
    biggest = max(max(m.weights, m.in_features**2) for m in modules.linears)
    working = 3 * 4 * biggest if hessians else 4 * widest
    memory = LIBRARIES_BYTES + model + states + working + (max(by_layer.values()) if hessians else 0)
    active = active_weights(checkpoint, modules)
    operations = 4.0 * active * tokens * (1 + len(chosen.transforms))
    if chosen.solver == "autoround":
        operations += 6.0 * active * AUTOROUND_TOKENS  # forwards, and twice that backwards
    if hessians:
        operations += sum(2.0 * m.in_features**2 * tokens for m in modules.linears)
    seconds = START_S + MODULE_S * len(modules.linears) + operations / OPERATIONS_PER_S
    seconds += weights / ROUND_PER_S
    seconds += COLUMN_S * sum(m.in_features for m in modules.linears) if hessians else 0.0
    return Cost(
        what=f"{plan.describe()} by {plan.method}",
        tokens=tokens,
        memory_bytes=memory,
        mapped_bytes=0,
        disk_bytes=plan.weight_bytes(modules),
        seconds=seconds,
        seconds_range=(seconds / SPREAD, seconds * SPREAD),
    )
