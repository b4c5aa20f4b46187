"""A model's ``config.json``: what it must say, and where a multimodal wrapper keeps its language model's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantize.core.weights import CheckpointError

TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
"""Where multimodal wrappers keep the configuration of their language model."""
NEEDED = (
    *("hidden_size", "num_attention_heads", "num_hidden_layers"),
    *("vocab_size", "max_position_embeddings"),
)


def read_config(path: Path) -> Any:
    """transformers' configuration of a checkpoint directory. Raises CheckpointError with its first words."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # whatever transformers raises, the file is at fault
        raise CheckpointError(
            f"{path / 'config.json'}: transformers cannot read it ({first_line(error)}); download it again"
        ) from None


def text_config(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part. A wrapper's is saved without what is its class's default, which transformers
    then fills in."""
    nested = next((config[key] for key in TEXT_CONFIGS if isinstance(config.get(key), dict)), None)
    if nested is None or "hidden_size" in config:
        return config
    if all(key in nested for key in NEEDED):
        return dict(nested)
    filled = dict(read_config(path).get_text_config().to_dict())
    return {**filled, **nested}


def refuse_incomplete(file: Path, found: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless every number is there that sizes follow from."""
    if missing := [key for key in NEEDED if key not in found]:
        raise CheckpointError(
            f"{file} lacks {', '.join(missing)}; only decoder language models can be used, whose "
            "configuration says these: download it again"
        )
    for key in NEEDED:
        value = found[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{file}: {key} is {value!r}, not a number of 1 or more")


def first_line(error: BaseException) -> str:
    """The first line of what an exception says that says something, with its type if it is a bare value."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return f"{type(error).__name__}: {lines[0]}" if len(lines[0].split()) < 3 else lines[0]
