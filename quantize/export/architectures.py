"""What llama.cpp has to be told of an architecture, and how it lays out what transformers lays out otherwise.

Only architectures of which both give the same logits (``tests/quantize/export`` tries each) are written; the
others are refused before any work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantize.core.checkpoint import Checkpoint
from quantize.core.model_config import read_config
from quantize.export.types import ExportError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GEMMA_PERIOD = 6
"""Every sixth layer of Gemma 3 looks at the whole context; llama.cpp knows no other pattern of it."""
FULL, SLIDING = "full_attention", "sliding_attention"
YARN: Mapping[str, float | bool] = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
"""Settings of YaRN's range: llama.cpp has no others, whatever keys GGUF has for them."""


@dataclass(frozen=True)
class Architecture:
    """``name`` is llama.cpp's. ``activation``: the only one that it computes there."""

    name: str
    activation: tuple[str, ...]
    rotates_pairs: bool = False
    """Whether neighbouring values are rotated together, as in Meta's own checkpoints: rows of queries and
    keys are put in that order."""
    norm_offset: float = 0.0
    """What is added to norms, which transformers adds when it computes."""
    biases: tuple[str, ...] = ()
    """Last parts of the names of modules that it adds a bias in."""


_QKV = ("q_proj", "k_proj", "v_proj")
_LLAMA = Architecture(
    "llama", ("silu",), rotates_pairs=True, biases=(*_QKV, "o_proj", "gate_proj", "up_proj", "down_proj")
)
KNOWN: Mapping[str, Architecture] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Architecture("qwen2", ("silu",), biases=_QKV),
    "Qwen3ForCausalLM": Architecture("qwen3", ("silu",)),
    "Gemma3ForCausalLM": Architecture("gemma3", ("gelu_pytorch_tanh",), norm_offset=1.0),
}


def architecture_of(checkpoint: Checkpoint) -> Architecture:
    """Raises ExportError for one that is not written here, or a setting that llama.cpp computes otherwise."""
    named = (checkpoint.config.get("architectures") or ["none"])[0]
    if named not in KNOWN:
        raise ExportError(
            f"{checkpoint.path}: {named} is not exported to GGUF here; known: {', '.join(KNOWN)}. "
            "llama.cpp's own convert_hf_to_gguf.py may know it; register what it writes"
        )
    if checkpoint.config.get("quantization_config"):
        raise ExportError(
            f"{checkpoint.path} is quantized already; export the 16-bit checkpoint that it was made from"
        )
    found, config = KNOWN[named], settings_of(checkpoint)
    for name, value, wanted in _limits(checkpoint, found, config):
        raise ExportError(
            f"{checkpoint.path}/config.json: {name} is {value}, llama.cpp computes a {found.name} with "
            f"{wanted}; serve it with vLLM"
        )
    return found


def settings_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What ``config.json`` says, and of what it does not say what its class in transformers has: how older
    ones are to be read as well, such as Gemma 3's two kinds of rotary embeddings. Raises CheckpointError."""
    filled = dict(read_config(checkpoint.path).get_text_config().to_dict())
    said = {key: value for key, value in checkpoint.text_config.items() if not key.startswith("rope")}
    return {**filled, **said}


def _limits(checkpoint: Checkpoint, found: Architecture, config: Mapping[str, Any]) -> Any:
    """(name, value, what llama.cpp has) of every setting that it computes otherwise."""
    activation = config.get("hidden_activation") or config.get("hidden_act") or found.activation[0]
    if activation not in found.activation:
        yield "hidden_act", activation, found.activation[0]
    if (part := float(_rope(config).get("partial_rotary_factor") or 1.0)) != 1.0:
        yield "partial_rotary_factor", part, "1.0"
    if config.get("attention_multiplier") or config.get("residual_multiplier"):
        yield "attention_multiplier", config.get("attention_multiplier"), "none"
    if _scaling(config) not in ("default", "linear", "llama3", "yarn"):
        yield "rope_type", _scaling(config), "default, linear, llama3 or yarn"
    if _scaling(config) == "llama3" and found.name != "llama":
        yield "rope_type", "llama3", "other scalings"
    for setting, usual in YARN.items() if _scaling(config) == "yarn" else ():
        value = _rope(config).get(setting, usual)
        if value != usual and (value or setting == "truncate"):  # 0 is none
            yield f"{setting} of YaRN", value, usual
    if config.get("attention_bias") and not found.biases:
        yield "attention_bias", True, "no biases"
    if found.name != "gemma3":
        types = config.get("layer_types") or ()
        window = config.get("sliding_window") if config.get("use_sliding_window", not types) else None
        if SLIDING in types:
            window = config.get("sliding_window")
        if window and int(window) < checkpoint.max_model_len:
            yield "sliding_window", window, "the whole context"
        return
    if (scalar := config["query_pre_attn_scalar"]) != checkpoint.head_dim:
        yield "query_pre_attn_scalar", scalar, f"that of the head size, {checkpoint.head_dim}"
    types = config["layer_types"]
    pattern = [FULL if (at + 1) % GEMMA_PERIOD == 0 else SLIDING for at in range(len(types))]
    if list(types) != pattern:
        yield "layer_types", "another pattern", f"a full layer after every {GEMMA_PERIOD - 1}"
    if (scaled := _scaling(config, SLIDING)) != "default":
        yield f"rope_type of {SLIDING}", scaled, "default"
    if config.get("use_bidirectional_attention"):
        yield "use_bidirectional_attention", True, "what came before alone"
    if not math.isclose(_attention_factor(config), 1.0, rel_tol=1e-4):
        yield "attention_factor of YaRN", "another", "that of the factor alone, in all layers"
    if config.get("attn_logit_softcapping"):
        yield "attn_logit_softcapping", config["attn_logit_softcapping"], "none"


def _rope(config: Mapping[str, Any], layers: str = FULL) -> Mapping[str, Any]:
    """Settings of rotary embeddings of those layers, as transformers has them."""
    found = config.get("rope_parameters") or {}
    if isinstance(found.get(layers), Mapping):
        found = found[layers]
    return {key: value for key, value in found.items() if value is not None}


def _scaling(config: Mapping[str, Any], layers: str = FULL) -> str:
    rope = _rope(config, layers)
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _factor(config: Mapping[str, Any]) -> float:
    """How many times as long a linear or YaRN's scaling makes the context."""
    rope = _rope(config)
    if "factor" in rope:
        return float(rope["factor"])
    return float(config["max_position_embeddings"]) / float(rope["original_max_position_embeddings"])


def _attention_factor(config: Mapping[str, Any]) -> float:
    """By how much more than by llama.cpp's own rule, of the factor alone, YaRN scales queries and keys."""
    if _scaling(config) != "yarn":
        return 1.0
    rope, factor = _rope(config), _factor(config)

    def usual(scale: float = 1.0) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    found = rope.get("attention_factor")
    if found is None:
        one, other = (float(rope.get(name) or 0) for name in ("mscale", "mscale_all_dim"))
        found = usual(one) / usual(other) if one and other else usual()
    return float(found) / usual()


def add_settings(writer: Any, checkpoint: Checkpoint, found: Architecture) -> None:
    """Write what llama.cpp needs to know into a ``gguf.GGUFWriter``."""
    config = settings_of(checkpoint)
    heads = int(config["num_attention_heads"])
    writer.add_context_length(checkpoint.max_model_len)
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_key_length(checkpoint.head_dim)
    writer.add_value_length(checkpoint.head_dim)
    writer.add_rope_dimension_count(checkpoint.head_dim)
    writer.add_vocab_size(int(config["vocab_size"]))
    rope = _rope(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if _scaling(config) in ("linear", "yarn"):
        from gguf.constants import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType(_scaling(config)))
        writer.add_rope_scaling_factor(_factor(config))
        if (attention := _attention_factor(config)) != 1.0:
            writer.add_rope_scaling_attn_factors(attention)
        if original := rope.get("original_max_position_embeddings"):
            writer.add_rope_scaling_orig_ctx_len(int(original))
    if found.name == "gemma3":
        writer.add_sliding_window(int(config["sliding_window"]))
        writer.add_rope_freq_base_swa(float(_rope(config, SLIDING)["rope_theta"]))
        if cap := config.get("final_logit_softcapping"):
            writer.add_final_logit_softcapping(float(cap))


def rope_factors(checkpoint: Checkpoint) -> NDArray[np.float32] | None:
    """Llama 3's scaling of each rotary frequency, (head size / 2,); None where there is none.

    As in transformers' ``_compute_llama3_parameters``: low frequencies by the whole factor, high ones not,
    and those between them smoothly.
    """
    import numpy as np

    config = settings_of(checkpoint)
    if _scaling(config) != "llama3":
        return None
    rope = _rope(config)
    factor, low, high = (float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    original, size = float(rope["original_max_position_embeddings"]), checkpoint.head_dim
    found = []
    for at in range(0, size, 2):
        length = 2 * math.pi * float(rope["rope_theta"]) ** (at / size)
        smooth = min(1.0, max(0.0, (original / length - low) / (high - low)))
        found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


Change = Callable[["NDArray[np.float32]"], "NDArray[np.float32]"]


def change_of(name: str, checkpoint: Checkpoint, found: Architecture) -> Change | None:
    """What becomes of a tensor's values, float32, on their way; None where nothing does."""
    config = checkpoint.text_config
    if found.norm_offset and name.endswith("norm.weight"):
        return lambda values: values + found.norm_offset
    leaf = name.rpartition(".")[0].rpartition(".")[2]
    if found.rotates_pairs and leaf in ("q_proj", "k_proj"):
        heads = int(config["num_attention_heads"])
        if leaf == "k_proj":
            heads = int(config.get("num_key_value_heads") or heads)
        return lambda values: _pairs(values, heads)
    return None


def _pairs(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of each head in the order 0, h/2, 1, h/2 + 1 …"""
    parts = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return parts.swapaxes(1, 2).reshape(values.shape)
