"""A ``config.json``: what there is nothing to advise of, and what sizes follow from it alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantize.core.architectures import architecture
from quantize.core.model_config import TEXT_CONFIGS
from quantize.core.shape import ShapeError
from quantize.export.architectures import KNOWN
from quantize.export.encoder import is_encoder

SIZES = (
    *("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "intermediate_size"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
)
EXPERTS = ("num_experts", "num_local_experts", "moe_intermediate_size")
"""Sizes that are 0 as well where there are none."""
UNLIKE = (
    *("kv_lora_rank", "n_routed_experts", "n_shared_experts", "shared_expert_intermediate_size"),
    *("intermediate_size_mlp", "linear_num_value_heads", "mamba_d_state", "ssm_state_size", "conv_kernel"),
)
"""Settings of models whose matrices or caches are others than a Llama-like one's: compressed keys and values,
experts beside dense parts, states in place of attention."""


def refuse_unadvised(config: Mapping[str, Any], name: str, edge: bool) -> None:
    """Raise ShapeError for an architecture that the advised commands would refuse."""
    if is_encoder(config):
        raise ShapeError(
            f"{name} is an encoder, which writes nothing; `tiercel export classifier` makes a classifier of "
            "it"
        )
    if not config.get("architectures"):
        return
    known = architecture(config)
    if known.refused:
        raise ShapeError(f"{name}: {known.name}: {known.refused}")
    if edge and known.name not in KNOWN:
        raise ShapeError(
            f"{name}: {known.name} is not exported to GGUF here; known: {', '.join(KNOWN)}. What llama.cpp's "
            "own convert_hf_to_gguf.py writes can be registered (tiercel quantize register)"
        )


def like_llama(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """``config`` with what its architecture ties, where it does not say so. Raises ShapeError where sizes do
    not follow from it, were they counted as a Llama-like model's."""
    nested: Mapping[str, Any] = next(
        (config[key] for key in TEXT_CONFIGS if isinstance(config.get(key), dict)), {}
    )
    found = {**config, **nested}
    for key in (*SIZES, *EXPERTS):
        value = found.get(key) or (None if key in EXPERTS else found.get(key))
        if value is not None and not _is_count(value):
            raise ShapeError(f"{name}: config.json: {key} is {value!r}, not a number of 1 or more")
    if unlike := [key for key in UNLIKE if found.get(key)]:
        raise ShapeError(
            f"{name}: config.json has {unlike[0]}, which no Llama-like model has, and does not say what "
            "matrices there are; give the checkpoint's directory, or --parameters"
        )
    if config.get("architectures"):
        found["tie_word_embeddings"] = architecture(config).tied(config, found)
    return found


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
