"""Sizes of models and what training takes, beside the figures that textbooks give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest

from quantize.core.checkpoint import open_checkpoint
from quantize.core.modules import read_modules
from quantize.core.plan import uniform
from quantize.core.shape import (
    LLAMAS,
    ShapeError,
    parameters_of,
    shape_of_checkpoint,
    shape_of_config,
    shape_of_parameters,
)
from quantize.core.training_memory import NF4_BITS, adapter_parameters, full_memory, lora_memory

MODEL = Path(__file__).parents[2] / "deploy" / "assistant" / "model"
GB = 1e9


@pytest.mark.parametrize(
    "text", ["100M", "135M", "500M", "1B", "1.5B", "7B", "8B", "13B", "20B", "70B", "2T"]
)
def test_a_number_of_parameters_comes_out_within_two_per_cent(text: str) -> None:
    assert shape_of_parameters(parameters_of(text)).parameters == pytest.approx(parameters_of(text), rel=0.02)


@pytest.mark.parametrize("text", ["", "70", "seven", "-7B", "0B", "50M", "3T", "7GB"])
def test_what_is_no_number_of_parameters_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ShapeError, match="such as 7B"):
        parameters_of(text)


def test_70_b_take_280_140_70_and_35_to_40_gb() -> None:
    shape = shape_of_parameters(parameters_of("70B"))
    for bits, gigabytes in ((32, 280), (16, 140), (8, 70), (4, 35)):
        assert shape.parameters * bits / 8 / GB == pytest.approx(gigabytes, rel=0.01)
    stored = uniform(shape.modules, "w4a16-g128").weight_bytes(shape.modules) / GB
    assert 35 < stored < 40  # with scales, and embeddings at 16 bits


def test_7_b_take_14_gb_at_16_bits() -> None:
    shape = shape_of_parameters(parameters_of("7B"))
    assert uniform(shape.modules, "bf16").weight_bytes(shape.modules) / GB == pytest.approx(14, rel=0.01)


def test_a_token_of_13_b_takes_0_8_mb_of_kv_cache() -> None:
    shape = shape_of_parameters(parameters_of("13B"))
    assert shape.kv_bytes_per_token() == 2 * 40 * 5120 * 2 == 819_200
    assert shape.kv_bytes_per_token("fp8") == 409_600


def test_qlora_of_7_b_takes_about_10_gb_and_full_training_about_50_with_8_bit_moments() -> None:
    shape, beside = shape_of_parameters(parameters_of("7B")), 1.6
    assert lora_memory(shape, quantized=True).total / GB + beside == pytest.approx(10, abs=1)
    assert full_memory(shape, "adamw-8bit").total / GB + beside == pytest.approx(50, abs=4)
    # What is 50 GB holds for 6 bytes a parameter; mixed precision takes 16.
    assert full_memory(shape, "adamw").total / GB > 110


def test_the_base_of_qlora_has_a_little_more_than_four_bits() -> None:
    assert pytest.approx(4.127, abs=0.001) == NF4_BITS
    shape = LLAMAS["Llama 7B"].shape("Llama 7B")
    # Rank 16 on the seven matrices of 32 blocks.
    assert adapter_parameters(shape) == 16 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))


def test_shapes_are_those_of_the_published_models() -> None:
    for name, parameters in (("Llama 7B", 6.738e9), ("Llama 3.1 8B", 8.03e9), ("Llama 2 70B", 68.98e9)):
        assert LLAMAS[name].shape(name).parameters == pytest.approx(parameters, rel=0.001)


def test_a_config_alone_says_what_the_checkpoint_says() -> None:
    checkpoint = open_checkpoint(MODEL)
    by_files = shape_of_checkpoint(checkpoint)
    by_config = shape_of_config(json.loads((MODEL / "config.json").read_text()), "assistant")
    assert by_files.assumed == ""
    assert by_config.parameters == by_files.parameters
    for scheme in ("bf16", "w8a8", "w4a16-g64"):
        assert uniform(by_config.modules, scheme).weight_bytes(by_config.modules) == uniform(
            by_files.modules, scheme
        ).weight_bytes(read_modules(checkpoint))


def test_experts_are_counted() -> None:
    config = {
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_hidden_layers": 48,
        "vocab_size": 151936,
        "intermediate_size": 6144,
        "num_experts": 128,
        "moe_intermediate_size": 768,
        "max_position_embeddings": 40960,
    }
    assert shape_of_config(config, "Qwen3-30B-A3B").parameters == pytest.approx(30.5e9, rel=0.01)


def test_a_config_that_says_too_little_is_refused() -> None:
    with pytest.raises(ShapeError, match="lacks hidden_size"):
        shape_of_config({"num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 8}, "mine")
    with pytest.raises(ShapeError, match="quantized already"):
        shape_of_config(
            {
                "hidden_size": 64,
                "num_attention_heads": 4,
                "num_hidden_layers": 2,
                "vocab_size": 8,
                "quantization_config": {"quant_method": "gptq"},
            },
            "mine",
        )


@pytest.mark.parametrize("way", ["full", "lora", "qlora"])
def test_advice_and_the_trainer_count_alike(way: Literal["full", "lora", "qlora"]) -> None:
    """What is told before there is a checkpoint is near what `tiercel train` predicts from one."""
    from quantize.train import memory, nf4
    from quantize.train.adapters import Lora

    assert nf4.BITS == NF4_BITS
    checkpoint = open_checkpoint(MODEL)
    shape = shape_of_checkpoint(checkpoint)
    portion = memory.Shape(examples=4, tokens=1024, places=1024, checkpointing=True)
    theirs = memory.predict(checkpoint, shape.modules, way, Lora(rank=16), portion, 2)
    ours = full_memory(shape) if way == "full" else lora_memory(shape, quantized=way == "qlora")
    if way != "full":  # of which the trainer keeps all in 32 bits
        assert theirs.base + theirs.trained == pytest.approx(ours.weights, rel=0.01)
        assert (theirs.gradients, theirs.optimizer) == (ours.gradients, ours.optimizer)
    assert theirs.total / memory.MARGIN == pytest.approx(ours.total, rel=0.3)
