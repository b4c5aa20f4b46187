"""Planting outliers must change activations and nothing else: otherwise the benchmark compares two models."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.quantization import outlier_model
from benchmarks.quantization.outlier_model import (
    CHANNELS,
    FACTORS,
    PlantingError,
    effect,
    following_linears,
    int8_inputs,
    logits,
    make,
    mean_kl,
    plant,
    training_key,
    write_planted,
)
from quantize.core.checkpoint import open_checkpoint
from tests.quantize.tiny import make_checkpoint

SEQUENCES = [list(range(1, 40)), list(range(700, 760, 3))]


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama, with matrices wide enough that its logits are far from uniform."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "model", initializer_range=0.3)


@pytest.fixture
def model(checkpoint: Path) -> Any:
    return load(checkpoint)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_are_the_same_to_the_last_bit(model: Any, dtype: torch.dtype) -> None:
    before = copy.deepcopy(model).to(dtype)
    plant(model)
    assert torch.equal(logits(before, SEQUENCES), logits(model.to(dtype), SEQUENCES))


def test_factors_are_in_the_norms_and_out_of_the_next_linears_and_nowhere_else(model: Any) -> None:
    before = copy.deepcopy(model)
    planted = plant(model)
    expected = dict(before.named_parameters())
    for number, layer in enumerate(before.model.layers):
        for norm, following in following_linears(layer).items():
            channels = planted.pop(f"model.layers.{number}.{norm}")
            assert len(channels) == CHANNELS
            assert set(channels.values()) <= set(FACTORS)
            for channel, factor in channels.items():
                getattr(layer, norm).weight.data[channel] *= factor
                for linear in following:
                    linear.weight.data[:, channel] /= factor
    assert planted == {}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_a_norms_output_has_its_outliers_in_the_planted_channels(model: Any) -> None:
    planted = plant(model, factors=(16.0,))
    seen: list[torch.Tensor] = []
    norm = model.model.layers[1].post_attention_layernorm
    norm.register_forward_hook(lambda _module, _inputs, output: seen.append(output[0].float().abs().mean(0)))
    logits(model, SEQUENCES[:1])
    assert set(seen[0].topk(CHANNELS).indices.tolist()) == set(
        planted["model.layers.1.post_attention_layernorm"]
    )


def test_int8_inputs_lose_more_after_planting(model: Any) -> None:
    before = copy.deepcopy(model)
    plant(model)
    figures = effect(before, model, SEQUENCES)
    assert figures["tokens"] == sum(map(len, SEQUENCES))
    assert figures["logits_max_difference_float32"] == figures["logits_max_difference_bf16"] == 0.0
    assert figures["int8_inputs_kl_after"] > 2 * figures["int8_inputs_kl_before"] > 0.0


def test_int8_inputs_round_to_one_range_per_token_and_only_within_the_context(model: Any) -> None:
    linear = model.float().model.layers[0].self_attn.q_proj
    linear.weight.data = torch.eye(linear.out_features, linear.in_features)
    x = torch.tensor([[127.0, 0.4, -3.6], [1.27, 0.004, 0.0]])
    inputs = torch.zeros(1, 2, linear.in_features)
    inputs[0, :, :3] = x
    with int8_inputs(model):
        rounded = linear(inputs)[0, :, :3]
    torch.testing.assert_close(rounded, torch.tensor([[127.0, 0.0, -4.0], [1.27, 0.0, 0.0]]))
    torch.testing.assert_close(linear(inputs)[0, :, :3], x)


def test_the_context_ends_after_an_error_too(model: Any) -> None:
    before = logits(model, SEQUENCES)
    with pytest.raises(KeyError), int8_inputs(model):
        raise KeyError
    assert torch.equal(before, logits(model, SEQUENCES))


def test_mean_kl_is_the_textbooks() -> None:
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    expected = 0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(2 / 3).log()
    assert mean_kl(p.log() + 3, q.log()) == pytest.approx(float(expected), rel=1e-6)
    assert mean_kl(p.log(), p.log()) == 0.0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"channels": 0}, "channels=0: must be from 1 to the hidden size, 128"),
        ({"channels": 129}, "channels=129"),
        ({"factors": ()}, r"factors=\[\]: must be powers of two"),
        ({"factors": (8.0, 12.0)}, r"factors=\[8.0, 12.0\]"),
        ({"factors": (0.5,)}, r"factors=\[0.5\]"),
        ({"factors": (float("inf"),)}, "powers of two"),
        ({"factors": (float("nan"),)}, "powers of two"),
    ],
)
def test_bad_settings_are_refused_before_anything_changes(
    model: Any, settings: dict[str, Any], words: str
) -> None:
    before = copy.deepcopy(model)
    with pytest.raises(PlantingError, match=words):
        plant(model, **settings)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(before.named_parameters())[name])


def test_another_architecture_is_refused(model: Any) -> None:
    model.config.model_type = "gemma2"
    with pytest.raises(PlantingError, match="model_type='gemma2'"):
        plant(model)


def test_the_written_directory_is_a_checkpoint_that_says_what_was_done(
    checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "planted"
    write_planted(checkpoint, out, SEQUENCES)
    assert open_checkpoint(out).config["dtype"] == "bfloat16"
    assert (out / "chat_template.jinja").read_bytes() == (checkpoint / "chat_template.jinja").read_bytes()
    again = load(out)
    assert torch.equal(logits(load(checkpoint), SEQUENCES), logits(again, SEQUENCES))
    record = json.loads((out / "planting.json").read_text())
    original = load(checkpoint)
    for name, channels in record["channels"].items():
        planted, plain = (m.get_submodule(name).weight for m in (again, original))
        factors = torch.ones_like(plain)
        for channel, factor in channels.items():
            factors[int(channel)] = factor
        assert torch.equal(planted, plain * factors), name


def test_a_planting_that_changes_the_function_is_not_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: Any) -> outlier_model.Planted:
        model.model.layers[0].input_layernorm.weight.data[0] *= 8
        return {}

    monkeypatch.setattr(outlier_model, "plant", broken)
    with pytest.raises(PlantingError, match="planting changed float32 logits"):
        write_planted(checkpoint, tmp_path / "planted", SEQUENCES)
    assert not (tmp_path / "planted").exists()


def test_missing_data_and_a_length_of_nothing_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"nowhere\.json is missing: place CLINC150"):
        make(tmp_path, clinc150=tmp_path / "nowhere.json")
    for minutes in (0.0, -1.0, 0.01, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"minutes=.*: must be at least 0\.05"):
            make(tmp_path, minutes=minutes)
    assert list(tmp_path.iterdir()) == []


def test_other_data_or_another_length_is_another_training(tmp_path: Path) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    first.write_text("{}")
    second.write_text('{"train": []}')
    keys = {training_key(first, 500), training_key(first, 501), training_key(second, 500)}
    assert len(keys) == 3
    assert training_key(first, 500) in keys
