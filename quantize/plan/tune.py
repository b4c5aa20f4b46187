"""Tunes what a variant keeps in 16 bits, so that the whole model says again what the reference says.

The stored integers stay as they are; scales, and the weights of norms, are trained by gradient descent to
lower the KL divergence from the reference on the calibration data (the second stage of EfficientQAT,
arXiv:2407.11062, with soft labels). No byte is added. The choosing conversations, which training does not
see, say when to stop. Memory, of the accelerator where there is one: the model in 32 bits, its gradients for
one batch, and the reference's log-probabilities of the calibration tokens.
"""

from __future__ import annotations

import math
import random
import sys
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from quantize.core.architectures import architecture
from quantize.core.checkpoint import Checkpoint
from quantize.core.dequantize import read_tensor, unpack
from quantize.core.legality import is_experts
from quantize.core.modules import Modules
from quantize.core.plan import Plan
from quantize.core.schemes import Numbers, Scheme, scheme
from quantize.core.tensors import Part, overwrite, read_parts
from quantize.evaluate.bench import Span
from quantize.make.ranges import round_inputs
from quantize.plan.simulated import SimulatedModel

if TYPE_CHECKING:
    import torch
    from torch import Tensor

STEPS = (240, 120, 60, 30)
"""As many as there is time for; fewer are not worth it."""
CHECKS = 12
"""Times that the loss on the choosing conversations is looked at."""
WARM_UP = 5
"""Steps in which the rate rises: Adam's first ones are as long as any, whatever the gradient."""
SEQUENCES, TOGETHER = 8, 4
"""Conversations of a step, and of one forward and backward pass."""
LABEL_BYTES, GPU_LABEL_BYTES = 5 << 29, 12 << 30
"""Of the reference's log-probabilities, all of which are kept."""
RATE, RATE_OF = 2e-3, 4e6
"""Adam's learning rate of the logarithms of scales, and of norms' weights relative to what they were, for a
model of so many weights: all of them change at once, so it falls with the root of their number."""


@dataclass
class Tuned:
    """New values of tensors by name, and the loss on the choosing conversations before and after."""

    tensors: dict[str, Tensor]
    before: float
    after: float


def untunable(checkpoint: Checkpoint, modules: Modules) -> str:
    """Why scales of this model cannot be trained here, or an empty string; known before any work.

    Modules are found by the names that they have on disk, which experts and wrappers do not have in memory.
    """
    if architecture(checkpoint.config).wrapper:
        return "that is not done inside of a model with images"
    if any(is_experts(group) for group in modules):
        return "that is not done with experts"
    return ""


class _Scaled:
    """A quantized linear module: fixed integers, trained scales."""

    def __init__(self, tensors: Mapping[str, Part], module: str, how: Scheme, device: torch.device) -> None:
        import torch

        assert how.weights is not None
        part = {
            name: read_tensor(tensors[f"{module}.{name}"])
            for name in ("weight", "weight_packed", "weight_zero_point", "weight_shape")
            if f"{module}.{name}" in tensors
        }
        self.scale = read_tensor(tensors[f"{module}.weight_scale"]).to(device)
        if "weight_packed" in part:
            n, k = (int(size) for size in part["weight_shape"])
            values = unpack(part["weight_packed"], how.weights.bits, k)
            if "weight_zero_point" in part and not how.weights.symmetric:
                zero = unpack(part["weight_zero_point"].T, how.weights.bits, n).T
                values = values - zero.repeat_interleave(-(-k // zero.shape[1]), 1)[:, :k]
        else:
            values = part["weight"].float()
        self.values, self.inputs = values.to(device), how.activations
        wide = self.scale.float()
        start = torch.where(wide == 0, 0.0, (spread(self.scale) / wide).log())
        self.change = start.requires_grad_()

    def scales(self) -> Tensor:
        """As they are stored: in the checkpoint's own 16 bits; gradients pass through the rounding."""
        wide = self.scale.float() * self.change.exp()
        return wide + (wide.to(self.scale.dtype).float() - wide).detach()

    def weight(self) -> Tensor:
        scale, k = self.scales(), self.values.shape[1]
        if scale.ndim == 2 and scale.shape[1] > 1:
            scale = scale.repeat_interleave(-(-k // scale.shape[1]), 1)[:, :k]
        return self.values * scale


def spread(stored: Tensor) -> Tensor:
    """Values in 32 bits, each drawn from those that are rounded to what is stored; of the same shape.

    What is stored lies in the middle of its interval. If training began there, all values would take the
    step to the next one at the same time, and a whole model's scales would jump at once by half a percent.
    """
    import torch

    bits = {torch.bfloat16: 7, torch.float16: 10}.get(stored.dtype)
    wide = stored.float()
    if bits is None:
        return wide
    step = torch.exp2(torch.floor(torch.log2(wide.abs().clamp_min(torch.finfo(torch.float32).tiny))) - bits)
    share = torch.rand(wide.shape, generator=torch.Generator().manual_seed(0)).to(wide.device)
    drawn = wide + (share - 0.5) * step
    return torch.where(drawn.to(stored.dtype) == stored, drawn, wide)


def labelled(sequences: Sequence[list[int]], vocabulary: int, accelerator: bool) -> list[list[int]]:
    """The first of ``sequences``, as many as there is room for the reference's log-probabilities of all their
    tokens, and at least those of one step."""
    room = (GPU_LABEL_BYTES if accelerator else LABEL_BYTES) // (4 * vocabulary)
    reached = list(accumulate(map(len, sequences)))
    return list(sequences[: max(SEQUENCES, bisect_right(reached, room))])


def tune(
    model: SimulatedModel,
    plan: Plan,
    assembled: Path,
    calibration: Sequence[Sequence[int]],
    steps: int = STEPS[0],
    seed: int = 0,
) -> Tuned:
    """Train the scales and norms of ``plan``, whose checkpoint lies in ``assembled``.

    Returns new tensors only if they are better on the model's choosing conversations.
    """
    import torch

    torch.manual_seed(seed)
    tensors = read_parts(assembled)
    spans: list[Span] = [(tokens, 1) for tokens in calibration if len(tokens) > 1]
    labels = model.log_probabilities(spans)
    reference = model.log_probabilities()
    linears = {
        member.name: _Scaled(tensors, member.name, scheme(plan.groups[group.name]), model.device)
        for group in model.modules
        if scheme(plan.groups[group.name]).weights is not None
        for member in group.members
    }
    norms = _norms(model.model, tensors)
    rest = _unquantized(model.model, tensors, {*linears, *norms})
    kept = {name: model.model.get_submodule(name).weight for name in (*linears, *norms)}
    changes = [one.change for one in linears.values()] + [change for _, change in norms.values()]
    weights = sum(one.values.numel() for one in linears.values())
    optimizer = torch.optim.Adam(changes, lr=RATE / max(1.0, weights / RATE_OF) ** 0.5, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    every = max(1, steps // CHECKS)
    kept_values: dict[str, Tensor] = {}
    rng, order = random.Random(seed), list(range(len(spans)))
    hooks = [
        model.model.get_submodule(name).register_forward_pre_hook(_rounding(one.inputs))
        for name, one in linears.items()
        if one.inputs is not None
    ]
    for name, tensor in rest.items():
        kept_values[name] = model.model.get_parameter(name).data
        model.model.get_parameter(name).data = tensor
    try:
        before = _now(model, reference, linears, norms)
        best, found = before, dict[str, "Tensor"]()
        with tqdm(range(1, steps + 1), desc="tune", unit="step", file=sys.stderr) as bar:
            for step in bar:
                picked = rng.sample(order, min(SEQUENCES, len(order)))
                optimizer.zero_grad()
                for at in range(0, len(picked), TOGETHER):
                    few = picked[at : at + TOGETHER]
                    _set(model.model, linears, norms)
                    loss = _loss(model.model, [spans[i] for i in few], [labels[i] for i in few])
                    torch.autograd.backward(loss * (len(few) / len(picked)))
                optimizer.step()
                schedule.step()
                if step % every == 0 or step == steps:
                    now = _now(model, reference, linears, norms)
                    bar.set_postfix(kl=f"{now:.5f}", before=f"{before:.5f}")
                    if now < best:
                        best, found = now, _stored(linears, norms)
    finally:
        for hook in hooks:
            hook.remove()
        for name, weight in kept.items():
            _restore(model.model.get_submodule(name), weight)
        for name, tensor in kept_values.items():
            model.model.get_parameter(name).data = tensor
    return Tuned(found, before, best)


def _now(
    model: SimulatedModel,
    reference: Sequence[Tensor],
    linears: Mapping[str, _Scaled],
    norms: Mapping[str, tuple[Tensor, Tensor]],
) -> float:
    """The loss on the choosing conversations with scales and norms as they would be stored."""
    import torch

    with torch.no_grad():
        _set(model.model, linears, norms)
        return model.divergence(reference)


def _unquantized(model: Any, tensors: Mapping[str, Part], trained: set[str]) -> dict[str, Tensor]:
    """Parameters by name as the variant has them where they are neither quantized nor trained.

    A smoothed model's differ from the reference's.
    """
    found = {}
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        if name in tensors and (leaf == "bias" or module not in trained):
            found[name] = read_tensor(tensors[name]).to(parameter.device, parameter.dtype)
    return found


def _norms(model: Any, tensors: Mapping[str, Part]) -> dict[str, tuple[Tensor, Tensor]]:
    """Norm modules by name: the stored weight, and the change to train (relative to it)."""
    import torch

    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.ndim == 1 and f"{name}.weight" in tensors:
            stored = read_tensor(tensors[f"{name}.weight"]).to(weight.device)
            wide = stored.float()
            start = torch.where(wide == 0, 0.0, spread(stored) / wide - 1)
            found[name] = (stored, start.requires_grad_())
    return found


def _norm_weight(stored: Tensor, change: Tensor) -> Tensor:
    wide = stored.float() * (1 + change)
    return wide + (wide.to(stored.dtype).float() - wide).detach()


def _set(model: Any, linears: Mapping[str, _Scaled], norms: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Put the weights as they are now into the modules, as tensors that gradients flow through."""
    for name, one in linears.items():
        _replace(model.get_submodule(name), one.weight())
    for name, (stored, change) in norms.items():
        _replace(model.get_submodule(name), _norm_weight(stored, change))


def _replace(module: Any, weight: Tensor) -> None:
    module._parameters.pop("weight", None)
    module.__dict__["weight"] = weight


def _restore(module: Any, weight: Any) -> None:
    module.__dict__.pop("weight", None)
    module._parameters["weight"] = weight


def _stored(linears: Mapping[str, _Scaled], norms: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    import torch

    with torch.no_grad():
        found = {f"{name}.weight_scale": one.scales().to(one.scale.dtype) for name, one in linears.items()}
        for name, (stored, change) in norms.items():
            found[f"{name}.weight"] = _norm_weight(stored, change).to(stored.dtype)
    return {name: tensor.cpu() for name, tensor in found.items()}


def _loss(model: Any, spans: Sequence[Span], labels: Sequence[Tensor]) -> Tensor:
    """Mean KL over the tokens of a few conversations, padded on the right."""
    import torch

    width = max(len(tokens) for tokens, _ in spans)
    ids = torch.zeros(len(spans), width, dtype=torch.long)
    for line, (tokens, _) in enumerate(spans):
        ids[line, : len(tokens)] = torch.tensor(list(tokens))
    logits = model(ids.to(model.device), use_cache=False).logits
    total, count = torch.zeros(()), 0
    for line, ((tokens, start), p) in enumerate(zip(spans, labels, strict=True)):
        q = torch.log_softmax(logits[line, start - 1 : len(tokens) - 1].float(), -1)
        total = total + (p.exp() * (p - q)).sum()
        count += len(p)
    return total / count


def _rounding(how: Numbers | None) -> Any:
    assert how is not None

    def hook(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        return (x + (round_inputs(x, how) - x).detach(), *inputs[1:])

    return hook


def write_tuned(tuned: Tuned, assembled: Path) -> None:
    """Put the new values into the assembled checkpoint, in place of the old ones of the same shape."""
    overwrite(read_parts(assembled), tuned.tensors)
