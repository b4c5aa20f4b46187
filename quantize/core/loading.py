"""A checkpoint's model in torch: from its own files, whatever else lies in the directory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantize.core.checkpoint import Checkpoint, own_files

if TYPE_CHECKING:
    import torch


def load_model(checkpoint: Checkpoint, dtype: torch.dtype, **more: Any) -> Any:
    """The model of a checkpoint by the class that holds its text part, for inference; ``more`` is for
    transformers' ``from_pretrained``.

    Its name stays the checkpoint's directory, which libraries ask a model hub about when it is none.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    with own_files(checkpoint) as directory:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        auto: Any = AutoModelForCausalLM if causal else AutoModelForImageTextToText
        how = {"local_files_only": True, **attention(config), **more}
        model: Any = auto.from_pretrained(directory, dtype=dtype, **how)
    model.name_or_path = model.config._name_or_path = str(checkpoint.path)
    return model.eval()


def attention(config: Any) -> dict[str, str]:
    """What transformers' loaders are told of attention, by its own configuration of a model.

    Where logits of attention are capped (Gemma 2) its plain operations are taken: the kernel that it takes by
    default leaves the cap out without a word, and engines apply it.
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return {"attn_implementation": "eager"} if capped else {}
