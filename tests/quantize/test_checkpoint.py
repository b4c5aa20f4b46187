"""A checkpoint that cannot be used is refused before any work, with the fix."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from quantize.core.checkpoint import CheckpointError, open_checkpoint, weight_bytes

CONFIG = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "vocab_size": 512,
}


def write_safetensors(path: Path, tensors: dict[str, bytes]) -> None:
    header, offset = {}, 0
    for name, data in tensors.items():
        end = offset + len(data)
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(tensors.values()))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    (path / "tokenizer.json").write_text("{}", encoding="utf-8")
    (path / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    write_safetensors(path / "model.safetensors", {"a": b"12345", "b": b"678"})
    return path


def test_whole_checkpoint_is_opened(checkpoint: Path) -> None:
    opened = open_checkpoint(checkpoint)
    assert opened.kv_bytes_per_token(2) == 2 * 4 * 2 * 64 * 2
    assert weight_bytes(checkpoint) == 8


def cut(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-2])


def lose_a_shard(path: Path) -> None:
    index = {"weight_map": {"a": "one.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (shutil.rmtree, "does not exist; set model.path"),
        (lambda p: (p / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda p: (p / "config.json").unlink(), "has no config.json"),
        (lambda p: (p / "config.json").write_text("{", encoding="utf-8"), "not valid JSON"),
        (lambda p: (p / "config.json").write_text("{}", encoding="utf-8"), "lacks hidden_size"),
        (lambda p: (p / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda p: (p / "model.safetensors").write_bytes(b"abc"), "cut short"),
        (cut, "its header says"),
        (lose_a_shard, "has no one.safetensors"),
    ],
)
def test_bad_checkpoint_is_one_sentence(
    checkpoint: Path, spoil: Callable[[Path], object], sentence: str
) -> None:
    spoil(checkpoint)
    with pytest.raises(CheckpointError, match=sentence):
        open_checkpoint(checkpoint)
