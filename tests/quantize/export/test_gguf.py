"""GGUF files: llama.cpp computes of them what transformers computes of the checkpoint."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantize.card import CardError
from quantize.core.checkpoint import open_checkpoint
from quantize.core.files import NoRoomError
from quantize.export import architectures
from quantize.export.architectures import KNOWN
from quantize.export.gguf import examine, export_gguf
from quantize.export.gguf_file import read_gguf
from quantize.export.importance import importance_of
from quantize.export.llama import LlamaError, LlamaModel, last_logits
from quantize.export.types import ExportError
from quantize.export.variant import add_gguf, register_gguf
from quantize.make.calibration import calibration_of
from quantize.registry import Registry
from tests.quantize.tiny import change_config, without_added_words
from tests.quantize.tiny import make_checkpoint as make_tiny

TOKENS = [1, *range(40, 100), 7, 300, 500, 900, 1200]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LIKE = 1e-5


def make_checkpoint(directory: Path, architecture: str = "llama", **shape: Any) -> Path:
    """A tiny checkpoint whose tokenizer llama.cpp can have."""
    return without_added_words(make_tiny(directory, architecture, **shape))


def transformers_logits(directory: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0, :-1].double().numpy()


def kl(reference: Any, other: Any) -> float:
    """Mean KL over the whole vocabulary, nats."""

    def log_softmax(x: Any) -> Any:
        x = x.astype(np.float64) - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(reference), log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def llama_logits(path: Path) -> Any:
    with LlamaModel(path) as model:
        return last_logits(model, TOKENS, 1, threads=1)


@pytest.mark.parametrize(
    ("architecture", "shape"),
    [
        ("llama", {}),
        ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
        ("llama", {"rope_parameters": YARN}),
        ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.0}}),
        ("llama", {"rope_parameters": {**YARN, "factor": None, "mscale": 1.0, "mscale_all_dim": 0.5}}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen2", {"rope_parameters": {**YARN, "attention_factor": 1.0}}),
        ("qwen3", {"num_key_value_heads": 4}),
        ("qwen3", {"rope_parameters": {**YARN, "attention_factor": 1.0}}),
        ("gemma3_text", {"query_pre_attn_scalar": 32, "sliding_window": 16, "num_hidden_layers": 6}),
    ],
)
def test_llama_cpp_computes_what_transformers_computes(
    architecture: str, shape: dict[str, Any], tmp_path: Path
) -> None:
    directory = make_checkpoint(tmp_path / "model", architecture, **shape)
    # Logits of random weights are nearly flat: larger ones tell one computation from another.
    scale_weights(directory)
    made = export_gguf(examine(open_checkpoint(directory)), "f16", tmp_path / "model.gguf")
    expected = transformers_logits(directory)
    assert kl(expected, np.zeros_like(expected)) > 0.05, "the model says nothing that could be compared"
    assert kl(expected, llama_logits(made.file.path)) < LIKE


def scale_weights(directory: Path) -> None:
    """Sharpen attention as well, and give biases values: else neither places nor biases tell."""
    import torch
    from safetensors.torch import load_file, save_file

    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if tensors[name].ndim == 2:
            tensors[name] = tensors[name] * (12 if name.endswith(("q_proj.weight", "k_proj.weight")) else 3)
        if name.endswith(".bias"):
            torch.manual_seed(0)
            tensors[name] = torch.randn_like(tensors[name]) * 0.3
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def demo_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_checkpoint(
        tmp_path_factory.mktemp("checkpoint") / "model", hidden_size=256, intermediate_size=512, head_dim=64
    )
    scale_weights(directory)
    return directory


def test_each_type_is_smaller_than_the_one_before_and_loses_more(demo_like: Path, tmp_path: Path) -> None:
    source, expected = examine(open_checkpoint(demo_like)), transformers_logits(demo_like)
    sizes, losses = [], []
    for kind in ("f16", "q8_0", "q4_k_m", "q2_k"):
        made = export_gguf(source, kind, tmp_path / f"{kind}.gguf")
        sizes.append(made.file.weight_bytes)
        losses.append(kl(expected, llama_logits(made.file.path)))
    assert sizes == sorted(sizes, reverse=True)
    assert losses == sorted(losses)
    assert losses[1] < losses[3] / 10


def test_an_importance_matrix_reaches_the_numbers(demo_like: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(demo_like)
    source = examine(checkpoint)
    importance = importance_of(source, [TOKENS, TOKENS[::-1]])
    assert importance["blk.0.ffn_down.weight"].shape == (512,)
    assert importance["blk.1.attn_q.weight"].shape == (256,)
    plain = export_gguf(source, "q4_k_m", tmp_path / "plain.gguf")
    weighted = export_gguf(source, "q4_k_m", tmp_path / "weighted.gguf", importance)
    assert weighted.importance
    assert not plain.importance
    assert plain.file.path.read_bytes() != weighted.file.path.read_bytes()
    eight = export_gguf(source, "q8_0", tmp_path / "eight.gguf", importance)
    assert not eight.importance, "ranges of eight bits are not weighted"


def test_a_checkpoint_without_its_own_head_shares_the_embeddings(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model", tie_word_embeddings=True)
    made = export_gguf(examine(open_checkpoint(directory)), "bf16", tmp_path / "model.gguf")
    assert "output.weight" not in made.file.tensors


def test_the_file_holds_the_chat_template_and_ends_answers_as_the_model_does(
    demo_like: Path, tmp_path: Path
) -> None:
    made = export_gguf(examine(open_checkpoint(demo_like)), "f16", tmp_path / "model.gguf")
    with LlamaModel(made.file.path, only_vocabulary=True) as model:
        assert model.chat_template() == (demo_like / "chat_template.jinja").read_text(encoding="utf-8")
        assert model.ends(model.eos)
        assert model.eos == 2


REFUSED = [
    ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM is not exported"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantized already"),
    ({"hidden_act": "relu"}, "hidden_act is relu"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is dynamic"),
    ({"layer_types": ["sliding_attention"] * 2, "sliding_window": 32}, "sliding_window is 32"),
    ({"rope_parameters": {**YARN, "beta_fast": 4.0}}, "beta_fast of YaRN is 4.0"),
    (
        {"rope_parameters": {**YARN, "beta_slow": 2}},
        "beta_slow of YaRN is 2, llama.cpp computes a llama with 1",
    ),
    ({"rope_parameters": {**YARN, "truncate": False}}, "truncate of YaRN is False"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_what_llama_cpp_computes_otherwise_is_refused_before_work(
    changes: dict[str, Any], said: str, demo_like: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(demo_like, tmp_path / "model")
    change_config(directory, **changes)
    with pytest.raises(ExportError, match=said):
        examine(open_checkpoint(directory))


@pytest.mark.parametrize(
    ("architecture", "shape", "said"),
    [
        (
            "qwen3",
            {"attention_bias": True},
            "attention_bias is True, llama.cpp computes a qwen3 with no biases",
        ),
        (
            "gemma3_text",
            {
                "query_pre_attn_scalar": 32,
                "num_hidden_layers": 6,
                "rope_parameters": {
                    "full_attention": {**YARN, "attention_factor": 1.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                },
            },
            "attention_factor of YaRN is another",
        ),
    ],
)
def test_what_an_architecture_has_no_place_for_is_refused_before_work(
    architecture: str, shape: dict[str, Any], said: str, tmp_path: Path
) -> None:
    directory = make_checkpoint(tmp_path / "model", architecture, **shape)
    with pytest.raises(ExportError, match=said):
        examine(open_checkpoint(directory))


def test_a_bias_that_llama_cpp_does_not_add_is_refused_whatever_the_configuration_says(
    tmp_path: Path,
) -> None:
    directory = make_checkpoint(tmp_path / "model", "qwen3", attention_bias=True)
    change_config(directory, attention_bias=False)
    with pytest.raises(ExportError, match=r"self_attn\.k_proj\.bias has no place in llama.cpp's qwen3"):
        examine(open_checkpoint(directory))


def test_a_file_that_llama_cpp_does_not_load_is_not_called_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qwen3 = dataclasses.replace(KNOWN["Qwen3ForCausalLM"], biases=("q_proj", "k_proj", "v_proj", "o_proj"))
    monkeypatch.setattr(architectures, "KNOWN", {"Qwen3ForCausalLM": qwen3})
    directory, out = make_checkpoint(tmp_path / "model", "qwen3", attention_bias=True), tmp_path / "out"
    with pytest.raises(LlamaError, match=r"llama.cpp cannot load it: .*wrong number of tensors"):
        export_gguf(examine(open_checkpoint(directory)), "f16", out / "model.gguf")
    assert not list(out.iterdir())


def test_a_tokenizer_that_llama_cpp_reads_otherwise_is_refused(demo_like: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(demo_like, tmp_path / "model")
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ExportError, match="other tokens of text"):
        examine(open_checkpoint(directory))


def test_words_that_stand_alone_are_refused_before_work(tmp_path: Path) -> None:
    directory = make_tiny(tmp_path / "model")
    with pytest.raises(ExportError, match="added tokens stand for whole words alone"):
        examine(open_checkpoint(directory))


def test_an_unknown_type_is_refused_with_the_known_ones(demo_like: Path, tmp_path: Path) -> None:
    source = examine(open_checkpoint(demo_like))
    with pytest.raises(ExportError, match=r"'q5'.*q4_k_m"):
        export_gguf(source, "q5", tmp_path / "model.gguf")


def test_a_full_disk_is_said_before_work_and_leaves_nothing(
    demo_like: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = examine(open_checkpoint(demo_like))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 1 << 20))
    out = tmp_path / "out"
    with pytest.raises(NoRoomError):
        export_gguf(source, "q4_k_m", out / "model.gguf")
    assert not list(out.iterdir())


def test_what_a_run_that_was_killed_left_goes_with_the_next(demo_like: Path, tmp_path: Path) -> None:
    for name in (".partial-model.gguf", ".partial-model.gguf.floats"):
        (tmp_path / name).write_bytes(b"half")
    export_gguf(examine(open_checkpoint(demo_like)), "q8_0", tmp_path / "model.gguf")
    assert [one.name for one in tmp_path.iterdir()] == ["model.gguf"]


def test_a_value_beyond_16_bits_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = make_checkpoint(tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    with pytest.raises(ExportError, match="take --type bf16"):
        export_gguf(examine(open_checkpoint(directory)), "f16", out / "model.gguf")
    assert not list(out.iterdir())


def test_files_that_are_cut_or_none_are_refused(demo_like: Path, tmp_path: Path) -> None:
    made = export_gguf(examine(open_checkpoint(demo_like)), "q8_0", tmp_path / "model.gguf")
    whole = made.file.path.read_bytes()
    for size, said in ((len(whole) - 40, "its header says"), (1000, "no whole GGUF|ends within|fit")):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole[:size])
        with pytest.raises(ExportError, match=said):
            read_gguf(cut)
    (tmp_path / "text.gguf").write_text("not a model", encoding="utf-8")
    with pytest.raises(ExportError, match="does not begin as GGUF"):
        read_gguf(tmp_path / "text.gguf")
    with pytest.raises(ExportError, match="does not exist"):
        read_gguf(tmp_path / "none.gguf")


def test_a_variant_says_what_every_matrix_is_stored_in(demo_like: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(demo_like)
    registry = Registry(tmp_path / "variants", "tiny", "bf16")
    registry.add_reference(checkpoint)
    conversations = [[{"role": "user", "content": f"{n} apples"}, {"role": "assistant", "content": "ok"}]
                     for n in range(16)]  # fmt: skip
    calibration = calibration_of(conversations, "apples", checkpoint)
    card = add_gguf(registry, checkpoint, "small", "q4_k_m", calibration)
    assert (card.target, card.scheme, card.method) == ("llama.cpp", "q4_k_m", "imatrix")
    assert card.weight_bits == 4
    assert set(card.module_bits.values()) <= {4, 5, 6, 8}
    assert card.weight_bytes < registry.card("bf16").weight_bytes / 2
    assert card.calibration == calibration.description
    assert add_gguf(registry, checkpoint, "small", "q4_k_m", calibration).version == card.version
    assert registry.card("small").files.keys() >= {"model.gguf", "tokenizer.json", "config.json"}


def test_a_foreign_file_is_registered_as_it_is_and_only_with_its_own_model(
    demo_like: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(demo_like)
    made = export_gguf(examine(checkpoint), "q4_0", tmp_path / "foreign.gguf")
    registry = Registry(tmp_path / "variants", "tiny", "bf16")
    registry.add_reference(checkpoint)
    card = register_gguf(registry, checkpoint, made.file.path, "foreign")
    assert (card.origin, card.scheme, card.method) == ("registered", "q4_0", "unknown")
    stored = registry.path("foreign") / "model.gguf"
    assert stored.read_bytes() == made.file.path.read_bytes()
    with pytest.raises(CardError, match="reference's name"):
        register_gguf(registry, checkpoint, made.file.path, "bf16")
    other = open_checkpoint(make_checkpoint(tmp_path / "other"))
    with pytest.raises(ExportError, match="embedding_length is 256, hidden_size"):
        register_gguf(Registry(tmp_path / "others", "other", "bf16"), other, made.file.path, "foreign")
