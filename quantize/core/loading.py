"""A checkpoint's model in torch: from its own files, whatever else lies in the directory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantize.core.checkpoint import Checkpoint, own_files

if TYPE_CHECKING:
    import torch


def load_model(checkpoint: Checkpoint, dtype: torch.dtype, **more: Any) -> Any:
    """The model of a checkpoint, with transformers' ``from_pretrained``; ``more`` is passed on to it.

    Its name stays the checkpoint's directory, which libraries ask a model hub about when it is none.
    """
    from transformers import AutoModelForCausalLM

    with own_files(checkpoint) as directory:
        model: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, local_files_only=True, **more
        )
    model.name_or_path = model.config._name_or_path = str(checkpoint.path)
    return model
