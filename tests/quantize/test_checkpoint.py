"""A checkpoint that cannot be used is refused before any work, with the fix."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from quantize.core.checkpoint import CheckpointError, copy_companions, open_checkpoint, weight_bytes

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


def index(*names: str, **files: str) -> Callable[[Path], object]:
    """An index that has ``names`` in model.safetensors, and ``files`` elsewhere."""
    listed = dict.fromkeys(names, "model.safetensors") | files
    text = json.dumps({"weight_map": listed})
    return lambda path: (path / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def configured(**changes: object) -> Callable[[Path], object]:
    text = json.dumps({key: value for key, value in (CONFIG | changes).items() if value is not None})
    return lambda path: (path / "config.json").write_text(text, encoding="utf-8")


def renamed(name: str, count: int = 1) -> Callable[[Path], object]:
    """Weights under other names, and none under the usual one."""

    def rename(path: Path) -> None:
        for number in range(count):
            shutil.copy(path / "model.safetensors", path / name.format(number))
        (path / "model.safetensors").unlink()

    return rename


def written(name: str, text: str) -> Callable[[Path], object]:
    return lambda path: (path / name).write_text(text, encoding="utf-8")


def twice(path: Path) -> None:
    shutil.copy(path / "model.safetensors", path / "two.safetensors")
    index("a", b="two.safetensors")(path)


def damaged_header(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"shape": [5]', b'"shape": [9]'))


def lose_a_shard(path: Path) -> None:
    index = {"weight_map": {"a": "one.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (shutil.rmtree, "does not exist; give the directory"),
        (lambda p: (p / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda p: (p / "config.json").unlink(), "has no config.json"),
        (lambda p: (p / "config.json").write_text("{", encoding="utf-8"), "not valid JSON"),
        (lambda p: (p / "config.json").write_text("{}", encoding="utf-8"), "lacks hidden_size"),
        (lambda p: (p / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda p: (p / "model.safetensors").write_bytes(b"abc"), "cut short"),
        (cut, "its header says"),
        (lose_a_shard, "has no one.safetensors, which model.safetensors.index.json names; download"),
        (index("a"), "holds b, which model.safetensors.index.json does not list"),
        (index("a", "b", "c"), "says that c is in model.safetensors, which does not hold it"),
        (index("a", b="../two.safetensors"), r"'\.\./two\.safetensors' is no safetensors file of this"),
        (written("model.safetensors.index.json", "{}"), "index.json has no weight_map; download it again"),
        (written("model.safetensors.index.json", "[]"), "is not a JSON object"),
        (written("model.safetensors.index.json", '{"weight_map": {}}'), "must name a file for each tensor"),
        (twice, "a is in model.safetensors and in two.safetensors"),
        (damaged_header, r"a of \[9\] in U8 cannot have 5 bytes"),
        (renamed("pytorch_model.bin"), "but pickles, which are not read here. Convert them:\n  python -c"),
        (renamed("consolidated.safetensors"), "it holds Mistral's own format: download the files in Hugging"),
        (renamed("model-{}-of-2.safetensors", 2), r"but 2 shards; download model\.safetensors\.index\.json"),
        (renamed("gptq_model-4bit.safetensors"), "but gptq_model-4bit.safetensors; rename it to model.saf"),
        (renamed("model.gguf"), "GGUF is not read: give the checkpoint that it was made from"),
        (configured(vocab_size=None), "lacks vocab_size; only decoder language models"),
        (configured(max_position_embeddings=None), "lacks max_position_embeddings"),
        (configured(vocab_size="many"), "vocab_size is 'many', not a number of 1 or more"),
        (configured(num_hidden_layers=0), "num_hidden_layers is 0"),
        (written("config.json", "[]"), "holds no JSON object"),
        (lambda p: (p / "chat_template.jinja").unlink(), r"has no chat template .* add the model's"),
        (
            lambda p: (p / "chat_template.jinja").write_text("Gr\xf6\xdfe", encoding="latin-1"),
            r"chat_template\.jinja is not UTF-8",
        ),
        (written("generation_config.json", "{"), "generation_config.json is not valid JSON"),
        (lambda p: (p / "tokenizer.json").rename(p / "vocab.json"), "vocab.json without merges.txt"),
    ],
)
def test_bad_checkpoint_is_one_sentence(
    checkpoint: Path, spoil: Callable[[Path], object], sentence: str
) -> None:
    spoil(checkpoint)
    with pytest.raises(CheckpointError, match=sentence):
        open_checkpoint(checkpoint)


def test_a_template_is_found_wherever_it_may_stand(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    config = checkpoint / "tokenizer_config.json"
    for value in ("{{ messages }}", [{"name": "default", "template": "{{ messages }}"}]):
        config.write_text(json.dumps({"chat_template": value}), encoding="utf-8")
        open_checkpoint(checkpoint)
    config.write_text(
        json.dumps({"chat_template": [{"name": "tool_use", "template": "x"}]}), encoding="utf-8"
    )
    with pytest.raises(CheckpointError, match="no template named 'default', only tool_use; write the one"):
        open_checkpoint(checkpoint)


def test_what_travels_is_an_allow_list_and_copied_byte_for_byte(checkpoint: Path, tmp_path: Path) -> None:
    strange = '{"do_sample": false, "temperature": 0.7}\n\n'
    more = checkpoint / "additional_chat_templates"
    more.mkdir()
    (more / "tools.jinja").write_text("{{ tools }}", encoding="utf-8")
    for name in ("generation_config.json", "special_tokens_map.json"):
        (checkpoint / name).write_text(strange, encoding="utf-8")
    for name in ("params.json", "pytorch_model.bin", "model.gguf", "consolidated.safetensors", "train.py"):
        (checkpoint / name).write_text("{}", encoding="utf-8")
    (checkpoint / "tokenizer.json").chmod(0o400)
    opened = open_checkpoint(checkpoint)
    out = tmp_path / "out"
    copy_companions(opened, out)
    wanted = {
        "additional_chat_templates/tools.jinja",
        *("chat_template.jinja", "generation_config.json", "special_tokens_map.json", "tokenizer.json"),
    }
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == wanted
    assert (out / "generation_config.json").read_text(encoding="utf-8") == strange
    assert {name.as_posix() for name in opened.files} == wanted | {"config.json", "model.safetensors"}
    (note,) = opened.notes
    left = "consolidated.safetensors, model.gguf, params.json, pytorch_model.bin"
    assert note.endswith(f"model.safetensors; not read, nor carried along: {left}")


def test_a_class_for_sentencepiece_over_bytes_is_set_right_in_copies(
    checkpoint: Path, tmp_path: Path
) -> None:
    content = {"model": {"vocab": {}}, "pre_tokenizer": {"type": "ByteLevel"}, "decoder": None}
    (checkpoint / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    named = {"tokenizer_class": "LlamaTokenizerFast", "eos_token": "é"}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    copy_companions(open_checkpoint(checkpoint), tmp_path / "out")
    copied = (tmp_path / "out" / "tokenizer_config.json").read_text(encoding="utf-8")
    assert json.loads(copied) == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "é"}
    whole = (checkpoint / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == whole


def test_a_nested_configuration_is_the_language_models(checkpoint: Path) -> None:
    wrapper = {"model_type": "gemma3", "text_config": CONFIG, "dtype": "float16"}
    (checkpoint / "config.json").write_text(json.dumps(wrapper), encoding="utf-8")
    opened = open_checkpoint(checkpoint)
    assert (opened.max_model_len, opened.head_dim, opened.serving_dtype) == (1024, 64, "F16")
    assert opened.kv_bytes_per_token(2) == 2 * 4 * 2 * 64 * 2
