"""A model in torch whose module groups can be swapped for quantized ones, to steer the search.

The weights are the real ones of a variant, dequantized; inputs are rounded as the scheme says. What it
cannot show is what an engine's kernels do on top, so a plan that was found here is measured on the
engine before anything is concluded (decision: fake-quantized numbers accept nothing).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantize.evaluate.bench import Span
from quantize.modules import Group, Modules
from quantize.plan import Plan
from quantize.schemes import BLOCK, Numbers, Scheme, scheme
from quantize.shelf import Part, Shelf

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PACKED_BITS = 32
BATCH_TOKENS = 512
"""Tokens of a forward pass; the logits of so many take 4 bytes x vocabulary each."""


def read_tensor(part: Part) -> Tensor:
    """One tensor from disk, as stored."""
    import numpy as np
    import torch

    kinds = {
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "I32": torch.int32,
        "I64": torch.int64,
        "F8_E4M3": torch.float8_e4m3fn,
    }
    with part.file.open("rb") as file:
        file.seek(part.offset)
        raw = np.frombuffer(bytearray(file.read(part.bytes)), dtype=np.uint8)
    tensor: Tensor = torch.from_numpy(raw).view(kinds[part.dtype]).reshape(part.shape)
    return tensor


def dequantized(tensors: Mapping[str, Part], module: str, how: Scheme) -> Tensor:
    """The float32 (N, K) weight that a module of a compressed-tensors checkpoint stands for."""
    import torch

    if how.weights is None:
        return read_tensor(tensors[f"{module}.weight"]).float()
    part = {
        name: read_tensor(tensors[f"{module}.{name}"])
        for name in ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
        if f"{module}.{name}" in tensors
    }
    w, scale = how.weights, part["weight_scale"].float()
    if "weight_packed" in part:
        if w.kind != "int":
            raise NotImplementedError(f"{how.name}: packed floats are not read here")
        n, k = (int(size) for size in part["weight_shape"])
        values = unpack(part["weight_packed"], w.bits, k)
    else:
        values = part["weight"].float()
        n, k = values.shape
    zero = part.get("weight_zero_point")
    if zero is not None and zero.dtype == torch.int32:
        zero = unpack(zero.T, w.bits, n).T
    if w.strategy == "block":
        scale = scale.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]
    elif scale.ndim == 2 and scale.shape[1] > 1:
        repeats = -(-k // scale.shape[1])
        scale = scale.repeat_interleave(repeats, 1)[:, :k]
        zero = zero.repeat_interleave(repeats, 1)[:, :k] if zero is not None else None
    if zero is not None and not w.symmetric:
        values = values - zero.float()
    weight: Tensor = values * scale
    return weight


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """compressed-tensors' packing undone: int32 (rows, words) to signed values (rows, columns), float32.

    Each word holds ``32 // bits`` values, lowest bits first, stored with an offset of 2^(bits - 1).
    """
    import torch

    shifts = torch.arange(0, PACKED_BITS // bits * bits, bits, dtype=torch.int32)
    values = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    signed: Tensor = values.reshape(packed.shape[0], -1)[:, :columns] - 2 ** (bits - 1)
    return signed.float()


def round_inputs(x: Tensor, how: Numbers) -> Tensor:
    """Inputs (…, K) as a kernel would see them, one range per token, in the dtype of ``x``."""
    import torch

    wide: Tensor = x.float()
    if how.kind == "float":
        top = torch.finfo(torch.float8_e4m3fn).max
        scale = (wide.abs().amax(-1, keepdim=True) / top).clamp_min(1e-12)
        wide = (wide / scale).to(torch.float8_e4m3fn).float() * scale
        return wide.to(x.dtype)
    levels = 2 ** (how.bits - 1) - 1
    if how.symmetric:
        scale = (wide.abs().amax(-1, keepdim=True) / levels).clamp_min(1e-12)
        wide = (wide / scale).round().clamp(-levels - 1, levels) * scale
        return wide.to(dtype=x.dtype)
    low, high = wide.amin(-1, keepdim=True).clamp_max(0), wide.amax(-1, keepdim=True).clamp_min(0)
    scale = ((high - low) / (2**how.bits - 1)).clamp_min(1e-12)
    wide = ((wide - low) / scale).round() * scale + low
    return wide.to(x.dtype)


class FakeModel:
    """The reference in torch, and any plan over it. ``choice`` is (scheme, method) of a group."""

    def __init__(self, shelf: Shelf, spans: Sequence[Span], dtype: torch.dtype | None = None) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.shelf, self.modules = shelf, shelf.modules
        self.spans = spans
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            shelf.checkpoint.path, dtype=dtype or torch.float32, local_files_only=True
        ).eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self._quantized: dict[tuple[str, str, str], list[Tensor]] = {}

    def weights(self, group: Group, scheme_name: str, method: str) -> list[Tensor]:
        """Dequantized weights of a group's members, read once."""
        key = (group.name, scheme_name, method)
        if key not in self._quantized:
            tensors = self.shelf.tensors(self.shelf.part(scheme_name, method))
            self._quantized[key] = [
                dequantized(tensors, member.name, scheme(scheme_name)).to(self.model.dtype)
                for member in group.members
            ]
        return self._quantized[key]

    @contextlib.contextmanager
    def swapped(self, choices: Mapping[str, tuple[str, str]]) -> Iterator[None]:
        """Within the block, the groups named in ``choices`` are quantized as chosen."""
        kept, hooks = [], []
        try:
            for group in self.modules:
                name, method = choices.get(group.name, ("bf16", ""))
                how = scheme(name)
                if how.weights is None:
                    continue
                for member, weight in zip(group.members, self.weights(group, name, method), strict=True):
                    module = self.model.get_submodule(member.name)
                    kept.append((module, module.weight.data))
                    module.weight.data = weight
                    if how.activations:
                        hooks.append(module.register_forward_pre_hook(_rounding(how.activations)))
            yield
        finally:
            for module, weight in kept:
                module.weight.data = weight
            for hook in hooks:
                hook.remove()

    def log_probabilities(self, spans: Sequence[Span] | None = None) -> list[Tensor]:
        """Per span, (scored tokens, vocabulary) float32.

        Spans of like length share a batch, padded on the right, which a causal model does not look at.
        """
        import torch

        wanted = self.spans if spans is None else spans
        rows: dict[int, Tensor] = {}
        with torch.inference_mode():
            for batch in _batches([len(tokens) for tokens, _ in wanted]):
                width = max(len(wanted[number][0]) for number in batch)
                ids = torch.zeros(len(batch), width, dtype=torch.long)
                for line, number in enumerate(batch):
                    tokens = wanted[number][0]
                    ids[line, : len(tokens)] = torch.tensor(list(tokens))
                logits = self.model(ids, use_cache=False).logits
                for line, number in enumerate(batch):
                    tokens, start = wanted[number]
                    scored = logits[line, start - 1 : len(tokens) - 1]
                    rows[number] = torch.log_softmax(scored.float(), -1)
        return [rows[number] for number in range(len(wanted))]

    def kl(self, choices: Mapping[str, tuple[str, str]], reference: Sequence[Tensor]) -> float:
        """Mean KL(reference || quantized) in nats per scored token."""
        with self.swapped(choices):
            return mean_kl(reference, self.log_probabilities())


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


def mean_kl(reference: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    total = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(reference, other, strict=True))
    return total / sum(len(p) for p in reference)


def _rounding(how: Numbers) -> Any:
    return lambda _module, inputs: (round_inputs(inputs[0], how), *inputs[1:])
