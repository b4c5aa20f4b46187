"""What making variants and finding plans will cost: memory, disk and time, from headers and a second of
measuring.

Times are of this machine with all cores idle. Two rates are measured when they are asked for, in time of a
core's own, so that others who want it do not count (:mod:`quantize.make.rate`): of matrix products in
bfloat16 and in float32. What is made block by block (:mod:`quantize.make.streaming`) takes:

    start    libraries are imported, files compared with what the model needs, hashed, and written
    pass     2 operations per weight and calibration token, in bfloat16, and what goes on between products
    moments  2 K² per token and kind of input; the factor of GPTQ 4/3 K³
    scales   of smoothing: steps times sampled rows of inputs and weights
    in order (gptaq) a pass of two states, three where nothing of it is kept (:mod:`quantize.make.halting`),
             and moments twice; of the correction, factors and products (:mod:`quantize.make.asymmetric`)
    parts    per weight and choice: rounding; 20 steps of a search for ranges; GPTQ's K operations and walk

Times per number were measured on a model of 106 M weights on two cores of an AVX-512 CPU, and go by the
float32 rate; on an accelerator, columns take a few launches of kernels each. The whole is right within a
factor of two where it was compared: 135 M parameters on that CPU (docs/benchmarks/quantization.md).

    memory   libraries + one block at 16 bits + its widest group in float32 with working copies + second
             moments of one block (4 K² bytes per kind of input) + hidden states of all calibration tokens
             (on disk above 256 MB); and pages of the model's files, which the system may drop. Of experts,
             whose matrices are worked on one input at a time, working copies are of one input's
    disk     the variant, and the parts that it is put together from

Finding a plan is :mod:`quantize.plan.cost`'s. Transforms other than ``smooth`` and AutoRound are
llm-compressor's (:mod:`quantize.cost_whole`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from quantize.core.checkpoint import Checkpoint
from quantize.core.cost import Cost, active_weights
from quantize.core.legality import is_experts
from quantize.core.methods import parse_method
from quantize.core.modules import Group, Modules
from quantize.core.plan import Plan
from quantize.core.resources import MOST_APART_BYTES
from quantize.core.schemes import BF16_BYTES, scheme
from quantize.cost_whole import estimate_whole
from quantize.make.asymmetric import SOLVED, SOLVED_PRODUCTS, STATES
from quantize.make.blocks import BATCH_TOKENS, GPU_BATCH_TOKENS, MAPPED_BYTES
from quantize.make.halting import ANEW, held_bytes, kept_bytes
from quantize.make.rate import Rates, machine_rates
from quantize.make.smooth import ROWS, SAMPLED_TOKENS, STEPS, WEIGHT_ROWS, smoothable
from quantize.make.statistics import first_of
from quantize.make.streaming import Choice, needs_data, smoothed, streams

LIBRARIES_BYTES = 450_000_000
"""Resident memory of torch and transformers at work on a model of no size, measured."""
START_S = 10.0
"""Until libraries are imported: 5 where byte code is kept, 14 where it is not."""
FILE_S = 4e-9
"""Per byte of the model at 16 bits: compared, hashed, written."""
CORE_RATE = 9e10
"""float32 operations per second of the core that these were measured on."""
PASS = 2.0
"""Time of a block over that of its products of weights and inputs."""
SCALE_S = 2e-9
"""Per step, row and channel of the search for smoothing scales."""
ROUND_S, SEARCH_S, WALK_S = 3e-8, 3e-9, 1.2e-7
"""Per weight: rounding and packing; a step of the search for a range; GPTQ's walk over columns."""
SEARCH_STEPS = 20
LAUNCHES_S = 5e-5
"""Of an accelerator, per column of GPTQ, all rows together."""
TOGETHER = 0.8
"""Share of the cores that work side by side keeps busy."""
SPREAD = 2.0


@dataclass
class Work:
    """Seconds of cores: of one after another, and of all side by side."""

    alone: float = 0.0
    together: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)

    def seconds(self, rates: Rates) -> float:
        """As a clock has them, with all cores idle."""
        return self.alone + self.together / max(1.0, TOGETHER * rates.cores)


def estimate(
    checkpoint: Checkpoint,
    modules: Modules,
    plan: Plan,
    lengths: Sequence[int],
    rates: Rates | None = None,
) -> Cost:
    """Memory, disk and time of making the variant of ``plan`` with calibration sequences of those lengths."""
    choices = {group.name: [_choice(plan, group.name)] for group in modules}
    if not all(streams(choice) for many in choices.values() for choice in many):
        return estimate_whole(checkpoint, modules, plan, lengths)
    rates = rates or machine_rates()
    model = modules.other_bytes + BF16_BYTES * _weights(modules)
    work = making(checkpoint, modules, choices, lengths, rates)
    work.alone += START_S + FILE_S * model
    tokens = pass_tokens(choices, lengths)
    return Cost(
        what=f"{plan.describe()} by {plan.method}",
        tokens=tokens,
        memory_bytes=making_memory(checkpoint, modules, choices, tokens, rates),
        mapped_bytes=model,
        disk_bytes=2 * plan.weight_bytes(modules),
        seconds=work.seconds(rates),
        seconds_range=(work.seconds(rates) / SPREAD, work.seconds(rates) * SPREAD),
    )


def _choice(plan: Plan, group: str) -> Choice:
    return plan.groups[group], plan.method_of(group)


def _weights(modules: Modules) -> int:
    return sum(group.weights for group in modules)


def pass_tokens(choices: Mapping[str, Sequence[Choice]], lengths: Sequence[int]) -> int:
    """Calibration tokens that go through the model to make ``choices``."""
    everything = list(chain.from_iterable(choices.values()))
    if any(map(needs_data, everything)):
        return sum(lengths)
    return min(sum(lengths), SAMPLED_TOKENS) if any(map(smoothed, everything)) else 0


def making(
    checkpoint: Checkpoint,
    modules: Modules,
    choices: Mapping[str, Sequence[Choice]],
    lengths: Sequence[int],
    rates: Rates,
) -> Work:
    """What making the parts takes, all in one pass."""
    tokens = pass_tokens(choices, lengths)
    passes = 1.0
    if _in_order(choices):
        whole = tokens * _kept(checkpoint, modules)
        held = min(whole, held_bytes(rates.accelerator)) / max(1, whole)
        passes = STATES * (held + ANEW * (1 - held))
    work = Work(together=passes * PASS * 2.0 * active_weights(checkpoint, modules) * tokens / rates.narrow)
    slower = CORE_RATE / rates.wide
    for group in modules:
        many = [(scheme(name), parse_method(method)) for name, method in choices[group.name]]
        quantized = [method for how, method in many if how.weights is not None]
        widest = max(member.in_features for member in group.members)
        walks = sum(method.by_columns for method in quantized)
        if walks:
            corrected = any(method.asymmetric for method in quantized)
            work.together += ((1 + corrected) * 2.0 * widest**2 * tokens + 4 / 3 * widest**3) / rates.wide
            if corrected:
                solved = SOLVED * widest**3 / 3 + SOLVED_PRODUCTS * group.weights * widest
                work.together += solved / rates.wide
            work.together += _walks(group, walks, slower, rates)
        for method in quantized:
            steps = 0 if method.observer == "memoryless_minmax" else SEARCH_STEPS
            work.together += group.weights * (ROUND_S + steps * SEARCH_S) * slower
    if any(map(smoothed, chain.from_iterable(choices.values()))):
        channels = sum(
            max(member.in_features for member in group.members)
            for layer in range(modules.layers)
            for group in smoothable(checkpoint.config, modules, layer)
        )
        work.alone += SCALE_S * STEPS * (ROWS + WEIGHT_ROWS) * channels * slower
    return work


def _walks(group: Group, choices: int, slower: float, rates: Rates) -> float:
    """GPTQ of a group at so many choices."""
    if rates.accelerator:
        columns = max(member.in_features for member in group.members)
        return LAUNCHES_S * columns + choices * group.weights * columns / rates.wide
    products = sum(member.weights * member.in_features for member in group.members) / rates.wide
    return choices * (products + group.weights * WALK_S * slower)


def making_memory(
    checkpoint: Checkpoint,
    modules: Modules,
    choices: Mapping[str, Sequence[Choice]],
    tokens: int,
    rates: Rates,
) -> int:
    """Bytes that making the parts takes beside the mapped files."""
    hidden = int(checkpoint.text_config["hidden_size"])
    blocks: dict[int, int] = {}
    for group in modules:
        blocks[group.layer] = blocks.get(group.layer, 0) + BF16_BYTES * group.weights
    batch = min(tokens, GPU_BATCH_TOKENS if rates.accelerator else BATCH_TOKENS)
    inner = 4 * batch * max(m.out_features for m in modules.linears) * 4
    states = min(2 * tokens * hidden * BF16_BYTES, 2 * MAPPED_BYTES)
    copies = 3 + max(len(many) for many in choices.values())
    widest = max(_group_memory(group, choices[group.name], copies, rates) for group in modules)
    through = max(blocks.values()) + states
    if _in_order(choices):
        kept = tokens * _kept(checkpoint, modules)
        through = STATES * (through + min(kept, held_bytes(rates.accelerator)))
    return LIBRARIES_BYTES + widest + inner + through + _moments_memory(modules, choices)


def _group_memory(group: Group, choices: Sequence[Choice], copies: int, rates: Rates) -> int:
    """Of making a group: its weights in float32 with working copies.

    Experts' copies are of one input's matrices at a time, beside all weights and what they have become.
    Small ones leave holes in the heap, about as large as all weights for every choice: what they become stays
    and lies between copies that go.
    """
    if not is_experts(group):
        return 4 * copies * group.weights
    at_work: dict[str, int] = {}
    for member in group.members:
        first = first_of(group, member.name)
        at_work[first] = at_work.get(first, 0) + member.weights
    made = [group.stored_bytes(scheme(name)) for name, _ in choices]
    small = 4 * max(member.weights for member in group.members) < MOST_APART_BYTES
    holes = len(choices) if small and not rates.accelerator else 0
    return 4 * ((1 + holes) * group.weights + copies * max(at_work.values())) + sum(made) + max(made)


def _moments_memory(modules: Modules, choices: Mapping[str, Sequence[Choice]]) -> int:
    """Second moments of a block's inputs, and the copies of them that GPTQ works on: of one expert's at a
    time, of which each has two inputs."""
    more = 6 if _in_order(choices) else 2
    shared: dict[int, int] = {}
    experts: dict[int, list[int]] = {}
    for group in modules:
        if not any(parse_method(method).by_columns for _, method in choices[group.name]):
            continue
        squares = {first_of(group, m.name): 4 * m.in_features**2 for m in group.members}
        if is_experts(group):
            experts.setdefault(group.layer, []).extend(squares.values())
        else:
            shared[group.layer] = shared.get(group.layer, 0) + max(squares.values())
    return max(
        (
            (of_all := shared.get(layer, 0))
            + sum(mine := experts.get(layer, []))
            + max(more * of_all, 2 * max(mine, default=0))
            for layer in {*shared, *experts}
        ),
        default=0,
    )


def _kept(checkpoint: Checkpoint, modules: Modules) -> int:
    """Bytes of a token that the halting passes of a state keep."""
    return kept_bytes(int(checkpoint.text_config["hidden_size"]), modules.linears)


def _in_order(choices: Mapping[str, Sequence[Choice]]) -> bool:
    """Whether a plan is made group behind group."""
    return any(parse_method(method).asymmetric for many in choices.values() for _, method in many)
