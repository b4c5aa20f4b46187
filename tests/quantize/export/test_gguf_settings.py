"""What older, shorter and odder checkpoints say, as GGUF: read as transformers reads it, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantize.core.checkpoint import open_checkpoint
from quantize.export.gguf import examine, export_gguf
from quantize.export.llama import LlamaModel
from quantize.export.types import ExportError
from quantize.export.variant import refuse_other_model
from tests.quantize.export.test_gguf import (
    LIKE,
    kl,
    llama_logits,
    make_checkpoint,
    scale_weights,
    transformers_logits,
)
from tests.quantize.tiny import change_config

GEMMA = {"query_pre_attn_scalar": 32, "sliding_window": 16, "num_hidden_layers": 6}


@pytest.mark.parametrize(
    ("architecture", "shape", "changes"),
    [
        ("llama", {}, {"rms_norm_eps": None}),
        ("llama", {}, {"rope_parameters": None, "rope_theta": 500.0}),
        ("gemma3_text", GEMMA, {"layer_types": None}),
        (
            "gemma3_text",
            GEMMA,
            {
                "rope_parameters": None,
                "rope_theta": 50_000.0,
                "rope_local_base_freq": 500.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
    ],
)
def test_older_configurations_are_read_as_transformers_reads_them(
    architecture: str, shape: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    directory = make_checkpoint(tmp_path / "model", architecture, **shape)
    scale_weights(directory)
    change_config(directory, **changes)
    made = export_gguf(examine(open_checkpoint(directory)), "f16", tmp_path / "model.gguf")
    assert kl(transformers_logits(directory), llama_logits(made.file.path)) < LIKE


@pytest.mark.parametrize(
    ("shape", "changes", "said"),
    [
        ({"use_bidirectional_attention": True}, {}, "use_bidirectional_attention is True"),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
                    "sliding_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
                }
            },
            {},
            "rope_type of sliding_attention is linear",
        ),
        ({}, {"layer_types": None, "sliding_window_pattern": 3}, "layer_types is another pattern"),
        ({}, {"query_pre_attn_scalar": None}, "query_pre_attn_scalar is 256"),
    ],
)
def test_what_llama_cpp_computes_otherwise_of_gemma_is_refused(
    shape: dict[str, Any], changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    directory = make_checkpoint(tmp_path / "model", "gemma3_text", **GEMMA, **shape)
    change_config(directory, **changes)
    with pytest.raises(ExportError, match=said):
        examine(open_checkpoint(directory))


def test_words_that_the_model_has_no_embeddings_of_are_left_out(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model")
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["vocab"]["zzqzz"] = 2048
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    assert len(examine(open_checkpoint(directory)).vocabulary.tokens) == 2048


def set_ends(directory: Path, *tokens: int) -> Path:
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": tokens}))
    return directory


def test_answers_end_at_each_token_that_ends_the_models(tmp_path: Path) -> None:
    directory = set_ends(make_checkpoint(tmp_path / "model"), 2, 40, 41)
    made = export_gguf(examine(open_checkpoint(directory)), "f16", tmp_path / "model.gguf")
    with LlamaModel(made.file.path, only_vocabulary=True) as model:
        assert [model.ends(token) for token in (2, 40, 41, 42)] == [True, True, True, False]
    # A foreign file that knows fewer is taken, and its card says so.
    checkpoint = open_checkpoint(set_ends(directory, 2, 40, 41, 42))
    assert refuse_other_model(checkpoint, made.file) == (
        "answers do not end at 42, where the base model's do",
    )
    with pytest.raises(ExportError, match="would write on after token 42"):
        examine(checkpoint)
