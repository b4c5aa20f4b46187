"""Blocks that write a massive activation: one token's residual, thousands of times as large as any other's.

In many models attention rests on the first token, and one early block gives it such a residual
(arXiv:2402.17762). Rounding the inputs of that block's down projection to 8 bits is off by as much as all
else that the token holds, and blocks behind it read that token's keys and values: on a model of 30 layers
this one projection made more than half of what 8 bits lose.
"""

from __future__ import annotations

import sys
from collections.abc import Container, Sequence

from tqdm import tqdm

from quantize.core.checkpoint import Checkpoint
from quantize.core.modules import Modules
from quantize.core.plan import Plan
from quantize.core.schemes import scheme
from quantize.make.blocks import Blocks
from quantize.make.smooth import DOWN

GROWTH = 1000.0
"""What a block adds to a token's residual, over the median of what tokens have after it, both squared."""
TOKENS = 64
"""Of one sequence, that are looked at: it is the first one or two that grow, whatever the text."""


def massive_blocks(checkpoint: Checkpoint, modules: Modules, sequence: Sequence[int]) -> dict[int, float]:
    """By how much the residual of a token grows, of the blocks in which one does beyond ``GROWTH``.

    ``sequence`` are token ids as the model is given them. One pass, with one block in memory.
    """
    blocks = Blocks(checkpoint, modules)
    states = blocks.start([sequence[:TOKENS]])
    found = {}
    for layer in tqdm(range(len(blocks)), desc="outliers", unit="block", file=sys.stderr, delay=2):
        before = states.batches[0].hidden[0].float()
        with blocks.loaded(layer):
            blocks.forward(layer, states)
        after = states.batches[0].hidden[0].float()
        usual = float(after.square().sum(-1).median())
        growth = float((after - before).square().sum(-1).max()) / max(usual, 1e-30)
        if growth > GROWTH:
            found[layer] = growth
    return found


def rounds_inputs(plan: Plan) -> bool:
    """Whether a plan has groups whose inputs become 8-bit integers."""
    inputs = (scheme(name).activations for name in set(plan.groups.values()))
    return any(one is not None and one.kind == "int" for one in inputs)


def spared(plan: Plan, modules: Modules, layers: Container[int]) -> Plan:
    """The plan with those blocks' down projections in 16 bits where their inputs would become integers."""
    groups = dict(plan.groups)
    for group in modules:
        inputs = scheme(groups[group.name]).activations
        if group.layer in layers and group.kind == DOWN and inputs is not None and inputs.kind == "int":
            groups[group.name] = "bf16"
    return plan.model_copy(update={"groups": groups})
