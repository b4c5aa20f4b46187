"""What making a variant will cost: memory, disk and time, from headers and a second of measuring.

What is made block by block (:mod:`quantize.make.streaming`) takes, beside the files, which are mapped:

    memory   libraries + one block at 16 bits + its widest group in float32 with working copies + second
             moments of one block (4 K² bytes per kind of input) + hidden states of all calibration tokens
             (on disk above 256 MB)
    time     start + 2 operations per weight and token at this machine's rate of bfloat16 matrix products
             + 2 K² per token and kind of input at its float32 rate + for every weight the search of its range
             and, with GPTQ, the walk over columns

The rates are measured when they are asked for (:mod:`quantize.make.rate`, half a second each). The times per
weight were measured on a model of 106 M weights on two cores of an AVX-512 CPU, and are scaled by the float32
rate; on an accelerator, columns take a few launches of kernels each. Expect a factor of two either way.

Transforms and AutoRound are llm-compressor's, whose times come from one small model on two cores without
bfloat16 arithmetic; others may differ by a factor of three, and AutoRound's is arithmetic alone.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from quantize.core.checkpoint import Checkpoint
from quantize.core.legality import is_experts
from quantize.core.methods import AUTOROUND_ITERATIONS, SMOOTH, parse_method
from quantize.core.modules import Modules
from quantize.core.schemes import BF16_BYTES
from quantize.make.blocks import BATCH_TOKENS, GPU_BATCH_TOKENS, MAPPED_BYTES, best_device
from quantize.make.rate import matmul_rate
from quantize.make.smooth import SAMPLED_TOKENS

LIBRARIES_BYTES = 540_000_000
"""Resident memory of torch, transformers and llm-compressor at work on a model of no size, measured."""
START_S = 12.0
MODULE_S = 0.05
COLUMN_S = 0.002
OPERATIONS_PER_S = 4e10
ROUND_PER_S = 1e8
"""Weights rounded per second, scales included."""
SPREAD = 3.0
STREAMED_SPREAD = 2.0
STREAMED_LIBRARIES_BYTES = 420_000_000
"""Resident memory of torch and transformers without llm-compressor."""
STREAMED_START_S = 6.0
WEIGHT_S, RANGE_S, WALK_S = 1e-7, 1.2e-7, 6e-7
"""Seconds of one core per weight: rounding and packing; a searched range; GPTQ's walk."""
SCALES_S = 1.2e-4
"""Seconds of one core per channel whose smoothing scale is looked for."""
CORE_RATE = 2e10
"""float32 operations per second of the core that those were measured on."""
LAUNCHES_S = 5e-5
"""Seconds of an accelerator per column of GPTQ, all rows together."""
AUTOROUND_TOKENS = AUTOROUND_ITERATIONS * 8 * 128
"""Tokens that AutoRound takes through a block: its batch is 8 rows of 128."""


class Cost(BaseModel):
    """An estimate; see the module's text for the model behind it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    tokens: int
    memory_bytes: int
    disk_bytes: int
    seconds: float
    seconds_range: tuple[float, float]


def estimate(checkpoint: Checkpoint, modules: Modules, tokens: int, longest: int, method: str) -> Cost:
    """Memory, disk and time of making one variant with ``tokens`` calibration tokens."""
    chosen = parse_method(method)
    if chosen.transforms in ((), (SMOOTH,)) and chosen.solver != "autoround":
        return _streamed(checkpoint, modules, tokens, longest, method)
    weights = sum(group.weights for group in modules)
    model = modules.other_bytes + BF16_BYTES * weights
    learns = chosen.solver == "autoround"
    hessians = chosen.solver == "gptq"
    if chosen.solver in ("rtn", "mse") and not chosen.transforms:
        tokens = 0
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
    active = sum(group.weights * _share(checkpoint, is_experts(group)) for group in modules)
    operations = 4.0 * active * tokens * (1 + len(chosen.transforms))
    if learns:
        operations += 6.0 * active * AUTOROUND_TOKENS  # forwards, and twice that backwards
    if hessians:
        operations += sum(2.0 * m.in_features**2 * tokens for m in modules.linears)
    seconds = START_S + MODULE_S * len(modules.linears) + operations / OPERATIONS_PER_S
    seconds += weights / ROUND_PER_S
    seconds += COLUMN_S * sum(m.in_features for m in modules.linears) if hessians else 0.0
    return Cost(
        method=method,
        tokens=tokens,
        memory_bytes=memory,
        disk_bytes=model,
        seconds=seconds,
        seconds_range=(seconds / SPREAD, seconds * SPREAD),
    )


def _streamed(checkpoint: Checkpoint, modules: Modules, tokens: int, longest: int, method: str) -> Cost:
    """The same of what is made block by block."""
    chosen = parse_method(method)
    device = best_device()
    on_cpu = device.type == "cpu"
    wide, narrow = matmul_rate("float32"), matmul_rate("bfloat16")
    weights = sum(group.weights for group in modules)
    walks = chosen.solver == "gptq"
    data = walks or chosen.observer == "imatrix_mse"
    smooth = SMOOTH in chosen.transforms
    tokens = tokens if data else min(tokens, SAMPLED_TOKENS) if smooth else 0
    hidden = int(checkpoint.text_config["hidden_size"])
    blocks: dict[int, int] = {}
    moments: dict[int, int] = {}
    for group in modules:
        blocks[group.layer] = blocks.get(group.layer, 0) + BF16_BYTES * group.weights
        kinds = len(group.members) if is_experts(group) else 1
        squares = 4 * kinds * max(m.in_features for m in group.members) ** 2
        moments[group.layer] = moments.get(group.layer, 0) + squares
    batch = min(tokens, BATCH_TOKENS if on_cpu else GPU_BATCH_TOKENS)
    inner = 4 * batch * max(m.out_features for m in modules.linears) * 4
    states = min(2 * tokens * hidden * BF16_BYTES, 2 * MAPPED_BYTES)
    widest = max(group.weights for group in modules)
    memory = STREAMED_LIBRARIES_BYTES + max(blocks.values()) + 4 * 4 * widest + states + inner
    memory += 3 * max(moments.values()) if walks else 0
    active = sum(group.weights * _share(checkpoint, is_experts(group)) for group in modules)
    seconds = STREAMED_START_S + 2.0 * active * tokens / narrow
    if walks:
        seconds += sum(2.0 * max(m.in_features for m in g.members) ** 2 * tokens for g in modules) / wide
    seconds += SCALES_S * sum(max(m.in_features for m in g.members) for g in modules) if smooth else 0.0
    per_weight = WEIGHT_S + (RANGE_S if chosen.observer != "memoryless_minmax" else 0.0)
    per_weight += WALK_S if walks and on_cpu else 0.0
    seconds += weights * per_weight * CORE_RATE / wide
    if walks and not on_cpu:
        seconds += LAUNCHES_S * sum(max(m.in_features for m in g.members) for g in modules)
    return Cost(
        method=method,
        tokens=tokens,
        memory_bytes=memory,
        disk_bytes=modules.other_bytes + BF16_BYTES * weights,
        seconds=seconds,
        seconds_range=(seconds / STREAMED_SPREAD, seconds * STREAMED_SPREAD),
    )


def _share(checkpoint: Checkpoint, experts: bool) -> float:
    """The share of a group's weights that a token passes through."""
    config = checkpoint.text_config
    of = config.get("num_experts") or config.get("num_local_experts")
    return float(config["num_experts_per_tok"]) / float(of) if experts and of else 1.0
