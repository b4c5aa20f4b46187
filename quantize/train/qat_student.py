"""The student of quantization-aware training: a quantized checkpoint in torch, whose integers, step sizes and
norms are trained, and what it starts from.

It begins as the checkpoint: every stored integer, step size and zero point is what the first pass computes
with (:mod:`quantize.train.qat_fake`). Fixed scales of inputs and of the KV cache are trained as well, one for
all matrices that read the same inputs, since an engine has one for what it fuses. What is not quantized, a
head that is, and embeddings stay as they are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantize.core.dequantize import read_tensor, unpack
from quantize.core.modules import HEAD, Group, Linear, Modules
from quantize.core.plan import Plan
from quantize.core.schemes import Numbers, Scheme, kv_scheme, scheme
from quantize.core.tensors import Part
from quantize.make.blocks import Blocks
from quantize.make.kv_scales import KV_SCALES
from quantize.make.ranges import Grid, restored, round_inputs
from quantize.make.statistics import first_of
from quantize.numerics.formats import E4M3, Integer, integer
from quantize.plan.tune import spread
from quantize.train.qat_fake import (
    StoredScale,
    TrainedNorm,
    TrainedWeight,
    fake_tensor,
)

SCALE_RATE, NORM_RATE = 0.35, 0.35
"""Learning rates of step sizes (relative) and of norms (relative), over that of weights (in steps)."""
Original = Callable[[Linear], "Tensor | None"]
"""The float32 (N, K) weight that a linear had before it was quantized, in the basis of the checkpoint; None
where that is not known."""


@dataclass
class Student:
    """What is trained of some groups, by the names that it has on disk."""

    weights: dict[str, TrainedWeight] = field(default_factory=dict)
    schemes: dict[str, Scheme] = field(default_factory=dict)
    norms: dict[str, TrainedNorm] = field(default_factory=dict)
    inputs: dict[str, StoredScale] = field(default_factory=dict)
    """Fixed scales of inputs, by the first linear that reads them."""
    firsts: dict[str, str] = field(default_factory=dict)
    """Linear to the first that reads the same inputs."""
    cache: dict[str, StoredScale] = field(default_factory=dict)
    """Scales of keys and values: ``….self_attn.k_scale``."""

    def trained(self) -> dict[str, Tensor]:
        """Every tensor that is trained, by name."""
        found = {f"{name}.weight": one.latent for name, one in self.weights.items()}
        found |= {f"{name}.weight_scale": one.scale.change for name, one in self.weights.items()}
        found |= {f"{name}.norm": one.change for name, one in self.norms.items()}
        found |= {f"{name}.input_scale": one.change for name, one in self.inputs.items()}
        return found | {name: one.change for name, one in self.cache.items()}

    def rates(self) -> dict[str, float]:
        """Factors of the learning rate, by the names of :meth:`trained`: weights move in steps of their
        grid."""
        found = {}
        for name, one in self.weights.items():
            found[f"{name}.weight"] = float(one.scale.stored.float().mean())
            if not isinstance(one.form, Integer):  # E4M3: the steps of most values, not of the smallest
                found[f"{name}.weight"] = float(one.latent.detach().abs().mean()) / 16
        others = self.trained().keys() - found.keys()
        return found | {name: NORM_RATE if name.endswith(".norm") else SCALE_RATE for name in others}

    def latents(self) -> dict[str, Tensor]:
        """The same as :meth:`trained` without gradients, to be kept."""
        return {name: tensor.detach().clone() for name, tensor in self.trained().items()}

    def take(self, latents: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`latents` gave."""
        with torch.no_grad():
            for name, tensor in self.trained().items():
                tensor.copy_(latents[name])

    def add(self, other: Student) -> None:
        """Take in what is trained of other groups."""
        for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
            mine.update(theirs)


def begin(
    tensors: Mapping[str, Part],
    groups: Iterable[Group],
    plan: Plan,
    norms: Iterable[str],
    original: Original,
    saturating: bool = True,
    device: torch.device | str = "cpu",
) -> Student:
    """The student's part that is of ``groups``, from a checkpoint's stored ``tensors``, on ``device``.

    ``norms`` are names of norm modules that are trained with them. A head is left as it is.
    """

    def read(name: str) -> Tensor:
        return read_tensor(tensors[name]).to(device)

    student, attention = Student(), set[str]()
    for group in groups:
        how = scheme(plan.groups[group.name])
        if ".self_attn." in group.name:
            attention.add(group.name.partition(".self_attn.")[0] + ".self_attn")
        if how.weights is None or group.kind == HEAD:
            continue
        for member in group.members:
            codes, scale, grid = stored_grid(tensors, member.name, how, device)
            start, whole = StoredScale(scale, spread(scale)), original(member)
            whole = None if whole is None else whole.to(device)
            one = TrainedWeight.begin(codes, start, grid, whole, saturating)
            student.weights[member.name], student.schemes[member.name] = one, how
            first = first_of(group, member.name)
            student.firsts[member.name] = first
            if how.needs_calibration and first not in student.inputs:
                fixed = read(f"{first}.input_scale")
                student.inputs[first] = StoredScale(fixed, spread(fixed))
    for name in norms:
        stored = read(f"{name}.weight")
        wide = stored.float()
        change = torch.where(wide == 0, 0.0, spread(stored) / wide - 1)
        same = (wide * (1 + change)).to(stored.dtype) == stored
        student.norms[name] = TrainedNorm(stored, torch.where(same, change, 0.0))
    if kv_scheme(plan.kv).calibrated:
        for name in (f"{one}{leaf}" for one in attention for leaf in KV_SCALES):
            fixed = read(name)
            student.cache[name] = StoredScale(fixed, spread(fixed))
    return student


def stored_grid(
    tensors: Mapping[str, Part], module: str, how: Scheme, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Grid]:
    """A quantized module as it is stored: q (N, K), its scales in their type (N, groups), and the grid; on
    ``device``."""
    assert how.weights is not None
    w = how.weights
    scale = read_tensor(tensors[f"{module}.weight_scale"])
    if f"{module}.weight_packed" in tensors:
        n, k = (int(size) for size in read_tensor(tensors[f"{module}.weight_shape"]))
        codes = unpack(read_tensor(tensors[f"{module}.weight_packed"]), w.bits, k)
    else:
        codes = read_tensor(tensors[f"{module}.weight"])
        n, k = codes.shape
    zero = None
    if not w.symmetric:
        zero = read_tensor(tensors[f"{module}.weight_zero_point"])
        zero = unpack(zero.T, w.bits, n).T if zero.dtype == torch.int32 else zero.float()
    codes, scale = codes.to(device), scale.reshape(n, -1).to(device)
    zero = None if zero is None else zero.to(device)
    bits = how.range_bits or w.bits
    low, high = (None, None) if w.kind == "float" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return codes, scale, Grid(scale.float(), zero, low, high, w.group_size or k)


def fixed_weight(tensors: Mapping[str, Part], module: str, how: Scheme) -> Tensor:
    """The float32 (N, K) weight that a stored module stands for."""
    if how.weights is None:
        return read_tensor(tensors[f"{module}.weight"]).float()
    codes, _, grid = stored_grid(tensors, module, how)
    return restored(codes, grid)


class Seated:
    """A student in loaded blocks: before a pass :meth:`put` gives modules their weights as they are now."""

    def __init__(
        self, student: Student, blocks: Blocks, layers: Iterable[int], tensors: Mapping[str, Part]
    ) -> None:
        """``tensors`` are the checkpoint's, of which the loaded ``layers`` get what is not trained."""
        self.student = student
        self._modules = {name: blocks.places[name].module for name in student.weights}
        self._norms = {name: blocks.model.get_submodule(name) for name in student.norms}
        trained = {*self._modules, *self._norms}
        inside = next(name for name, one in blocks.model.named_modules() if one is blocks.layers)
        for layer in layers:
            for name, parameter in blocks.layers[layer].named_parameters():
                whole = f"{inside}.{layer}.{name}"
                if whole in tensors and whole.rpartition(".")[0] not in trained:
                    parameter.data = read_tensor(tensors[whole]).to(parameter.device, parameter.dtype)
                if whole.endswith(".bias") and whole in tensors:
                    parameter.data = read_tensor(tensors[whole]).to(parameter.device, parameter.dtype)
        self._hooks = [
            module.register_forward_pre_hook(self._rounding(name))
            for name, module in self._modules.items()
            if student.schemes[name].activations is not None
        ]

    def put(self) -> None:
        """Give the modules what they compute with, as tensors that gradients flow through."""
        for name, module in self._modules.items():
            _replace(module, self.student.weights[name].fake())
        for name, module in self._norms.items():
            _replace(module, self.student.norms[name].value())

    def __enter__(self) -> Seated:
        return self

    def __exit__(self, *_: object) -> None:
        """The modules are as before but for their weights, which the block's own take the place of."""
        for hook in self._hooks:
            hook.remove()
        for module in (*self._modules.values(), *self._norms.values()):
            module.__dict__.pop("weight", None)

    def _rounding(self, name: str) -> Any:
        how = self.student.schemes[name].activations
        fixed = self.student.inputs.get(self.student.firsts[name])

        def hook(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (_round(inputs[0], how, fixed), *inputs[1:])

        return hook


def _round(x: Tensor, how: Numbers | None, fixed: StoredScale | None) -> Tensor:
    """Inputs as a kernel would see them; gradients pass the rounding."""
    assert how is not None
    if fixed is not None:
        return fake_tensor(x, fixed.value(), integer(how.bits) if how.kind == "int" else E4M3)
    return x + (round_inputs(x, how) - x).detach()


class Cache:
    """Stands in for a KV cache of E4M3 keys and values: they come out as they would of one with the student's
    scales. Nothing is kept from one pass to the next."""

    def __init__(self, student: Student, attention: str) -> None:
        """``attention`` is the block's attention module, by its name on disk."""
        self._scales = [student.cache[attention + leaf] for leaf in KV_SCALES]

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys_scale, values_scale = (one.value() for one in self._scales)
        return fake_tensor(keys, keys_scale, E4M3), fake_tensor(values, values_scale, E4M3)

    def get_seq_length(self, *_: Any) -> int:
        return 0


def _replace(module: Any, weight: Tensor) -> None:
    """Give a module a weight that is no parameter of it."""
    module._parameters.pop("weight", None)
    module.__dict__["weight"] = weight


def attention_names(modules: Modules) -> dict[int, str]:
    """The attention module's name on disk, by layer."""
    return {
        group.layer: group.name.partition(".self_attn.")[0] + ".self_attn"
        for group in modules
        if ".self_attn." in group.name
    }
