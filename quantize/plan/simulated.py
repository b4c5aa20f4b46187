"""A model in torch whose module groups can be swapped for quantized ones, to steer the search.

The weights are the real ones of a variant, dequantized; inputs are rounded as the scheme says. What it
cannot show is what an engine's kernels do on top, so a plan that was found here is measured on the
engine before anything is concluded (decision: fake-quantized numbers accept nothing).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantize.core.dequantize import dequantized
from quantize.core.loading import load_model
from quantize.core.modules import Group, Modules
from quantize.core.plan import Plan
from quantize.core.schemes import Numbers, scheme
from quantize.evaluate.bench import Span
from quantize.make.blocks import best_device
from quantize.make.linears import exchanged, find_linears, observing
from quantize.make.parts import PartStore
from quantize.make.ranges import round_inputs
from quantize.make.smooth import unfolded

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BATCH_TOKENS = 512
"""Tokens of a forward pass; the logits of so many take 4 bytes x vocabulary each."""


class SimulatedModel:
    """The reference in torch, and any plan over it. ``choice`` is (scheme, method) of a group."""

    def __init__(
        self,
        parts: PartStore,
        spans: Sequence[Span],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        """``device`` is the accelerator by default, where there is one."""
        import torch

        self.parts, self.modules = parts, parts.modules
        self.spans, self.device = spans, device or best_device()
        self.model: Any = load_model(parts.checkpoint, dtype or torch.float32).to(self.device)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self.places = find_linears(self.model, self.modules.linears)
        self._quantized: dict[tuple[str, str, str], list[Tensor]] = {}

    def weights(self, group: Group, scheme_name: str, method: str) -> list[Tensor]:
        """Dequantized weights of a group's members, as they act in the model without smoothing; read once."""
        key = (group.name, scheme_name, method)
        if key not in self._quantized:
            self.parts.make({group.name: [(scheme_name, method)]})
            tensors = self.parts.tensors(self.parts.file(group.name, (scheme_name, method)))
            scales = self.parts.scales(group, (scheme_name, method))
            found = [
                unfolded(member, dequantized(tensors, member.name, scheme(scheme_name)), scales)
                for member in group.members
            ]
            self._quantized[key] = [weight.to(self.device, self.model.dtype) for weight in found]
        return self._quantized[key]

    @contextlib.contextmanager
    def swapped(self, choices: Mapping[str, tuple[str, str]]) -> Iterator[None]:
        """Within the block, the groups named in ``choices`` are quantized as chosen."""
        weights: dict[str, Tensor] = {}
        inputs: dict[str, tuple[Numbers, Tensor | None]] = {}
        for group in self.modules:
            name, method = choices.get(group.name, ("bf16", ""))
            how = scheme(name)
            if how.weights is None:
                continue
            for member, weight in zip(group.members, self.weights(group, name, method), strict=True):
                weights[member.name] = weight
                if how.activations:
                    scales = self.parts.scales(group, (name, method))
                    inputs[member.name] = how.activations, scales.get(f"{member.name}.columns")
        rounded = {name: self.places[name] for name in inputs}
        with (
            exchanged(self.places, weights),
            observing(rounded, lambda name, x: round_inputs(x, *inputs[name])),
        ):
            yield

    def log_probabilities(self, spans: Sequence[Span] | None = None) -> list[Tensor]:
        """Per span, (scored tokens, vocabulary) float32.

        Spans of like length share a batch, padded on the right, which a causal model does not look at.
        """
        wanted = self.spans if spans is None else spans
        rows: dict[int, Tensor] = {}
        for batch in _batches([len(tokens) for tokens, _ in wanted]):
            rows |= self._rows(wanted, batch)
        return [rows[number] for number in range(len(wanted))]

    def divergence(self, reference: Sequence[Tensor]) -> float:
        """Mean KL(reference || the model as it is now) in nats per scored token of its own spans, whose
        :meth:`log_probabilities` the reference's are; those of one batch are in memory beside them."""
        total = 0.0
        for batch in _batches([len(tokens) for tokens, _ in self.spans]):
            for number, q in self._rows(self.spans, batch).items():
                p = reference[number]
                total += float((p.exp() * (p - q)).sum())
        return total / sum(len(p) for p in reference)

    def _rows(self, wanted: Sequence[Span], batch: Sequence[int]) -> dict[int, Tensor]:
        """Log-probabilities of the spans of one batch, by number."""
        import torch

        width = max(len(wanted[number][0]) for number in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        for line, number in enumerate(batch):
            tokens = wanted[number][0]
            ids[line, : len(tokens)] = torch.tensor(list(tokens))
        rows = {}
        with torch.inference_mode():
            logits = self.model(ids.to(self.device), use_cache=False).logits
            for line, number in enumerate(batch):
                tokens, start = wanted[number]
                scored = logits[line, start - 1 : len(tokens) - 1]
                rows[number] = torch.log_softmax(scored.float(), -1)
        return rows

    def kl(self, choices: Mapping[str, tuple[str, str]], reference: Sequence[Tensor]) -> float:
        """Mean KL(reference || quantized) in nats per scored token."""
        with self.swapped(choices):
            return self.divergence(reference)


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of sequences, by length, in batches of at most ``BATCH_TOKENS`` padded tokens."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda one: lengths[one]):
        if batch and lengths[number] * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def plan_choices(plan: Plan, modules: Modules) -> dict[str, tuple[str, str]]:
    return {group.name: (plan.groups[group.name], plan.method_of(group.name)) for group in modules}
