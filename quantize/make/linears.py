"""The linear modules of a checkpoint, found in a model in torch: their weights, and what goes into them.

Names are those of the checkpoint on disk (:class:`quantize.core.modules.Linear`). A model in memory differs
from it in two ways: wrappers name their text part in another way, and transformers keeps the experts of a
layer as two tensors, ``gate_up_proj`` (E experts, 2 I, H) and ``down_proj`` (E, H, I), where the disk has
three matrices per expert (``gate_proj``, ``up_proj``, ``down_proj``; Mixtral's ``w1``, ``w3``, ``w2``).

    places = find_linears(model, modules.linears)
    weight = places["model.layers.0.mlp.experts.3.up_proj"].weight      # (N, K), a view
    with exchanged(places, {name: dequantized}), observing(places, hook):
        model(ids)                                                      # hook(name, inputs (…, K))

Works on the meta device as well (shapes only).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantize.core.modules import Linear

if TYPE_CHECKING:
    import torch
    from torch import Tensor

InputHook = Callable[[str, "Tensor"], "Tensor | None"]
"""Called with a linear's name and its inputs (…, K); what it returns, if anything, takes their place."""

_IN_LAYER = re.compile(r".*?\blayers\.(\d+)\.(.+)")
_IN_EXPERT = re.compile(r"(.*\bexperts)\.(\d+)\.(\w+)")
_AS_IN_MEMORY = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_BLOCKS_AS_IN_MEMORY = {"block_sparse_moe": "mlp"}
HEAD = "lm_head"


class LinearError(LookupError):
    """A model in torch has no such linear module. The text names it and the model's class."""


@dataclass(frozen=True)
class Place:
    """Where one linear lies in a model: a module of its own, or one expert's part of a stacked tensor."""

    name: str
    module: torch.nn.Module
    expert: int | None = None
    projection: str = ""

    @property
    def weight(self) -> Tensor:
        """The (N, K) weight; a view, so that writing into it writes into the model."""
        module: Any = self.module
        if self.expert is None:
            whole: Tensor = module.weight.data
            return whole
        if self.projection == "down_proj":
            down: Tensor = module.down_proj.data[self.expert]
            return down
        both: Tensor = module.gate_up_proj.data[self.expert]
        half = both.shape[0] // 2
        return both[:half] if self.projection == "gate_proj" else both[half:]

    def write(self, weight: Tensor) -> None:
        """Copy an (N, K) weight into the model, in the model's dtype and on its device."""
        self.weight.copy_(weight)


def decoder_layers(model: Any) -> torch.nn.ModuleList:
    """The blocks of the text part, in order."""
    layers: torch.nn.ModuleList = model.get_decoder().layers
    return layers


def stored_names(name: str) -> Iterator[str]:
    """A parameter's name in memory, and those that the disk may have for it (Mixtral's differ)."""
    yield name
    for on_disk, in_memory in _BLOCKS_AS_IN_MEMORY.items():
        yield name.replace(f".{in_memory}.", f".{on_disk}.")


def find_linears(model: Any, linears: Iterable[Linear]) -> dict[str, Place]:
    """The place of every linear, by its name on disk. Raises LinearError, also where a shape differs."""
    layers = decoder_layers(model)
    places = {}
    for linear in linears:
        place = _find(model, layers, linear.name)
        if (found := tuple(place.weight.shape)) != (linear.out_features, linear.in_features):
            raise LinearError(
                f"{linear.name} is {found} in {type(model).__name__}, "
                f"{(linear.out_features, linear.in_features)} on disk"
            )
        places[linear.name] = place
    return places


def _find(model: Any, layers: torch.nn.ModuleList, name: str) -> Place:
    if name.rpartition(".")[2] == HEAD:
        return Place(name, model.get_output_embeddings())
    if (found := _IN_LAYER.fullmatch(name)) is None or int(found[1]) >= len(layers):
        raise LinearError(f"{name} lies in none of the {len(layers)} blocks of {type(model).__name__}")
    block, within = layers[int(found[1])], found[2]
    within = ".".join(_BLOCKS_AS_IN_MEMORY.get(part, part) for part in within.split("."))
    expert = _IN_EXPERT.fullmatch(within)
    if expert is None:
        return Place(name, _submodule(block, within, name))
    projection = _AS_IN_MEMORY.get(expert[3], expert[3])
    experts: Any = _submodule(block, expert[1], name)
    if hasattr(experts, "gate_up_proj"):
        if getattr(experts, "is_transposed", False) or not getattr(experts, "is_concatenated", True):
            raise LinearError(
                f"{name}: {type(experts).__name__} stores its experts transposed or interleaved, which is "
                "not read here"
            )
        return Place(name, experts, int(expert[2]), projection)
    return Place(name, _submodule(experts, f"{expert[2]}.{projection}", name))


def _submodule(parent: Any, path: str, name: str) -> torch.nn.Module:
    try:
        module: torch.nn.Module = parent.get_submodule(path)
    except AttributeError:
        raise LinearError(f"{name}: {type(parent).__name__} has no {path}") from None
    return module


@contextlib.contextmanager
def exchanged(places: Mapping[str, Place], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block, the named linears have these (N, K) weights.

    A module's own weight is exchanged by reference (so in the dtype given); an expert's is copied, and a
    copy of what was there is kept for the time of the block.
    """
    kept: list[tuple[Place, Tensor]] = []
    try:
        for name, weight in weights.items():
            place = places[name]
            if place.expert is None:
                module: Any = place.module
                kept.append((place, module.weight.data))
                module.weight.data = weight
            else:
                kept.append((place, place.weight.clone()))
                place.write(weight)
        yield
    finally:
        for place, before in reversed(kept):
            if place.expert is None:
                whole: Any = place.module
                whole.weight.data = before
            else:
                place.write(before)


@contextlib.contextmanager
def observing(places: Mapping[str, Place], hook: InputHook) -> Iterator[None]:
    """Within the block, ``hook`` sees the inputs of every linear in ``places`` whenever the model runs.

    The rows that an expert sees are those of the tokens that the router sent to it: (tokens, K), and no
    call where there are none. ``gate_proj`` and ``up_proj`` of an expert have the same inputs: the hook is
    called for the first of them that is in ``places``, and what it returns goes into both.
    """
    handles, stacked = [], dict[int, tuple[Any, dict[tuple[int, str], str]]]()
    for place in places.values():
        if place.expert is None:
            handles.append(place.module.register_forward_pre_hook(_pre_hook(place.name, hook)))
        else:
            _, names = stacked.setdefault(id(place.module), (place.module, {}))
            names[place.expert, place.projection] = place.name
    try:
        for experts, names in stacked.values():
            experts.forward = _experts_forward(experts, names, hook)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for experts, _ in stacked.values():
            del experts.forward  # the class's own is behind it


def _pre_hook(name: str, hook: InputHook) -> Any:
    def seen(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        other = hook(name, inputs[0])
        return None if other is None else (other, *inputs[1:])

    return seen


def _experts_forward(experts: Any, names: Mapping[tuple[int, str], str], hook: InputHook) -> Any:
    """The forward pass of stacked experts, one after another, with the inputs of each shown to ``hook``.

    The same sum as transformers' own loop over experts: rows of ``hidden_states`` (tokens, H), the experts
    of each row ``top_k_index`` (tokens, k) and their ``top_k_weights`` (tokens, k).
    """
    import torch
    from torch.nn.functional import linear

    def shown(expert: int, projections: tuple[str, ...], x: Tensor) -> Tensor:
        name = next((names[expert, one] for one in projections if (expert, one) in names), None)
        other = hook(name, x) if name is not None else None
        return x if other is None else other

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for expert in range(experts.gate_up_proj.shape[0]):
            rows, places = torch.where(top_k_index == expert)
            if not len(rows):
                continue
            x = shown(expert, ("gate_proj", "up_proj"), hidden_states[rows])
            inner = experts._apply_gate(linear(x, experts.gate_up_proj[expert]))
            inner = shown(expert, ("down_proj",), inner)
            part = linear(inner, experts.down_proj[expert]) * top_k_weights[rows, places, None]
            out.index_add_(0, rows, part.to(out.dtype))
        return out

    return forward
