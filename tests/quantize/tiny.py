"""Random checkpoints of a few hundred thousand parameters, of every architecture and in every dress.

Each is made by transformers from a configuration, in a second or less, with the demo model's tokenizer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODEL = Path(__file__).parents[2] / "deploy" / "assistant" / "model"
VOCABULARY = 2048
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 256}
"""Not the hidden size, so that inputs of one kind of matrix cannot be taken for those of the other."""
_LATENT = {
    **_EXPERTS,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "head_dim": 16,
    "num_key_value_heads": 4,
}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen3_moe": {**_EXPERTS, "num_experts": 4},
    "mixtral": {"num_experts_per_tok": 2, "num_local_experts": 4},
    "gpt_oss": {"num_experts_per_tok": 2, "num_local_experts": 4},
    "deepseek_v2": {**_LATENT, "q_lora_rank": None},
    "deepseek_v3": {**_LATENT, "q_lora_rank": 32},
    "llama4_text": {"num_experts_per_tok": 1, "num_local_experts": 4, "intermediate_size_mlp": 256},
}
"""What an architecture needs beside the sizes that all share."""
_VISION: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
WRAPPERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gemma3": (
        "gemma3_text",
        {"vision_config": _VISION, "mm_tokens_per_image": 4, "image_token_index": 5}
        | {"boi_token_index": 6, "eoi_token_index": 7},
    ),
    "mistral3": (
        "mistral",
        {"vision_config": {**_VISION, "model_type": "pixtral", "head_dim": 32}, "image_token_index": 5},
    ),
}
"""Multimodal architecture to that of its text part, and what its own configuration needs."""


def make_checkpoint(
    directory: Path, architecture: str = "llama", seed: int = 0, dtype: str = "bfloat16", **shape: Any
) -> Path:
    """Write a random checkpoint with the demo model's tokenizer; ``shape`` overrides its size."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    text, more = WRAPPERS.get(architecture, (architecture, {}))
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "tie_word_embeddings": text.startswith("gemma"),  # engines know no other Gemma
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **SHAPES.get(text, {}),
        **shape,
    }
    auto: Any = AutoModelForCausalLM
    if more:
        tied = settings["tie_word_embeddings"]
        settings = {"text_config": {**settings, "model_type": text}, "tie_word_embeddings": tied, **more}
        auto = AutoModelForImageTextToText
    config = AutoConfig.for_model(architecture, **settings)
    torch.manual_seed(seed)
    model = auto.from_config(config).to(getattr(torch, dtype))
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(MODEL / name, directory / name)
    return directory


def add_outliers(directory: Path, part: str = "", factor: float = 40.0) -> None:
    """Multiply one column of every matrix with ``part`` in its name, embeddings left out.

    Ranges of whole rows become wide, so that 8 bits lose far more than 16-bit arithmetic does.
    """
    from safetensors.torch import load_file, save_file

    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and part in name and "embed" not in name and "vision" not in name:
            tensor[:, len(name) % tensor.shape[1]] *= factor
    save_file(tensors, file, metadata={"format": "pt"})


def without_added_words(directory: Path) -> Path:
    """Let the demo's added words be words of the vocabulary that text never comes to: llama.cpp knows no
    added tokens that stand for whole words alone."""
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    words = [one for one in content["added_tokens"] if one["single_word"]]
    content["added_tokens"] = [one for one in content["added_tokens"] if not one["single_word"]]
    content["model"]["vocab"] |= {one["content"]: one["id"] for one in words}
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return directory


def split_in_shards(directory: Path, shards: int = 2) -> None:
    """Turn a checkpoint of one file into ``shards`` files with an index."""
    from safetensors.torch import load_file, save_file

    whole = directory / "model.safetensors"
    tensors = load_file(whole)
    names, index = sorted(tensors), dict[str, str]()
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    listing = {"metadata": {"total_size": size}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(listing), encoding="utf-8")
    whole.unlink()


def as_hub_cache(directory: Path) -> None:
    """Lay a checkpoint out as a hub cache does: every file a link into a folder of blobs beside it."""
    blobs = directory.with_name(f"{directory.name}-blobs")
    blobs.mkdir()
    for number, file in enumerate(sorted(directory.iterdir())):
        file.rename(blobs / f"{number:040x}")
        file.symlink_to(Path("..") / blobs.name / f"{number:040x}")


def change_config(directory: Path, **changes: Any) -> None:
    """Change entries of ``config.json``; a value of None removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
