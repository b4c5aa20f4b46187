"""What each module group loses at each choice of scheme and method, from two passes over the model.

``sqnr_db``
    signal to quantization noise of the group's outputs on real inputs, 10 log10(Σ|Wx|² / Σ|Wx - Ŵx̂|²).
``fisher``
    second-order estimate of the KL divergence, nats per token: ½ E[(Σ_t g_t·e_t)²] / T, where e_t is the
    error of the group's output at token t and g_t the gradient, with respect to that output, of the
    log-likelihood of labels drawn from the model itself. The cross terms between tokens vanish in
    expectation, so this is ½ δᵀFδ with the full Fisher matrix F of the group, not its diagonal (Amari 1998;
    Kim et al., arXiv:2306.07629 take the diagonal).
``loss``
    ``fisher`` times the scheme's scale: what its uniform variant loses through the engine's kernels over
    the sum of its estimates. The planner adds these up.

Σ_t g_t·e_t of a changed weight is the inner product of its change with the gradient of the weight, so that
one backward pass per sequence serves every choice; rounded inputs add Σ_t (Wᵀg_t)·(x̂_t - x_t). The product
of the two changes is left out.

The forward pass keeps the hidden states between blocks (on disk where they are many); the backward pass takes
block by block, from the last to the first, and computes each one again. Memory: one block, its gradients, and
its changes at all choices. Rows are kept as each block is finished, so that an interrupted run goes on.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict
from tqdm import tqdm

from quantize.core.dequantize import linear_weight
from quantize.core.jsonl import read_kept
from quantize.core.modules import Group
from quantize.core.schemes import scheme
from quantize.evaluate.bench import Span
from quantize.make.blocks import Batch, Blocks
from quantize.make.linears import Place, observing
from quantize.make.parts import PartStore
from quantize.make.smooth import Scales, unfolded
from quantize.make.statistics import first_of
from quantize.make.threads import side_by_side
from quantize.plan.served import Choice, ServedKl
from quantize.plan.simulated import round_inputs

if TYPE_CHECKING:
    from torch import Tensor

HEAD_TOKENS = 128
"""Tokens whose logits are in memory at a time."""
DRAWS = 3
"""Labels that are drawn for every token, a backward pass each: an estimate is a mean of squares, one per
sequence and draw."""
NOISE_TOKENS = 512
"""Tokens on which the noise of outputs is taken."""


class Row(BaseModel):
    """One module group at one choice."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    group: str
    kind: str
    layer: int
    scheme: str
    method: str
    bytes: int
    sqnr_db: float
    fisher: float
    scale: float = 1.0

    @property
    def kl(self) -> float | None:
        """None: groups are not measured one by one, for reports that show it where it is."""
        return None

    @property
    def loss(self) -> float:
        """The best estimate there is, nats per token."""
        return self.fisher * self.scale


class Sensitivity(BaseModel):
    """All rows, and what they were measured on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: tuple[Row, ...]
    tokens: int
    uniform: Mapping[str, float] = {}
    """scheme@method to the KL of the uniform variant on the engine, where it was measured."""

    def row(self, group: str, choice: Choice) -> Row:
        return next(r for r in self.rows if (r.group, r.scheme, r.method) == (group, *choice))


def analyse(
    parts: PartStore,
    choices: Mapping[str, Sequence[Choice]],
    spans: Sequence[Span],
    keep: Path,
    seed: int = 0,
) -> tuple[Row, ...]:
    """Rows for every group (by name) and its ``choices``; finished rows are read from ``keep``."""
    groups = [group for group in parts.modules if choices.get(group.name)]
    known = _read_rows(keep)
    missing = {
        group.name: [c for c in choices[group.name] if (group.name, *c) not in known] for group in groups
    }
    if any(missing.values()):
        parts.make(missing, label="quantize for all choices")
        keep.parent.mkdir(parents=True, exist_ok=True)
        with keep.open("a", encoding="utf-8") as file:
            for rows in _Backward(parts, spans, seed).rows(missing):
                file.writelines(row.model_dump_json() + "\n" for row in rows)
                file.flush()
                os.fsync(file.fileno())
                known |= {(row.group, row.scheme, row.method): row for row in rows}
    return tuple(known[group.name, *choice] for group in groups for choice in choices[group.name])


def _read_rows(path: Path) -> dict[tuple[str, str, str], Row]:
    rows = []
    for entry in read_kept(path):
        with contextlib.suppress(ValueError):  # a row of another form is taken again
            rows.append(Row.model_validate(entry))
    return {(row.group, row.scheme, row.method): row for row in rows}


def calibrated(rows: Sequence[Row], served: ServedKl) -> Sensitivity:
    """Give every row the scale of its scheme: a uniform variant of each is measured on the engine.

    It is by the last of the scheme's methods. Groups that do not have the scheme stay at 16 bits in it.
    """
    by_scheme: dict[str, list[Row]] = {}
    for row in rows:
        by_scheme.setdefault(row.scheme, []).append(row)
    uniform, scales = {}, {}
    for name, mine in tqdm(by_scheme.items(), desc="uniform variants", unit="engine", file=sys.stderr):
        method = mine[-1].method
        chosen = [row for row in mine if row.method == method]
        measured = served({row.group: (name, method) for row in chosen})
        uniform[f"{name}@{method}"] = measured
        scales[name] = measured / max(sum(row.fisher for row in chosen), 1e-12)
    return Sensitivity(
        rows=tuple(row.model_copy(update={"scale": scales[row.scheme]}) for row in rows),
        tokens=served.tokens,
        uniform=uniform,
    )


class _Sums:
    """Of one (group, choice): Σ (Σ_t g·e)² over sequences, and energies of outputs and errors."""

    def __init__(self) -> None:
        self.products = self.signal = self.noise = 0.0

    def add(self, product: float, signal: float, noise: float) -> None:
        self.products += product
        self.signal += signal
        self.noise += noise


class _Backward:
    """The two passes: hidden states forwards, gradients backwards."""

    def __init__(self, parts: PartStore, spans: Sequence[Span], seed: int) -> None:
        import torch

        self.parts, self.spans = parts, spans
        self.blocks = Blocks(parts.checkpoint, parts.modules)
        self.generator = torch.Generator().manual_seed(seed)
        self.tokens = sum(len(tokens) - start for tokens, start in spans)

    def rows(self, wanted: Mapping[str, Sequence[Choice]]) -> Iterable[list[Row]]:
        """Rows of a block's groups at a time, the last block first."""
        blocks = self.blocks
        groups = [group for group in self.parts.modules if wanted.get(group.name)]
        first = min(group.layer for group in groups)
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
            with blocks.head_only() as logits_of:
                gradients = [[self._last(batch, logits_of) for _ in range(DRAWS)] for batch in states.batches]
            for layer in range(len(blocks) - 1, first - 1, -1):
                mine = [group for group in groups if group.layer == layer]
                with blocks.loaded(layer):
                    sums = self._block(layer, states.batches, before.pop(), gradients, mine, wanted)
                bar.update()
                yield [self._row(group, c, sums[group.name, c]) for group in mine for c in wanted[group.name]]

    def _row(self, group: Group, choice: Choice, sums: _Sums) -> Row:
        return Row(
            group=group.name,
            kind=group.kind,
            layer=group.layer,
            scheme=choice[0],
            method=choice[1],
            bytes=group.stored_bytes(scheme(choice[0])),
            sqnr_db=10 * math.log10(max(sums.signal, 1e-30) / max(sums.noise, 1e-30)),
            fisher=sums.products / (2 * DRAWS * self.tokens),
        )

    def _last(self, batch: Batch, logits_of: Callable[[Tensor], Tensor]) -> Tensor:
        """The gradient of the drawn labels' log-likelihood with respect to the last hidden states."""
        import torch

        gradient = torch.zeros_like(batch.hidden)
        tokens, start = self.spans[batch.numbers[0]]
        for at in range(start - 1, len(tokens) - 1, HEAD_TOKENS):
            end = min(at + HEAD_TOKENS, len(tokens) - 1)
            hidden = batch.hidden[:, at:end].clone().requires_grad_()
            logp = torch.log_softmax(logits_of(hidden)[0].float(), -1)
            drawn = torch.multinomial(logp.detach().exp().cpu(), 1, generator=self.generator)
            total = logp.gather(1, drawn.to(logp.device)).sum()
            gradient[:, at:end] = torch.autograd.grad(total, hidden)[0]
        return gradient

    def _block(
        self,
        layer: int,
        batches: Sequence[Batch],
        before: Sequence[Tensor],
        gradients: Sequence[Sequence[Tensor]],
        groups: Sequence[Group],
        wanted: Mapping[str, Sequence[Choice]],
    ) -> dict[tuple[str, Choice], _Sums]:
        """Sums of a block's groups; ``gradients`` become those with respect to its inputs."""
        sums = {(group.name, choice): _Sums() for group in groups for choice in wanted[group.name]}
        changes = {
            group.name: [self._changes(group, choice) for choice in wanted[group.name]] for group in groups
        }
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
            for draw, found in enumerate(
                self._sequence(layer, batches[number], before[number], gradients[number], weights, running)
            ):
                slopes = {
                    n: _part(place, found.weights[id(_parameter(place))]) for n, place in places.items()
                }
                for group in groups:
                    for choice, change in zip(wanted[group.name], changes[group.name], strict=True):
                        smooth = self.parts.scales(group, choice)
                        added = _product(group, choice, change, found.inputs, slopes, smooth) ** 2
                        energies = (0.0, 0.0)
                        if number in noisy and draw == 0:
                            energies = _energies(self.blocks, group, choice, change, found.inputs, smooth)
                        with lock:
                            sums[group.name, choice].add(added, *energies)

        for weight in weights.values():
            weight.requires_grad_(True)
        with observing(places, see):
            on_processor = self.blocks.device.type == "cpu"
            numbers = range(len(batches))
            side_by_side(work, numbers) if on_processor else list(map(work, numbers))
        for weight in weights.values():
            weight.requires_grad_(False)
        return sums

    def _changes(self, group: Group, choice: Choice) -> dict[str, Tensor]:
        """Ŵ - W of a group's members, float32; of smoothed parts, as they act in the plain model."""
        tensors = self.parts.tensors(self.parts.file(group.name, choice))
        scales = self.parts.scales(group, choice)
        found = {}
        for member in group.members:
            quantized = linear_weight(tensors, member.name, scheme(choice[0])).to(self.blocks.device)
            quantized = unfolded(member, quantized, scales)
            found[member.name] = quantized.sub_(self.blocks.places[member.name].weight.float())
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


def _product(
    group: Group,
    choice: Choice,
    change: Mapping[str, Tensor],
    inputs: Mapping[str, tuple[Tensor, Tensor | None]],
    slopes: Mapping[str, Tensor | None],
    scales: Scales,
) -> float:
    """Σ_t g_t·e_t of one sequence: the errors of all members act together."""
    total = 0.0
    for member in group.members:
        slope = slopes[member.name]
        if slope is not None:
            total += float((slope.float() * change[member.name]).sum())
    how = scheme(choice[0]).activations
    if how is not None:
        for first in {first_of(group, member.name) for member in group.members}:
            x, slope = inputs.get(first, (None, None))
            if x is not None and slope is not None:
                rounded = round_inputs(x, how, scales.get(f"{first}.columns"))
                total += float((slope.float() * (rounded - x).float()).sum())
    return total


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
