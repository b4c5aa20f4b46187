"""A checkpoint whose tensors are not those of its architecture is refused before work; whole ones pass."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize.core.account import refuse_other_tensors
from quantize.core.checkpoint import CheckpointError, open_checkpoint, own_files
from quantize.core.loading import load_model
from quantize.core.tensors import read_parts, refuse_not_finite
from quantize.core.tokenizer import (
    encode_messages,
    load_tokenizer,
    refuse_bad_tokenizer,
    tokenizer_differences,
)
from tests.quantize.tiny import make_checkpoint

UP = "model.layers.1.mlp.up_proj.weight"
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
WHOLE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama", {"tie_word_embeddings": True}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("qwen3_moe", EXPERTS),
    ("mixtral", MIXTRAL),
    ("mistral", {}),
    ("phi3", {}),
    ("gemma3_text", {}),
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("whole") / "llama")


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


def configured(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes), encoding="utf-8")


def changed(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Write the weights anew, with what ``change`` made of them."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        refuse_other_tensors(open_checkpoint(path))
    return str(error.value).removeprefix(f"{path}: ").replace(str(path), "MODEL")


@pytest.mark.parametrize(("architecture", "shape"), WHOLE, ids=[name for name, _ in WHOLE])
def test_whole_checkpoints_pass(tmp_path: Path, architecture: str, shape: dict[str, Any]) -> None:
    refuse_other_tensors(open_checkpoint(make_checkpoint(tmp_path / "model", architecture, **shape)))


def test_a_head_that_is_not_tied_must_be_there(copy: Path) -> None:
    changed(copy, lambda tensors: tensors.pop(HEAD))
    assert refused(copy) == (
        "lm_head.weight is missing, which MODEL/config.json needs: its output head. Download the checkpoint "
        "again, or set tie_word_embeddings to true if the model shares it with the embeddings"
    )
    configured(copy, tie_word_embeddings=True)
    refuse_other_tensors(open_checkpoint(copy))


def test_nothing_is_invented(copy: Path) -> None:
    changed(copy, lambda tensors: tensors.pop(UP))
    assert refused(copy) == (
        f"{UP} is missing, which MODEL/config.json needs: it would be random numbers. "
        "Download the checkpoint again"
    )


def test_a_layer_more_or_less_than_is_stored_is_refused(copy: Path) -> None:
    configured(copy, num_hidden_layers=3)
    assert "model.layers.2.input_layernorm.weight, " in refused(copy)
    assert "and 6 more are missing" in refused(copy)
    configured(copy, num_hidden_layers=1_000_000_000)
    assert "has num_hidden_layers 1000000000, and tensors of 2 are stored" in refused(copy)
    configured(copy, num_hidden_layers=1)
    assert "and 6 more are stored, which the model in MODEL/config.json has no place for" in refused(copy)


def test_another_shape_is_refused(copy: Path) -> None:
    configured(copy, intermediate_size=192)
    text = refused(copy)
    assert "mlp.down_proj.weight has shape (128, 256), MODEL/config.json makes it (128, 192)" in text
    assert "(and 5 more)" in text


def test_a_foreign_tensor_is_refused(copy: Path) -> None:
    changed(copy, lambda tensors: tensors.update({"model.adapter.weight": torch.ones(2, 2)}))
    assert refused(copy).startswith("model.adapter.weight is stored, which the model in")


def test_eight_bits_under_a_sixteen_bit_configuration_are_refused(copy: Path) -> None:
    changed(copy, lambda tensors: tensors.update({UP: tensors[UP].to(torch.float8_e4m3fn)}))
    assert refused(copy) == (
        f"{UP} is in F8_E4M3, and config.json has no quantization_config: a quantized checkpoint without its "
        "configuration; give the 16-bit original"
    )


def test_a_tied_head_that_differs_is_refused_and_an_equal_one_is_not(copy: Path) -> None:
    configured(copy, tie_word_embeddings=True)
    assert "lm_head.weight differs from model.embed_tokens.weight, and config.json ties them" in refused(copy)
    changed(copy, lambda tensors: tensors.update({HEAD: tensors[EMBEDDINGS].clone()}))
    refuse_other_tensors(open_checkpoint(copy))


def test_an_expert_that_is_missing_is_seen(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", "qwen3_moe", **EXPERTS)
    gone = [name for name in load_file(path / "model.safetensors") if ".experts.3.up_proj" in name]
    assert gone
    changed(path, lambda tensors: tensors.pop(gone[0]))
    with pytest.raises(CheckpointError, match=r"mlp\.experts|cannot make a Qwen3Moe"):
        refuse_other_tensors(open_checkpoint(path))


def test_a_configuration_without_sense_is_a_sentence(copy: Path) -> None:
    configured(copy, model_type="nosuch")
    assert "config.json: transformers cannot read it (" in refused(copy)
    configured(copy, model_type="gpt2")
    assert "model_type gpt2 is none of LlamaForCausalLM's, which is llama" in refused(copy)
    configured(copy, model_type="llama", architectures=["NoSuchForCausalLM"])
    assert "architecture NoSuchForCausalLM is not in transformers" in refused(copy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_sources_are_counted_in_what_is_kept(copy: Path, dtype: torch.dtype) -> None:
    def wide(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    before = sum(tensor.bytes for tensor in open_checkpoint(copy).tensors.values())
    changed(copy, wide)
    configured(copy, dtype=str(dtype).removeprefix("torch."))
    checkpoint = open_checkpoint(copy)
    refuse_other_tensors(checkpoint)
    assert checkpoint.dtype == {torch.float32: "F32", torch.float16: "F16"}[dtype]
    assert checkpoint.serving_dtype == {torch.float32: "BF16", torch.float16: "F16"}[dtype]
    assert sum(checkpoint.kept(name, one).bytes for name, one in checkpoint.tensors.items()) == before


def test_nan_is_found_wherever_it_stands(copy: Path) -> None:
    refuse_not_finite(copy)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP][-1, -1] = float("nan")

    changed(copy, spoil)
    with pytest.raises(CheckpointError, match=f"{UP} holds NaN or infinity"):
        refuse_not_finite(copy)


def test_an_old_file_beside_newer_shards_is_not_read(copy: Path) -> None:
    from transformers import AutoModelForCausalLM

    tensors = load_file(copy / "model.safetensors")
    shard = "model-00001-of-00001.safetensors"
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, copy / shard, {"format": "pt"})
    (copy / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}), encoding="utf-8"
    )
    for name in ("consolidated.safetensors", "params.json", "pytorch_model.bin", "old.gguf"):
        (copy / name).write_bytes(b"{}")
    checkpoint = open_checkpoint(copy)
    (note,) = checkpoint.notes
    assert f"{shard}; not read, nor carried along: consolidated.safetensors, model.safetensors" in note
    assert {path.file.name for path in read_parts(copy).values()} == {shard}
    with own_files(checkpoint) as directory:
        assert sorted(path.name for path in directory.iterdir()) == sorted(map(str, checkpoint.files))
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    torch.testing.assert_close(model.get_input_embeddings().weight.data, tensors[EMBEDDINGS] + 1)


def test_the_tokenizer_of_the_tiny_model_is_sound(llama: Path) -> None:
    refuse_bad_tokenizer(open_checkpoint(llama))


def test_a_byte_level_tokenizer_under_a_class_for_sentencepiece_survives(copy: Path) -> None:
    whole = load_tokenizer(copy)
    file = copy / "tokenizer_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "LlamaTokenizerFast"}), encoding="utf-8"
    )
    checkpoint = open_checkpoint(copy)
    assert "under which spaces are lost" in checkpoint.notes[0]
    refuse_bad_tokenizer(checkpoint)
    text = "two  spaces and a\nline"
    assert load_tokenizer(copy).encode(text) == whole.encode(text)


def test_a_tokenizer_that_loses_text_is_refused(copy: Path) -> None:
    file = copy / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["decoder"] = {"type": "Strip", "content": " ", "start": 4, "stop": 0}
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CheckpointError, match="the tokenizer turns 'The quick brown fox"):
        refuse_bad_tokenizer(open_checkpoint(copy))


def test_ids_beyond_the_embeddings_are_refused(copy: Path) -> None:
    configured(copy, vocab_size=300)
    with pytest.raises(CheckpointError, match=r"the tokenizer makes id \d+ of .*vocab_size is 300"):
        refuse_bad_tokenizer(open_checkpoint(copy))


async def test_what_the_engine_makes_of_the_same_text_is_compared(llama: Path) -> None:
    checkpoint, tokenizer = open_checkpoint(llama), load_tokenizer(llama)

    async def alike(messages: Any) -> list[int]:
        return list(
            tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True)["input_ids"]
        )

    async def without_spaces(messages: Any) -> list[int]:
        return await alike([{**one, "content": one["content"].replace(" ", "")} for one in messages])

    assert await tokenizer_differences(checkpoint, alike) == ()
    found = await tokenizer_differences(checkpoint, without_spaces)
    assert found
    assert "tokens to the engine and" in found[0]


def test_pickles_are_refused_with_two_lines_that_convert_them(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    torch.save(tensors, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="Convert them:") as error:
        open_checkpoint(copy)
    _, *lines = str(error.value).splitlines()
    assert len(lines) == 2
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for line in lines:
        subprocess.run(line, shell=True, check=True, env={**os.environ, "PATH": path}, capture_output=True)
    made = open_checkpoint(copy.with_name("model-safetensors"))
    refuse_other_tensors(made)
    refuse_bad_tokenizer(made)
    assert (made.path / "tokenizer.json").read_bytes() == (copy / "tokenizer.json").read_bytes()
    assert torch.equal(load_file(made.path / "model.safetensors")[UP], tensors[UP])


def test_a_model_that_is_loaded_keeps_its_directory_as_its_name(copy: Path) -> None:
    (copy / "consolidated.safetensors").write_bytes(b"{}")
    model = load_model(open_checkpoint(copy), torch.float32)
    assert (model.name_or_path, model.dtype) == (str(copy), torch.float32)


def test_text_that_is_cut_later_brings_no_warning(capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(Path(__file__).parents[2] / "deploy/assistant/model")
    assert len(tokenizer.encode("a record " * 1200)) > tokenizer.model_max_length
    assert "longer than" not in "".join(capfd.readouterr())


LLAMA = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set date_string = "
    'strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}{%- endif %}'
    "Today Date: {{ date_string }}\n"
)
MISTRAL = 'The current date is {{ strftime_now("%Y-%m-%d") }}, at {{ strftime_now("%H:%M") }}. '
SAID = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"


@pytest.mark.parametrize(
    ("date", "written"),
    [(LLAMA, "Today Date: 26 Jul 2024\n"), (MISTRAL, "The current date is 2024-07-26, at 23:45. ")],
)
async def test_a_template_that_writes_the_date_writes_the_same_every_day(
    copy: Path, monkeypatch: pytest.MonkeyPatch, date: str, written: str
) -> None:
    (copy / "chat_template.jinja").write_text(date + SAID, encoding="utf-8")
    checkpoint, tokenizer = open_checkpoint(copy), load_tokenizer(copy)
    said = [{"role": "user", "content": "hi"}]
    texts = set[str]()
    for day in (datetime(2026, 3, 1, 23, 59), datetime(2026, 3, 2, 0, 1)):
        clock = SimpleNamespace(now=lambda day=day: day)
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", clock)
        texts.add(tokenizer.apply_chat_template(said, tokenize=False))

        async def engine(messages: Any) -> list[int]:
            """vLLM renders by transformers, whose clock goes on."""
            plain = type(tokenizer).apply_chat_template(
                tokenizer, list(messages), tokenize=True, return_dict=True
            )
            return list(plain["input_ids"])

        assert await engine(said) != encode_messages(tokenizer, said, copy)
        assert await tokenizer_differences(checkpoint, engine) == ()

    assert texts == {written + "user hi "}

    async def other(messages: Any) -> list[int]:
        return await engine([{**one, "content": one["content"].replace(" ", "")} for one in messages])

    assert await tokenizer_differences(checkpoint, other)


def test_a_template_that_asks_no_time_is_rendered_as_it_was(llama: Path) -> None:
    assert "apply_chat_template" not in vars(load_tokenizer(llama))
