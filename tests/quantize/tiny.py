"""Random checkpoints of a few hundred thousand parameters, of several architectures and shapes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

MODEL = Path(__file__).parents[2] / "deploy" / "assistant" / "model"
VOCABULARY = 2048


def make_checkpoint(directory: Path, architecture: str = "llama", seed: int = 0, **shape: Any) -> Path:
    """Write a random bfloat16 checkpoint with the demo model's tokenizer; ``shape`` overrides its size."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **shape,
    }
    if architecture == "mistral":
        settings["sliding_window"] = None
    config = AutoConfig.for_model(architecture, **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(MODEL / name, directory / name)
    return directory
