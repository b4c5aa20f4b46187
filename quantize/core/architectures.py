"""The architectures that are known: where their matrices lie, what an engine fuses, what is refused and why.

An architecture is known by the first name in ``architectures`` of ``config.json``. What stands here was read
in vLLM 0.32's models (``packed_modules_mapping``, ``hf_to_vllm_mapper``) and in transformers 5.17, and each
that is not refused is made, loaded and asked on the engine by ``tests/e2e/test_architectures.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

FUSED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
        "w13": ("w1", "w3"),
    }
)
"""Fused name to the members' names, as vLLM's ``packed_modules_mapping`` has them."""

_LAYER = re.compile(r"(.*\blayers\.(\d+)\.)(.*)")
ROUTERS = ("mlp.gate", "block_sparse_moe.gate", "feed_forward.router", "mlp.shared_expert_gate", "mlp.router")
"""Small matrices that choose experts: engines keep them in 16 bits."""

EMBEDDINGS = ("lm_head", "embed_tokens", "embed_positions", "wte", "wpe")


@dataclass(frozen=True)
class Architecture:
    """What is particular to an architecture. ``refused`` says why it cannot be quantized, if it cannot."""

    name: str
    wrapper: bool = False
    """Whether it is a multimodal wrapper, whose text part alone is quantized."""
    prefixes: tuple[str, ...] = ("model.",)
    """What may stand before ``layers.<n>.`` of the text part on disk (empty: anything); matrices elsewhere,
    as in a vision tower, are left as they are."""
    ties: bool = False
    """Whether the head is the embeddings, where the configuration does not say so."""
    refused: str | None = None

    def tied(self, config: Mapping[str, Any], text_config: Mapping[str, Any]) -> bool:
        """Whether the head is the embeddings' own matrix, as the engine will have it."""
        said = text_config.get("tie_word_embeddings", config.get("tie_word_embeddings"))
        return self.ties if said is None else bool(said)

    def locate(self, module: str) -> tuple[str, int, str] | None:
        """(what stands before, layer, name within it) of a matrix of the text part's layers, else None."""
        if (found := _LAYER.fullmatch(module)) is None:
            return None
        outer = found[1].removesuffix(f"layers.{found[2]}.")
        return (found[1], int(found[2]), found[3]) if outer in self.prefixes or not self.prefixes else None


_WRAPPED = ("language_model.model.", "model.language_model.", "model.language_model.model.")
"""Where wrappers keep the text part: as released, and as transformers since 4.52 may have saved it."""
_WAY_OUT = "serve it as it is, as a variant made elsewhere (register), or choose another model"


def _known() -> dict[str, Architecture]:
    plain = (
        *("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
        *("Qwen3MoeForCausalLM", "MixtralForCausalLM", "Phi3ForCausalLM"),
        *("ArceeForCausalLM", "Exaone4ForCausalLM", "Glm4ForCausalLM"),
    )
    tied = (
        *("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"),
        *("CohereForCausalLM", "Cohere2ForCausalLM", "Ernie4_5ForCausalLM"),
    )
    made = [*map(Architecture, plain), *(Architecture(name, ties=True) for name in tied)]
    made += [
        Architecture("Gemma3ForConditionalGeneration", wrapper=True, prefixes=_WRAPPED, ties=True),
        Architecture("Mistral3ForConditionalGeneration", wrapper=True, prefixes=_WRAPPED),
    ]
    interleaved = (
        "its experts are released in MXFP4, one tensor for all of a layer, which no method here makes anew"
    )
    latent = (
        "its attention works on compressed keys and values (MLA), whose matrices the engine takes apart "
        "when it loads them; no scheme was tried on them"
    )
    stacked = "its experts are stored transposed, in one tensor for all of a layer"
    refusals = {
        "GptOssForCausalLM": interleaved,
        "DeepseekV2ForCausalLM": latent,
        "DeepseekV3ForCausalLM": latent,
        "DeepseekV32ForCausalLM": latent,
        "Llama4ForConditionalGeneration": stacked,
        "Llama4ForCausalLM": stacked,
    }
    made += [Architecture(name, prefixes=(), refused=f"{why}; {_WAY_OUT}") for name, why in refusals.items()]
    return {one.name: one for one in made}


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(_known())


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a ``config.json``; one that is not known is refused."""
    named = config.get("architectures") or ["none"]
    name = str(named[0])
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    known = ", ".join(one.name for one in ARCHITECTURES.values() if one.refused is None)
    unknown = f"it is not known how an engine fuses its modules; known: {known}"
    return Architecture(name, prefixes=(), ties=True, refused=unknown)
