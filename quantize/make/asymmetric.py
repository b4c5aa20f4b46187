"""GPTQ of a whole plan, one group behind the other (asymmetric calibration: GPTAQ, arXiv:2504.02692).

Parts (:mod:`quantize.make.streaming`) see the inputs x of the unquantized model. Here a group sees what the
groups quantized before it give, x̂, while its outputs are still to be what the model's are:

    E|W x - Ŵ x̂|²  =  E|(W' - Ŵ) x̂|² + what Ŵ does not change,    W' = W + W E[(x - x̂) x̂ᵀ] E[x̂ x̂ᵀ]⁻¹

so GPTQ of W' with the moments of x̂ is all that it takes. The inverse is damped far more than GPTQ's own: a
few thousand calibration tokens do not tell more of W', and with little damping a model loses more by it than
it gains (``docs/benchmarks/quantization.md``). Smoothing scales are of the unquantized model, as everywhere.

Two states go through the blocks, the model's and the variant's; both stop at the group that is looked at. So
a block is passed about six times. Memory: two blocks, and the second moments of one group, twice.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from quantize.core.checkpoint import Checkpoint
from quantize.core.dequantize import dequantized
from quantize.core.legality import is_experts
from quantize.core.methods import independent, parse_method
from quantize.core.modules import HEAD, Group, Modules
from quantize.core.schemes import Numbers, scheme
from quantize.core.tensors import Part
from quantize.make.blocks import Batch, Blocks, States, best_device
from quantize.make.linears import exchanged, observing
from quantize.make.ranges import round_inputs
from quantize.make.smooth import Scales, folded, unfolded
from quantize.make.statistics import InputStatistics
from quantize.make.streaming import Choice, refuse_choice, solved
from quantize.make.threads import InOrder, side_by_side

if TYPE_CHECKING:
    from torch import Tensor

DAMPING = 0.1
"""Share of the mean of E[x̂²] that is added to the diagonal before W' is solved for."""
PASSES = 6.0
"""Passes of a block that this takes: of two states, up to each of four groups and through the whole."""

Stored = Callable[[Group], "Mapping[str, Part] | None"]
"""A group's part, by tensor name; None where it is still to be made."""


class _ReachedError(Exception):
    """A forward pass has come to the linear that is looked at; it goes no further."""

    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs


def as_made(group: Group, choice: Choice) -> Choice:
    """What stands for a choice of :attr:`Method.asymmetric`: experts, whose rows differ between the two
    states, and a head are made as parts are."""
    if is_experts(group) or group.kind == HEAD:
        return choice[0], independent(choice[1])
    return choice


def make_in_order(
    checkpoint: Checkpoint,
    modules: Modules,
    choices: Mapping[str, Choice],
    sequences: Sequence[Sequence[int]],
    stored: Stored,
    keep: Callable[[Group, Mapping[str, Tensor]], None],
    scales: Callable[[Group], Scales],
    label: str = "quantize",
) -> None:
    """Make the groups of ``choices`` (by name: all groups of a plan) that ``stored`` has not.

    ``keep`` is given the tensors of each as it is finished, by their names in the checkpoint; ``stored`` must
    have it then. ``scales`` are the smoothing scales under which a group's part stands. ``sequences`` are
    calibration's token ids. A run that was killed goes on where it was, with the same numbers.
    """
    missing = [group for group in modules if stored(group) is None]
    if not missing:
        return
    device = best_device()
    plain = Blocks(checkpoint, modules, device)
    changed = Blocks(checkpoint, modules, device, files=plain.files)
    before, after = (blocks.start(sequences, copies=2) for blocks in (plain, changed))
    last = max(group.layer for group in missing)
    for layer in tqdm(range(last + 1), desc=label, unit="block", file=sys.stderr):
        mine = [group for group in modules if group.layer == layer]
        with plain.loaded(layer), changed.loaded(layer), contextlib.ExitStack() as quantized:
            for group in _as_computed(plain, layer, before.batches[0], mine):
                choice, mine_scales = choices[group.name], scales(group)
                part = stored(group)
                if part is None:
                    first = group.members[0].name
                    moments, mismatch = _moments((plain, before), (changed, after), layer, first)
                    keep(group, _made(group, choice, plain, moments, mismatch, mine_scales))
                    part = stored(group)
                    assert part is not None
                _quantize(quantized, changed, group, choice[0], part, mine_scales)
            if layer < last:
                plain.forward(layer, before)
                changed.forward(layer, after)


def _as_computed(blocks: Blocks, layer: int, batch: Batch, groups: Sequence[Group]) -> list[Group]:
    """The groups of a loaded block in the order in which it computes them; experts that no token of the batch
    came to are last."""
    seen: list[str] = []
    places = {member.name: blocks.places[member.name] for group in groups for member in group.members}
    with observing(places, lambda name, _x: seen.append(name)):
        blocks.through(layer, batch, batch.hidden)
    at = {name: number for number, name in reversed(list(enumerate(seen)))}

    def first(group: Group) -> int:
        return min((at[member.name] for member in group.members if member.name in at), default=len(seen))

    return sorted(groups, key=first)


def _quantize(
    stack: contextlib.ExitStack,
    blocks: Blocks,
    group: Group,
    scheme_name: str,
    part: Mapping[str, Part],
    scales: Scales,
) -> None:
    """For as long as ``stack`` is open, the block's group is as its part says, its inputs rounded."""
    how = scheme(scheme_name)
    if how.weights is None:
        return
    weights = {
        member.name: unfolded(member, dequantized(part, member.name, how), scales).to(
            blocks.device, blocks.dtype
        )
        for member in group.members
    }
    stack.enter_context(exchanged(blocks.places, weights))
    if how.activations is not None:
        places = {member.name: blocks.places[member.name] for member in group.members}
        stack.enter_context(observing(places, _rounding(how.activations, scales)))


def _rounding(how: Numbers, scales: Scales) -> Callable[[str, Tensor], Tensor]:
    return lambda name, x: round_inputs(x, how, scales.get(f"{name}.columns"))


def _made(
    group: Group, choice: Choice, plain: Blocks, moments: InputStatistics, mismatch: Tensor, scales: Scales
) -> Mapping[str, Tensor]:
    """The stored tensors of a group whose members share inputs."""
    weights = {}
    for member in group.members:
        weight = plain.files[f"{member.name}.weight"].to(plain.device).float()
        weight = corrected(weight, moments.moments, mismatch)
        weights[member.name] = folded(f"{member.name}.weight", weight, scales)
    columns = scales.get(f"{group.members[0].name}.columns")
    inputs = moments if columns is None else moments.divided(columns.to(plain.device))
    tasks = [(name, choice) for name in weights]
    tensors: dict[str, Tensor] = {}
    for made in solved(tasks, weights, inputs, plain.dtype):
        tensors |= made
    return tensors


def corrected(weight: Tensor, moments: Tensor, mismatch: Tensor) -> Tensor:
    """W' (N, K), float32, of the text above for a ``weight`` (N, K), E[x̂ x̂ᵀ] and E[(x - x̂) x̂ᵀ], (K, K)."""
    import torch

    damped = moments.clone()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:  # no input at all
        return weight
    return weight + torch.cholesky_solve((weight @ mismatch).T, factor).T


def _moments(
    model: tuple[Blocks, States], variant: tuple[Blocks, States], layer: int, first: str
) -> tuple[InputStatistics, Tensor]:
    """E[x̂ x̂ᵀ], and E[(x - x̂) x̂ᵀ] (K, K), of what goes into the linear ``first``."""
    import torch

    (plain, before), (changed, after) = model, variant
    sums: list[tuple[InputStatistics, Tensor]] = []
    order = InOrder()

    def work(number: int) -> None:
        batch = before.batches[number]
        with order.piece(number):
            x = _inputs(plain, layer, batch)[batch.real].float()
            seen = _inputs(changed, layer, after.batches[number])[batch.real].float()
            found = InputStatistics(len(seen), seen.T @ seen, float(seen.min()), float(seen.max()))
            mismatch = x.sub_(seen).T @ seen
            with order.turn("", number):
                if sums:
                    sums[0][0].add(found)
                    sums[0][1].add_(mismatch)
                else:
                    sums.append((found, mismatch))

    def reached(_name: str, x: Tensor) -> None:
        raise _ReachedError(x)

    with (
        observing({first: plain.places[first]}, reached),
        observing({first: changed.places[first]}, reached),
        torch.no_grad(),
    ):
        numbers = range(len(before.batches))
        side_by_side(work, numbers) if plain.device.type == "cpu" else list(map(work, numbers))
    moments, mismatch = sums[0]
    moments.moments /= moments.tokens
    return moments, mismatch / moments.tokens


def _inputs(blocks: Blocks, layer: int, batch: Batch) -> Tensor:
    import torch

    with torch.no_grad():  # threads have a mode of their own
        try:
            blocks.through(layer, batch, batch.hidden)
        except _ReachedError as reached:
            return reached.inputs
    raise RuntimeError(f"block {layer} does not come to the linear that is looked at")


def asymmetric_groups(modules: Modules, choices: Mapping[str, Choice]) -> list[Group]:
    """The groups of a plan that are made in order. Raises MethodError for a scheme that is not made so."""
    found = [group for group in modules if parse_method(choices[group.name][1]).asymmetric]
    for group in found:
        refuse_choice(choices[group.name])
    return found
