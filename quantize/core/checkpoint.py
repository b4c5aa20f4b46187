"""A checkpoint directory as found on disk: what it must hold, and what can be read without torch.

>>> checkpoint = open_checkpoint(Path("SmolLM2-135M-Instruct"))
>>> checkpoint.dtype, checkpoint.text_config["hidden_size"]
('BF16', 576)

Whether its tensors are those that the architecture needs is asked of transformers, whose import takes
seconds: :mod:`quantize.core.account`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from quantize.core.companions import (
    TOKENIZER_FILES,
    companion_files,
    copy_companion_files,
    read_object,
    refuse_bad_companions,
    wrong_class,
)
from quantize.core.files import sha256_of
from quantize.core.model_config import refuse_incomplete, text_config
from quantize.core.weights import (
    CONFIGS,
    INDEX,
    CheckpointError,
    Tensor,
    ignored_files,
    read_header,
    read_tensors,
    stored_dtype,
    weight_bytes,
    weight_files,
)

__all__ = [
    "TOKENIZER_FILES",
    "Checkpoint",
    "CheckpointError",
    "Tensor",
    "base_sha256",
    "copy_companions",
    "open_checkpoint",
    "own_files",
    "read_header",
    "read_tensors",
    "weight_bytes",
    "weight_files",
]

KEPT_WIDE = ("e_score_correction_bias",)
"""Ends of names of tensors that engines compute in 32 bits whatever the model's type."""
ENGINE_TYPES = {"bfloat16": "BF16", "float16": "F16", "half": "F16"}


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face directory that has passed :func:`open_checkpoint`.

    ``config`` is its ``config.json``; ``text_config`` the language model's part of it, which is the same but
    for multimodal wrappers.
    """

    path: Path
    config: dict[str, Any]
    text_config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.text_config:
            object.__setattr__(self, "text_config", self.config)

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """Every tensor by name, from the headers."""
        return read_tensors(self.path)

    @cached_property
    def dtype(self) -> str:
        """The type that the weights are stored in, in safetensors' words: ``BF16``, ``F16`` or ``F32``."""
        return stored_dtype(self.tensors.values())

    @property
    def serving_dtype(self) -> str:
        """The type that an engine computes in, and variants keep unquantized tensors in: ``BF16`` or ``F16``.

        vLLM takes the configuration's, and bfloat16 where that, or the files without it, say 32 bits."""
        named = self.config.get("dtype") or self.config.get("torch_dtype")
        named = named or self.text_config.get("dtype") or self.text_config.get("torch_dtype")
        if named is None:
            return self.dtype if self.dtype in ("BF16", "F16") else "BF16"
        return ENGINE_TYPES.get(str(named).removeprefix("torch."), "BF16")

    def kept(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor as a variant keeps it where it is not quantized: in ``serving_dtype``.

        32-bit tensors of a 16-bit checkpoint stay as they are: whoever made it wanted them so.
        """
        wide = tensor.dtype in ("F32", "F64") and self.dtype in ("F32", "F64")
        other = tensor.dtype in ("BF16", "F16") and tensor.dtype != self.serving_dtype
        if not (wide or other) or name.endswith(KEPT_WIDE):
            return tensor
        width = 8 if tensor.dtype == "F64" else 4 if tensor.dtype == "F32" else 2
        return replace(tensor, dtype=self.serving_dtype, bytes=tensor.bytes // width * 2)

    @property
    def quantize_config(self) -> dict[str, Any]:
        """AutoGPTQ's or AutoAWQ's settings from a file of their own; empty where there is none."""
        return read_object(self.path / "quantize_config.json") or read_object(self.path / "quant_config.json")

    @property
    def companions(self) -> tuple[Path, ...]:
        """Files that travel with a variant, relative to ``path``: tokenizer, template, generation config."""
        return companion_files(self.path)

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the checkpoint, relative to ``path``: configuration, weights and companions. Nothing
        else that lies there belongs to it."""
        index = [Path(INDEX)] if (self.path / INDEX).is_file() else []
        shards = [file.relative_to(self.path) for file in weight_files(self.path)]
        configs = [Path(name) for name in CONFIGS if (self.path / name).is_file()]
        return (*configs, *index, *shards, *self.companions)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of how the directory was read."""
        found = []
        if left := ignored_files(self.path):
            read = ", ".join(file.name for file in weight_files(self.path)[:3])
            more = " …" if len(weight_files(self.path)) > 3 else ""
            found.append(f"{self.path}: read is {read}{more}; not read, nor carried along: {', '.join(left)}")
        if (named := wrong_class(self.path)) is not None:
            found.append(
                f"{self.path}: tokenizer.json is byte-level and tokenizer_config.json says {named}, under "
                "which spaces are lost; variants say PreTrainedTokenizerFast"
            )
        return tuple(found)

    @property
    def head_dim(self) -> int:
        config = self.text_config
        return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Bytes that one token takes in the KV cache: keys and values of every layer."""
        config = self.text_config
        heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        return int(2 * config["num_hidden_layers"] * heads * self.head_dim * bytes_per_value)

    @property
    def max_model_len(self) -> int:
        return int(self.text_config["max_position_embeddings"])


def open_checkpoint(path: Path) -> Checkpoint:
    """Check that ``path`` holds a config, a tokenizer, a chat template and whole weights of one source.

    Reads headers and small files only. Raises CheckpointError.
    """
    if not path.is_dir():
        why = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"model directory {path} {why}; give the directory of a checkpoint")
    config_path = path / "config.json"
    if not config_path.is_file():
        raise CheckpointError(f"{path} has no config.json; give the directory of a Hugging Face checkpoint")
    config = read_object(config_path)
    refuse_bad_companions(path)
    found = text_config(path, config)
    refuse_incomplete(config_path, found)
    read_tensors(path)
    return Checkpoint(path, config, found)


def copy_companions(checkpoint: Checkpoint, out: Path) -> None:
    """Copy what travels with a variant into ``out``, byte for byte; see :mod:`quantize.core.companions`."""
    copy_companion_files(checkpoint.path, out)


@contextlib.contextmanager
def own_files(checkpoint: Checkpoint) -> Iterator[Path]:
    """A directory of the checkpoint's own files alone, for libraries that choose among what they find.

    transformers takes an old ``model.safetensors`` where newer shards lie beside it, which vLLM takes.

    It is the checkpoint's own directory where nothing else is there, and one of links otherwise.
    """
    if not ignored_files(checkpoint.path) and wrong_class(checkpoint.path) is None:
        yield checkpoint.path
        return
    with tempfile.TemporaryDirectory(prefix="tiercel-") as made:
        for name in checkpoint.files:
            if name not in checkpoint.companions:
                (Path(made) / name).symlink_to((checkpoint.path / name).resolve())
        copy_companions(checkpoint, Path(made))
        yield Path(made)


def base_sha256(checkpoint: Checkpoint) -> str:
    """Changes whenever a file that decides a variant changes: weights, configuration, tokenizer, template."""
    listing = {name.as_posix(): sha256_of(checkpoint.path / name) for name in checkpoint.files}
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()
