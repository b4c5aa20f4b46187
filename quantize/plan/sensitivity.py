"""What each module group loses at each scheme, three ways, from cheap to dear.

``sqnr_db``
    signal to quantization noise of the group's outputs on real inputs, 10 log10(Σ|Wx|² / Σ|Wx - Ŵx̂|²).
``fisher``
    second-order estimate of the KL divergence, nats per token: ½ E[(Σ_t g_t·e_t)²] / T, where e_t is the
    error of the group's output at token t and g_t the gradient, with respect to that output, of the
    log-likelihood of labels drawn from the model itself. The cross terms between tokens vanish in
    expectation, so this is ½ δᵀFδ with the full Fisher matrix F of the group, not its diagonal, and
    it covers rounded inputs as well as rounded weights (Amari 1998; Kim et al., arXiv:2306.07629 take the
    diagonal).
``kl``
    the mean KL itself with this group alone quantized, in torch.
``kl_served``
    the same from the engine's kernels, for schemes that an engine computes differently (see ``measure``).

One forward and backward pass per sample gives the first two for all groups and schemes; memory is the
model plus one sample's activations (with gradient checkpointing: of one block) plus the dequantized
weights of the groups at one scheme. The KL takes one forward pass over the samples per row. Rows are kept
as they come, so that an interrupted run goes on.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict
from tqdm import tqdm

from quantize.core.modules import Group
from quantize.core.schemes import scheme
from quantize.evaluate.bench import Bench, Span
from quantize.plan.served import Choice, ServedKl
from quantize.plan.simulated import SimulatedModel, round_inputs

if TYPE_CHECKING:
    from torch import Tensor

FIDELITY = 1.25
"""Engine and torch may differ by this factor in the KL of a uniform variant before rows are measured
on the engine itself."""


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
    kl: float
    kl_served: float | None = None

    @property
    def loss(self) -> float:
        """The best figure there is, nats per token."""
        return self.kl if self.kl_served is None else self.kl_served


class Sensitivity(BaseModel):
    """All rows, and what they were measured on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: tuple[Row, ...]
    tokens: int
    fidelity: Mapping[str, float]
    """scheme@method to KL(engine) / KL(torch) of the uniform variant, where both were measured."""

    def row(self, group: str, choice: Choice) -> Row:
        return next(r for r in self.rows if (r.group, r.scheme, r.method) == (group, *choice))


class Samples:
    """Outputs' energy, errors and gradients' products, summed over samples."""

    def __init__(self) -> None:
        self.signal: dict[str, float] = {}
        self.noise: dict[tuple[str, Choice], float] = {}
        self.products: dict[tuple[str, Choice], float] = {}
        self.tokens = 0


def analyse(
    model: SimulatedModel,
    choices: Mapping[str, Sequence[Choice]],
    keep: Path,
    seed: int = 0,
) -> tuple[Row, ...]:
    """Rows for every group (by name) and its ``choices``; finished rows are read from ``keep``."""
    groups = [group for group in model.modules if group.name in choices]
    known = _read_rows(keep)
    wanted = [(group, choice) for group in groups for choice in choices[group.name]]
    missing = [(group, choice) for group, choice in wanted if (group.name, *choice) not in known]
    if missing:
        samples = _second_order(model, missing, seed)
        reference = model.log_probabilities()
        keep.parent.mkdir(parents=True, exist_ok=True)
        with (
            keep.open("a", encoding="utf-8") as file,
            tqdm(missing, desc="sensitivity: KL", unit="row", file=sys.stderr) as bar,
        ):
            for group, choice in bar:
                row = Row(
                    group=group.name,
                    kind=group.kind,
                    layer=group.layer,
                    scheme=choice[0],
                    method=choice[1],
                    bytes=group.stored_bytes(scheme(choice[0])),
                    sqnr_db=_decibel(samples.signal[group.name], samples.noise[group.name, choice]),
                    fisher=samples.products[group.name, choice] / 2 / samples.tokens,
                    kl=model.kl({group.name: choice}, reference),
                )
                file.write(row.model_dump_json() + "\n")
                file.flush()
                os.fsync(file.fileno())
                known[group.name, *choice] = row
    return tuple(known[group.name, *choice] for group, choice in wanted)


def _read_rows(path: Path) -> dict[tuple[str, str, str], Row]:
    if not path.exists():
        return {}
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(Row.model_validate_json(line))
        except ValueError:
            continue  # a line that a killed run had begun
    return {(row.group, row.scheme, row.method): row for row in rows}


def _decibel(signal: float, noise: float) -> float:
    return 10 * math.log10(max(signal, 1e-30) / max(noise, 1e-30))


def _second_order(model: SimulatedModel, wanted: Sequence[tuple[Group, Choice]], seed: int) -> Samples:
    import torch

    generator = torch.Generator().manual_seed(seed)
    samples = Samples()
    chosen: dict[str, list[Choice]] = {}
    for group, choice in wanted:
        chosen.setdefault(group.name, []).append(choice)
    watched = [group for group in model.modules if group.name in chosen]
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(_module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            output.retain_grad()
            seen[name] = (inputs[0].detach(), output)

        return hook

    hooks = [
        model.model.get_submodule(member.name).register_forward_hook(watch(member.name))
        for group in watched
        for member in group.members
    ]
    embedding = model.model.get_input_embeddings()
    try:
        for tokens, start in tqdm(
            model.spans, desc="sensitivity: gradients", unit="sample", file=sys.stderr, leave=False
        ):
            with torch.enable_grad():
                inputs = embedding(torch.tensor([list(tokens)])).detach().requires_grad_()
                logits = model.model(inputs_embeds=inputs, use_cache=False).logits[0, start - 1 : -1]
                logp = torch.log_softmax(logits.float(), -1)
                labels = torch.multinomial(logp.detach().exp(), 1, generator=generator)
                torch.autograd.backward(logp.gather(1, labels).sum())
            for group in watched:
                _add(model, group, chosen[group.name], seen, samples)
            samples.tokens += len(tokens) - start
            seen.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return samples


def _add(
    model: SimulatedModel,
    group: Group,
    choices: Sequence[Choice],
    seen: Mapping[str, tuple[Tensor, Tensor]],
    samples: Samples,
) -> None:
    """Add one sample's sums for one group: the errors of all its members act together."""
    import torch

    with torch.no_grad():
        for member in group.members:
            output = seen[member.name][1]
            samples.signal[group.name] = samples.signal.get(group.name, 0.0) + float(output.square().sum())
        for choice in choices:
            how, product, noise = scheme(choice[0]), 0.0, 0.0
            for member, weight in zip(group.members, model.weights(group, *choice), strict=True):
                x, output = seen[member.name]
                rounded = round_inputs(x, how.activations) if how.activations else x
                module = model.model.get_submodule(member.name)
                error = torch.nn.functional.linear(rounded, weight, module.bias) - output
                noise += float(error.square().sum())
                if output.grad is not None:
                    product += float((output.grad * error).sum())
            key = (group.name, choice)
            samples.noise[key] = samples.noise.get(key, 0.0) + noise
            samples.products[key] = samples.products.get(key, 0.0) + product**2


def measure(
    model: SimulatedModel,
    rows: Sequence[Row],
    bench: Bench,
    spans: Sequence[Span],
    workdir: Path,
) -> Sensitivity:
    """Compare every choice's uniform variant on the engine with torch; where they differ by more than
    ``FIDELITY``, measure each of its rows on the engine. Finished measurements are kept in ``workdir``."""
    workdir.mkdir(parents=True, exist_ok=True)
    served = ServedKl(model, bench, spans, workdir)
    reference = model.log_probabilities()
    fidelity, refined = {}, {(row.group, row.scheme, row.method): row for row in rows}
    for choice in dict.fromkeys((row.scheme, row.method) for row in rows):
        mine = [row for row in rows if (row.scheme, row.method) == choice]
        together = {row.group: choice for row in mine}
        ratio = served(together) / max(model.kl(together, reference), 1e-12)
        fidelity["@".join(choice)] = ratio
        if 1 / FIDELITY <= ratio <= FIDELITY:
            continue
        label = f"sensitivity: {choice[0]} differs on the engine (x {ratio:.2f})"
        for row in tqdm(mine, desc=label, unit="row", file=sys.stderr):
            update = {"kl_served": served({row.group: choice})}
            refined[row.group, row.scheme, row.method] = row.model_copy(update=update)
    return Sensitivity(
        rows=tuple(refined.values()),
        tokens=sum(len(tokens) - start for tokens, start in spans),
        fidelity=fidelity,
    )
