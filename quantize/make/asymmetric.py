"""GPTQ of a whole plan, one group behind the other (asymmetric calibration: GPTAQ, arXiv:2504.02692).

Parts (:mod:`quantize.make.streaming`) see the inputs x of the unquantized model. Here a group sees what the
groups quantized before it give, x̂, while its outputs are still to be what the model's are:

    E|W x - Ŵ x̂|²  =  E|(W' - Ŵ) x̂|² + what Ŵ does not change,    W' = W + W E[(x - x̂) x̂ᵀ] E[x̂ x̂ᵀ]⁻¹

so GPTQ of W' with the moments of x̂ is all that it takes. A few thousand calibration tokens do not tell all
of W': taken as it is, a model may lose more by it than it gains (``docs/benchmarks/quantization.md``). So the
inverse is damped, and a share of W' - W is taken, each as half of the conversations would have it after the
other half has told W'. Smoothing scales are of the unquantized model, as everywhere.

Two states go through the blocks, the model's and the variant's, and halt at every group until it is made
(:mod:`quantize.make.halting`). Memory: two blocks, of one group six matrices of second moments, and what
halts.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tqdm import tqdm

from quantize.core.checkpoint import Checkpoint
from quantize.core.dequantize import dequantized
from quantize.core.legality import is_experts
from quantize.core.methods import independent, parse_method
from quantize.core.modules import HEAD, Group, Modules
from quantize.core.resources import freed_at_once
from quantize.core.schemes import Numbers, scheme
from quantize.core.tensors import Part
from quantize.make.blocks import Batch, Blocks, States, best_device
from quantize.make.halting import Halting
from quantize.make.linears import exchanged, observing
from quantize.make.ranges import round_inputs
from quantize.make.smooth import Scales, folded, unfolded
from quantize.make.statistics import InputStatistics
from quantize.make.streaming import Choice, refuse_choice, refuse_infinite, refuse_short_sequences, solved
from quantize.make.threads import InOrder

if TYPE_CHECKING:
    from torch import Tensor

DAMPINGS = (0.03, 0.1, 0.3, 1.0)
"""Shares of the mean of E[x̂²] one of which is added to the diagonal before W' is solved for."""
STATES = 2
"""That go through the blocks."""
SOLVED, SOLVED_PRODUCTS = 2 * len(DAMPINGS) + 1, 4.0 * (2 * len(DAMPINGS) + 1)
"""Factors of (K, K) that a group takes, and operations per weight and column."""

Stored = Callable[[Group], "Mapping[str, Part] | None"]
"""A group's part, by tensor name; None where it is still to be made."""


def as_made(group: Group, choice: Choice) -> Choice:
    """What stands for a choice of :attr:`Method.asymmetric`: experts, whose rows differ between the two
    states, and a head are made as parts are."""
    if is_experts(group) or group.kind == HEAD:
        return choice[0], independent(choice[1])
    return choice


@freed_at_once()
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
    refuse_short_sequences(sequences)
    device = best_device()
    plain = Blocks(checkpoint, modules, device)
    changed = Blocks(checkpoint, modules, device, files=plain.files)
    before, after = (blocks.start(sequences, copies=2) for blocks in (plain, changed))
    last = max(group.layer for group in missing)
    for layer in tqdm(range(last + 1), desc=label, unit="block", file=sys.stderr):
        mine = [group for group in modules if group.layer == layer]
        with contextlib.ExitStack() as stack:
            for blocks in (plain, changed):
                stack.enter_context(blocks.loaded(layer))
            ordered = _as_computed(plain, layer, before.batches[0], mine)
            halts = [first for group, first in ordered if stored(group) is None]
            model = stack.enter_context(Halting(plain, layer, before, halts))
            variant = stack.enter_context(Halting(changed, layer, after, halts))
            becoming = stack.enter_context(_Becoming(changed, mine, choices))
            for group, first in ordered:
                part = stored(group)
                if part is None:
                    halves = _moments(model, variant, before, first)
                    keep(group, _made(group, choices[group.name], plain, halves, scales(group)))
                    part = stored(group)
                    assert part is not None
                becoming.quantized(group, part, scales(group))
            if layer < last:
                model.finish()
                variant.finish()


def _as_computed(
    blocks: Blocks, layer: int, batch: Batch, groups: Sequence[Group]
) -> list[tuple[Group, str]]:
    """The groups of a loaded block, each with the first of its linears, in the order in which it computes
    them; experts that no token of the batch came to are last."""
    seen: list[str] = []
    places = {member.name: blocks.places[member.name] for group in groups for member in group.members}
    with observing(places, lambda name, _x: seen.append(name)):
        blocks.through(layer, batch, batch.hidden)
    at = {name: number for number, name in reversed(list(enumerate(seen)))}

    def place(name: str) -> int:
        return at.get(name, len(seen))

    firsts = [(group, min((member.name for member in group.members), key=place)) for group in groups]
    return sorted(firsts, key=lambda pair: place(pair[1]))


class _Becoming(contextlib.ExitStack):
    """A loaded block that is the variant's group by group, for as long as this is open."""

    def __init__(self, blocks: Blocks, groups: Sequence[Group], choices: Mapping[str, Choice]) -> None:
        super().__init__()
        self._blocks = blocks
        self._how = {group.name: scheme(choices[group.name][0]) for group in groups}
        self._columns: dict[str, tuple[Numbers, Tensor | None]] = {}
        """By linear whose inputs are rounded by now."""
        rounding = [group for group in groups if self._how[group.name].activations is not None]
        names = [member.name for group in rounding for member in group.members]
        # Before any pass: one that halts at a linear does not see the hooks that come to it meanwhile.
        self.enter_context(observing({name: blocks.places[name] for name in names}, self._rounded))

    def quantized(self, group: Group, part: Mapping[str, Part], scales: Scales) -> None:
        """From now on the group is as its part says, and its inputs are rounded."""
        how = self._how[group.name]
        if how.weights is None:
            return
        blocks = self._blocks
        weights = {
            member.name: unfolded(member, dequantized(part, member.name, how), scales).to(
                blocks.device, blocks.dtype
            )
            for member in group.members
        }
        self.enter_context(exchanged(blocks.places, weights))
        if how.activations is not None:
            for name in weights:
                self._columns[name] = how.activations, scales.get(f"{name}.columns")

    def _rounded(self, name: str, x: Tensor) -> Tensor | None:
        found = self._columns.get(name)
        return None if found is None else round_inputs(x, *found)


@dataclass
class Moments:
    """Of what goes into a linear, in some of the conversations, float32."""

    inputs: InputStatistics
    """Of x̂."""
    mismatch: Tensor
    """E[(x - x̂) x̂ᵀ], (K, K)."""

    def add(self, other: Moments) -> None:
        """Take in sums over other tokens; both are not yet divided by their count."""
        self.inputs.add(other.inputs)
        self.mismatch += other.mismatch

    def divided(self) -> Moments:
        """Means instead of sums."""
        sums, tokens = self.inputs, max(1, self.inputs.tokens)
        means = InputStatistics(sums.tokens, sums.moments / tokens, sums.least, sums.most)
        return Moments(means, self.mismatch / tokens)


def _moments(model: Halting, variant: Halting, before: States, first: str) -> tuple[Moments, ...]:
    """Sums over either half of the conversations, of the linear ``first``; passes halt there."""
    import torch

    sums: dict[int, Moments] = {}
    order = InOrder()

    def work(number: int) -> None:
        batch = before.batches[number]
        odd = torch.tensor([n % 2 for n in batch.numbers], device=batch.hidden.device).unsqueeze(1)
        with order.piece(number):
            x, seen = model.inputs(number, first), variant.inputs(number, first)
            found = {}
            for half in (0, 1):
                mine = batch.real & (odd == half)
                if mine.any():
                    found[half] = _sums(x[mine].float(), seen[mine].float())
            with order.turn("", number):
                for half, added in found.items():
                    if half in sums:
                        sums[half].add(added)
                    else:
                        sums[half] = added

    model.each(work)
    return tuple(sums[half] for half in sorted(sums))


def _sums(x: Tensor, seen: Tensor) -> Moments:
    inputs = InputStatistics(len(seen), seen.T @ seen, float(seen.min()), float(seen.max()))
    return Moments(inputs, x.sub_(seen).T @ seen)


def _made(
    group: Group, choice: Choice, plain: Blocks, sums: Sequence[Moments], scales: Scales
) -> Mapping[str, Tensor]:
    """The stored tensors of a group whose members share inputs."""
    halves = [half.divided() for half in sums]
    whole = sums[0]
    for half in sums[1:]:
        whole.add(half)
    whole = whole.divided()
    members = [member.name for member in group.members]
    for found in (whole.inputs.moments, whole.mismatch):
        refuse_infinite(members[0], found)
    weights = [plain.files[f"{name}.weight"].to(plain.device).float() for name in members]
    meant = {
        name: folded(f"{name}.weight", weight, scales)
        for name, weight in zip(members, corrected(weights, whole, halves), strict=True)
    }
    columns = scales.get(f"{members[0]}.columns")
    inputs = whole.inputs if columns is None else whole.inputs.divided(columns.to(plain.device))
    tensors: dict[str, Tensor] = {}
    for made in solved([(name, choice) for name in members], meant, inputs, plain.dtype, inputs.largest):
        tensors |= made
    return tensors


def corrected(weights: Sequence[Tensor], whole: Moments, halves: Sequence[Moments]) -> list[Tensor]:
    """W' of the text above for ``weights`` (N, K), float32, that share inputs.

    Of the corrections D from either half, the share ``a`` of them that is best for the other half, by
    E|W (x - x̂) - a D x̂|², is a least squares fit; the damping is the one that leaves least.
    """
    best = [(0.0, 0.0, 0.0)] * len(weights)
    """Of each: what is gained, the damping and the share."""
    missed = [[weight @ half.mismatch for half in halves] for weight in weights]
    for damping in DAMPINGS if len(halves) == 2 else ():
        factors = [_factor(half, damping) for half in halves]
        for place, products in enumerate(missed):
            along = size = 0.0
            for mine, other in ((0, 1), (1, 0)):
                change, tokens = _solved(factors[mine], products[mine]), halves[other].inputs.tokens
                along += tokens * float((change * products[other]).sum())
                size += tokens * float(((change @ halves[other].inputs.moments) * change).sum())
            share = min(1.0, max(0.0, along / size)) if size > 0 else 0.0
            best[place] = max(best[place], (share * (2 * along - share * size), damping, share))
    factors_of = {damping: _factor(whole, damping) for _, damping, share in best if share}
    return [
        weight + share * _solved(factors_of[damping], weight @ whole.mismatch) if share else weight
        for weight, (_, damping, share) in zip(weights, best, strict=True)
    ]


def _factor(of: Moments, damping: float) -> Tensor | None:
    """The Cholesky factor of E[x̂ x̂ᵀ], damped; None where there is no input at all."""
    import torch

    damped = of.inputs.moments.clone()
    damped.diagonal().add_(damping * damped.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(damped)
    return None if failed else factor


def _solved(factor: Tensor | None, product: Tensor) -> Tensor:
    """``product`` (N, K) times the inverse that ``factor`` is of."""
    import torch

    return torch.zeros_like(product) if factor is None else torch.cholesky_solve(product.T, factor).T


def asymmetric_groups(modules: Modules, choices: Mapping[str, Choice]) -> list[Group]:
    """The groups of a plan that are made in order. Raises MethodError for a scheme that is not made so."""
    found = [group for group in modules if parse_method(choices[group.name][1]).asymmetric]
    for group in found:
        refuse_choice(choices[group.name])
    return found
