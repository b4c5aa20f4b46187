"""A model in torch of which one thing is rounded: its weights, what goes into its linear modules, or its keys
and values. Computes in float32, one matrix multiplication after another: what an engine's kernels do is not
in it, nor are embeddings, head and norms rounded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from quantize.core.checkpoint import Checkpoint
from quantize.core.loading import load_model
from quantize.core.modules import Modules
from quantize.explore.found import What
from quantize.make.blocks import Files
from quantize.make.linears import Place, find_linears, observing
from quantize.make.threads import side_by_side
from quantize.numerics.quantizers import Quantizer, quantizer

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 64
"""Inputs of a weight that share a scale."""


def weights_at(bits: int) -> str:
    """Signs at the mean magnitude for one bit; else integers, at the range of least error where there are so
    few of them that it is not the whole one."""
    if bits == 1:
        return f"binary-g{GROUP}"
    return f"int{bits}-g{GROUP}" + "-mse" * (bits < 6)


def tokens_at(bits: int) -> str:
    """Of inputs, a range per token; of keys and values, per token and head."""
    return "binary" if bits == 1 else f"int{bits}-asym"


def quantizer_for(what: What, bits: int) -> str:
    return weights_at(bits) if what == "weights" else tokens_at(bits)


class RoundedModel:
    """The model in memory once: weights are rounded in place, and read anew from the files afterwards."""

    def __init__(self, checkpoint: Checkpoint, modules: Modules) -> None:
        import torch

        self.checkpoint, self.modules = checkpoint, modules
        self.model: Any = load_model(checkpoint, torch.float32).requires_grad_(False)
        self.places = find_linears(self.model, modules.linears)
        self._files = Files(checkpoint.path)
        self._kv: Quantizer | None = None

    def weight(self, name: str) -> Tensor:
        """A linear's (N, K) weight as it is stored, float32."""
        return self._files[f"{name}.weight"].float()

    @contextlib.contextmanager
    def rounded(self, what: What, bits: int) -> Iterator[None]:
        """Within the block, ``what`` is rounded to ``bits`` bits."""
        if what == "nothing":
            yield
            return
        one = quantizer(quantizer_for(what, bits))
        match what:
            case "weights":
                with self._weights(one):
                    yield
            case "inputs":
                with observing(self.places, lambda _name, x: one.fake(x)):
                    yield
            case "kv":
                self._kv = one
                try:
                    yield
                finally:
                    self._kv = None

    @contextlib.contextmanager
    def _weights(self, one: Quantizer) -> Iterator[None]:
        def write(place: Place) -> None:
            place.write(one.fake(self.weight(place.name)))

        def restore(place: Place) -> None:
            place.write(self.weight(place.name))

        try:
            side_by_side(write, list(self.places.values()))
            yield
        finally:
            side_by_side(restore, list(self.places.values()))

    def cache(self) -> Any:
        """A KV cache that rounds what is put into it, where that is asked for."""
        from transformers import DynamicCache

        made = DynamicCache(config=self.model.config)
        one, update = self._kv, made.update
        if one is not None:

            def rounding(keys: Tensor, values: Tensor, *args: Any, **more: Any) -> Any:
                return update(one.fake(keys), one.fake(values), *args, **more)

            made.update = rounding
        return made
