"""Files of a base checkpoint that are served with its weights."""

from __future__ import annotations

from pathlib import Path

from quantize.core.checkpoint import Checkpoint, weight_files

SERVED = frozenset(
    {
        "config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "merges.txt",
        "vocab.json",
        "vocab.txt",
        "spiece.model",
        "sentencepiece.bpe.model",
        "preprocessor_config.json",
        "processor_config.json",
    }
)
SERVED_PREFIXES = ("tokenizer", "chat_template", "LICENSE", "NOTICE")
"""Files of a base checkpoint that go with its weights; whatever else lies there is not served."""


def served_files(checkpoint: Checkpoint) -> list[Path]:
    """Files of a base checkpoint that are served: configuration, weights, tokenizer, templates."""
    weights = {path.name for path in weight_files(checkpoint.path)}
    if "model.safetensors" not in weights:
        weights.add("model.safetensors.index.json")
    return sorted(
        path
        for path in checkpoint.path.iterdir()
        if path.is_file()
        and (path.name in weights or path.name in SERVED or path.name.startswith(SERVED_PREFIXES))
    )
