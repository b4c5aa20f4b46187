"""The variants that ``tiercel quantize`` makes, as data: what is stored in how many bits, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

KV_FP8: dict[str, Any] = {
    "num_bits": 8,
    "type": "float",
    "strategy": "tensor",
    "dynamic": False,
    "symmetric": True,
}
"""FP8 (E4M3) KV cache with one calibrated scale per layer for keys and one for values."""


@dataclass(frozen=True)
class Recipe:
    """How a variant is made. ``weights``/``activations`` are compressed-tensors quantization arguments."""

    variant: str
    scheme: str
    method: str
    weight_bits: int
    weights: dict[str, Any]
    activations: dict[str, Any] | None = None
    kv_cache: dict[str, Any] | None = None

    @property
    def kv_cache_dtype(self) -> str:
        """vLLM's ``--kv-cache-dtype``."""
        return "fp8" if self.kv_cache else "auto"

    @property
    def kv_bytes(self) -> int:
        """Bytes per cached value (BF16 unless quantized)."""
        return 1 if self.kv_cache else 2

    def problems(self, shapes: dict[str, tuple[int, int]], head_dim: int) -> list[str]:
        """Why this recipe cannot be served for linear modules of these (N, K) shapes; empty if it can.

        The rules are those of vLLM's CPU kernels, which are the strictest target.
        """
        found = []
        group = self.weights.get("group_size") or 0
        for name, (n, k) in shapes.items():
            if n % 32:
                found.append(f"{name}: {n} output features, {self.scheme} needs a multiple of 32")
            if group and k % group:
                found.append(f"{name}: {k} input features, not a multiple of group size {group}")
        if self.kv_cache and head_dim % 32:
            found.append(f"head size {head_dim}: an FP8 KV cache needs a multiple of 32")
        return found


def _weights(bits: int, strategy: str, group_size: int | None = None) -> dict[str, Any]:
    arguments: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy}
    if group_size:
        arguments["group_size"] = group_size
    return arguments


_INT8_TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}

RECIPES: dict[str, Recipe] = {
    recipe.variant: recipe
    for recipe in (
        Recipe("int8", "w8a8", "gptq", 8, _weights(8, "channel"), activations=_INT8_TOKENS),
        Recipe("int4", "w4a16-g64", "gptq", 4, _weights(4, "group", 64)),
        Recipe("int4-kv8", "w4a16-g64", "gptq", 4, _weights(4, "group", 64), kv_cache=KV_FP8),
    )
}
"""Variant name to recipe."""
