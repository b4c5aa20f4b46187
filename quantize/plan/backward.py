"""Hidden states forwards and gradients backwards through the model, block by block: what the errors of every
group at every choice do to the likelihood of labels that are drawn from the model itself.

The forward pass keeps the hidden states between blocks (on disk where they are many); the backward pass takes
block by block, from the last to the first, and computes each one again. Memory: one block, its gradients, and
its changes at all choices. What the sums are for is in :mod:`quantize.plan.sensitivity`.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from quantize.core.dequantize import linear_weight
from quantize.core.modules import HEAD, Group
from quantize.core.schemes import scheme
from quantize.evaluate.bench import Span
from quantize.make.blocks import Batch, Blocks
from quantize.make.linears import Place, observing
from quantize.make.parts import PartStore
from quantize.make.ranges import round_inputs
from quantize.make.smooth import Scales, unfolded
from quantize.make.statistics import first_of
from quantize.make.streaming import Choice
from quantize.plan.head_loss import HeadLoss
from quantize.plan.sums import Sums

if TYPE_CHECKING:
    from torch import Tensor

HEAD_TOKENS = 128
"""Tokens whose logits are in memory at a time."""
DRAWS = 3
"""Labels that are drawn for every token, a backward pass each: an estimate is a mean of squares, one per
sequence and draw."""
NOISE_TOKENS = 512
"""Tokens on which the noise of outputs is taken."""


class Backward:
    """The two passes: hidden states forwards, gradients backwards."""

    def __init__(self, parts: PartStore, spans: Sequence[Span], seed: int) -> None:
        import torch

        self.parts, self.spans = parts, spans
        self.blocks = Blocks(parts.checkpoint, parts.modules)
        self.generator = torch.Generator().manual_seed(seed)
        self.tokens = sum(len(tokens) - start for tokens, start in spans)

    def sums(self, wanted: Mapping[str, Sequence[Choice]]) -> Iterable[dict[tuple[str, Choice], Sums]]:
        """Of a block's groups (by name) at their choices at a time, the last block first."""
        blocks = self.blocks
        groups = [group for group in self.parts.modules if wanted.get(group.name)]
        head = next(
            (HeadLoss(self.parts, blocks, one, wanted[one.name]) for one in groups if one.kind == HEAD), None
        )
        first = min((group.layer for group in groups if group.kind != HEAD), default=len(blocks))
        states = blocks.start(
            [tokens for tokens, _ in self.spans], copies=1 + DRAWS + len(blocks), alone=True
        )
        before: list[list[Tensor]] = []
        with tqdm(total=2 * len(blocks) - first, desc="sensitivity", unit="block", file=sys.stderr) as bar:
            for layer in range(len(blocks)):
                before.append([states.room(batch.hidden).copy_(batch.hidden) for batch in states.batches])
                with blocks.loaded(layer):
                    blocks.forward(layer, states)
                bar.update()
            with blocks.head_only() as logits_of, head or contextlib.nullcontext():
                gradients = [
                    [self._last(batch, logits_of, head, draw == 0) for draw in range(DRAWS)]
                    for batch in states.batches
                ]
            if head is not None:
                yield head.sums
            for layer in range(len(blocks) - 1, first - 1, -1):
                mine = [group for group in groups if group.layer == layer]
                with blocks.loaded(layer):
                    found = self._block(layer, states.batches, before.pop(), gradients, mine, wanted)
                bar.update()
                yield found

    def fisher(self, sums: Sums) -> float:
        """The second-order estimate of the KL divergence, nats per token."""
        return sums.products / (2 * DRAWS * self.tokens)

    def _last(
        self, batch: Batch, logits_of: Callable[[Tensor], Tensor], head: HeadLoss | None, energies: bool
    ) -> Tensor:
        """The gradient of the drawn labels' log-likelihood with respect to the last hidden states. ``head``
        is given what goes through it."""
        import torch

        gradient = torch.zeros_like(batch.hidden)
        tokens, start = self.spans[batch.numbers[0]]
        for at in range(start - 1, len(tokens) - 1, HEAD_TOKENS):
            end = min(at + HEAD_TOKENS, len(tokens) - 1)
            hidden = batch.hidden[:, at:end].clone().requires_grad_()
            logp = torch.log_softmax(logits_of(hidden)[0].float(), -1)
            drawn = torch.multinomial(logp.detach().exp().cpu(), 1, generator=self.generator)
            total = logp.gather(1, drawn.to(logp.device)).sum()
            asked = [hidden] if head is None else [hidden, head.out]
            found = torch.autograd.grad(total, asked)
            gradient[:, at:end] = found[0]
            if head is not None:
                head.see(found[1])
        if head is not None:
            head.finish(energies)
        return gradient

    def _block(
        self,
        layer: int,
        batches: Sequence[Batch],
        before: Sequence[Tensor],
        gradients: Sequence[Sequence[Tensor]],
        groups: Sequence[Group],
        wanted: Mapping[str, Sequence[Choice]],
    ) -> dict[tuple[str, Choice], Sums]:
        """Sums of a block's groups; ``gradients`` become those with respect to its inputs."""
        sums = {(group.name, choice): Sums() for group in groups for choice in wanted[group.name]}
        by_name = {group.name: group for group in groups}
        changes = {group.name: self._changes(group, wanted[group.name]) for group in groups}
        scales = {(name, choice): self.parts.scales(by_name[name], choice) for name, choice in sums}
        places = {m.name: self.blocks.places[m.name] for group in groups for m in group.members}
        firsts = {first_of(group, m.name) for group in groups for m in group.members}
        weights = {id(parameter): parameter for parameter in map(_parameter, places.values())}
        lock, running = threading.Lock(), threading.local()
        noisy = _first_tokens(batches, NOISE_TOKENS)

        def see(name: str, x: Tensor) -> None:
            if name in firsts:
                running.inputs[name] = x

        def work(number: int) -> None:
            running.inputs = {}
            rounding: dict[tuple[str, Choice], Tensor] = {}
            for draw, found in enumerate(
                self._sequence(layer, batches[number], before[number], gradients[number], weights, running)
            ):
                slopes = {
                    n: _flat(place, found.weights[id(_parameter(place))]) for n, place in places.items()
                }
                for group in groups:
                    products = _products(
                        group, wanted[group.name], changes[group.name], found.inputs, slopes, scales, rounding
                    )
                    for at, (choice, product) in enumerate(zip(wanted[group.name], products, strict=True)):
                        energies = (0.0, 0.0)
                        if number in noisy and draw == 0:
                            change = {name: of[at] for name, of in changes[group.name].items()}
                            smooth = scales[group.name, choice]
                            energies = _energies(self.blocks, group, choice, change, found.inputs, smooth)
                        with lock:
                            sums[group.name, choice].add(product**2, *energies)

        for weight in weights.values():
            weight.requires_grad_(True)
        with observing(places, see):
            self.blocks.each(work, range(len(batches)))
        for weight in weights.values():
            weight.requires_grad_(False)
        return sums

    def _changes(self, group: Group, choices: Sequence[Choice]) -> dict[str, Tensor]:
        """Ŵ - W of a group's members, float32 (choices, N, K); of smoothed parts, as they act in the plain
        model."""
        import torch

        found = {}
        for member in group.members:
            weight = self.blocks.places[member.name].weight.float()
            found[member.name] = torch.empty((len(choices), *weight.shape), device=weight.device)
            for at, choice in enumerate(choices):
                tensors = self.parts.tensors(self.parts.file(group.name, choice))
                quantized = linear_weight(tensors, member.name, scheme(choice[0])).to(self.blocks.device)
                quantized = unfolded(member, quantized, self.parts.scales(group, choice))
                torch.sub(quantized, weight, out=found[member.name][at])
        return found

    def _sequence(
        self,
        layer: int,
        batch: Batch,
        hidden: Tensor,
        gradients: Sequence[Tensor],
        weights: Mapping[int, Any],
        running: Any,
    ) -> Iterable[_Found]:
        """One sequence through the block, and back per draw; ``gradients`` become those of the block's input.

        ``running.inputs`` is filled by a hook with what goes into the linears.
        """
        import torch

        with torch.enable_grad():
            start = hidden.clone().requires_grad_()
            out = self.blocks.through(layer, batch, start)
            inputs: dict[str, Tensor] = running.inputs
            asked = [start, *weights.values(), *inputs.values()]
        for draw, gradient in enumerate(gradients):
            more = draw + 1 < len(gradients)
            found = torch.autograd.grad(out, asked, gradient, allow_unused=True, retain_graph=more)
            gradient.copy_(found[0])
            of_input = found[1 + len(weights) :]
            yield _Found(
                dict(zip(weights, found[1 : 1 + len(weights)], strict=True)),
                {name: (x.detach(), g) for (name, x), g in zip(inputs.items(), of_input, strict=True)},
            )


@dataclass(frozen=True)
class _Found:
    """Of one sequence: gradients of weights by the parameter's id, and (x, gradient of x) by the name of the
    first linear on those inputs. None stands for an expert that no token came to."""

    weights: dict[int, Tensor | None]
    inputs: dict[str, tuple[Tensor, Tensor | None]]


def _first_tokens(batches: Sequence[Batch], tokens: int) -> set[int]:
    """As many sequences as hold so many tokens, from the middle of the order by length."""
    found: set[int] = set()
    middle = len(batches) // 2
    for number in sorted(range(len(batches)), key=lambda one: abs(one - middle)):
        if sum(batches[one].lengths[0] for one in found) >= tokens:
            break
        found.add(number)
    return found


def _parameter(place: Place) -> Any:
    """The parameter that a linear's weight lies in."""
    module: Any = place.module
    if place.expert is None:
        return module.weight
    return module.down_proj if place.projection == "down_proj" else module.gate_up_proj


def _part(place: Place, gradient: Tensor | None) -> Tensor | None:
    """A linear's (N, K) part of its parameter's gradient."""
    if gradient is None or place.expert is None:
        return gradient
    mine = gradient[place.expert]
    half = len(mine) // 2
    if place.projection == "down_proj":
        return mine
    return mine[:half] if place.projection == "gate_proj" else mine[half:]


def _flat(place: Place, gradient: Tensor | None) -> Tensor | None:
    """The same in float32, (N·K,): once for all choices."""
    mine = _part(place, gradient)
    return None if mine is None else mine.float().reshape(-1)


def _products(
    group: Group,
    choices: Sequence[Choice],
    changes: Mapping[str, Tensor],
    inputs: Mapping[str, tuple[Tensor, Tensor | None]],
    slopes: Mapping[str, Tensor | None],
    scales: Mapping[tuple[str, Choice], Scales],
    rounding: dict[tuple[str, Choice], Tensor],
) -> list[float]:
    """Σ_t g_t·e_t of one sequence at every choice: the errors of all members act together.

    ``slopes`` are flat. ``rounding`` keeps what rounding the sequence's inputs changes, which is the same in
    every draw. An accelerator is waited for once.
    """
    import torch

    total = torch.zeros(len(choices), device=next(iter(changes.values())).device)
    for member in group.members:
        slope = slopes[member.name]
        if slope is not None:
            total += changes[member.name].flatten(1) @ slope
    firsts = dict.fromkeys(first_of(group, member.name) for member in group.members)
    for at, choice in enumerate(choices):
        if (how := scheme(choice[0]).activations) is None:
            continue
        for first in firsts:
            x, slope = inputs.get(first, (None, None))
            if x is None or slope is None:
                continue
            if (first, choice) not in rounding:
                columns = scales[group.name, choice].get(f"{first}.columns")
                rounding[first, choice] = (round_inputs(x, how, columns) - x).float()
            total[at] += torch.dot(slope.float().reshape(-1), rounding[first, choice].reshape(-1))
    found: list[float] = total.tolist()
    return found


def _energies(
    blocks: Blocks,
    group: Group,
    choice: Choice,
    change: Mapping[str, Tensor],
    inputs: Mapping[str, tuple[Tensor, Tensor | None]],
    scales: Scales,
) -> tuple[float, float]:
    """A sequence's energies of outputs, and of their errors."""
    how = scheme(choice[0]).activations
    signal = noise = 0.0
    for member in group.members:
        x, _ = inputs.get(first_of(group, member.name), (None, None))
        if x is None:
            continue
        wide = x[0].float() if x.ndim == 3 else x.float()
        weight = blocks.places[member.name].weight.float()
        columns = scales.get(f"{member.name}.columns")
        rounded = round_inputs(wide, how, columns) if how is not None else wide
        clean = wide @ weight.T
        noise += float((rounded @ (weight + change[member.name]).T - clean).square().sum())
        signal += float(clean.square().sum())
    return signal, noise
