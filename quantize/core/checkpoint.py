"""A checkpoint directory as found on disk: what it must hold, and what can be read without torch."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.card import sha256_of
from quantize.core.architectures import architecture

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


class CheckpointError(ValueError):
    """A directory is not a checkpoint that can be used. The text says what is missing and the fix."""


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face directory that has passed :func:`open_checkpoint`."""

    path: Path
    config: dict[str, Any]

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The configuration of the text part: of the whole, or a multimodal wrapper's."""
        return architecture(self.config).text_config(self.config)

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
    """Check that ``path`` holds a config, a tokenizer, a chat template and whole weights.

    Raises CheckpointError.
    """
    if not path.is_dir():
        raise CheckpointError(f"model directory {path} does not exist; set model.path to a local checkpoint")
    config_path = path / "config.json"
    if not config_path.is_file():
        raise CheckpointError(f"{path} has no config.json; model.path must be a Hugging Face checkpoint")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{config_path} is not valid JSON ({error}); download it again") from None
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{path} has no tokenizer ({', '.join(TOKENIZER_FILES)}); save the model's tokenizer beside it"
        )
    text = architecture(config).text_config(config)
    missing = [key for key in ("hidden_size", "num_attention_heads", "num_hidden_layers") if key not in text]
    if missing:
        raise CheckpointError(
            f"{config_path} lacks {', '.join(missing)}; only decoder language models can be used"
        )
    for shard in weight_files(path):
        read_header(shard)
    return Checkpoint(path, config)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises CheckpointError if one is missing."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (path / name).is_file():
            raise CheckpointError(
                f"{path} has no {name}; complete the checkpoint (safetensors is the format)"
            )
    return [path / name for name in names]


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: tensor name to dtype, shape and data offsets.

    The format is eight bytes of little-endian length, then JSON
    (https://github.com/huggingface/safetensors#format). Raises CheckpointError if the file is cut.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise CheckpointError(f"{path} is cut short or not a safetensors file; download it again")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path} has {size} bytes, its header says {8 + length + end}; download it again"
        )
    return header


@dataclass(frozen=True)
class Tensor:
    """What a safetensors header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by name, from the headers of its files."""
    return {
        name: Tensor(
            tensor["dtype"], tuple(tensor["shape"]), tensor["data_offsets"][1] - tensor["data_offsets"][0]
        )
        for shard in weight_files(path)
        for name, tensor in read_header(shard).items()
    }


def weight_bytes(path: Path) -> int:
    """Bytes of all tensors of a checkpoint: weights, scales, zero points, embeddings and head."""
    return sum(tensor.bytes for tensor in read_tensors(path).values())


def base_sha256(checkpoint: Checkpoint) -> str:
    """Changes whenever a file that decides a variant changes: weights, configuration, tokenizer, template."""
    names = [*weight_files(checkpoint.path), checkpoint.path / "config.json"]
    names += sorted(checkpoint.path.glob("tokenizer*")) + sorted(checkpoint.path.glob("chat_template*"))
    listing = {path.name: sha256_of(path) for path in names}
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()
