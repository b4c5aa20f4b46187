"""Smaller and sparser models: what goes is what matters least, and what is left computes as it should."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize.check import refuse_unfit
from quantize.compact import choose
from quantize.compact import make as making
from quantize.compact.compare import compare
from quantize.compact.make import neurons_left, take
from quantize.compact.steps import CompactError, Step, parse_step
from quantize.core.checkpoint import Checkpoint, open_checkpoint
from quantize.core.dequantize import linear_weight
from quantize.core.loading import load_model
from quantize.core.modules import read_modules
from quantize.core.plan import uniform
from quantize.core.schemes import scheme
from quantize.core.tensors import read_parts
from quantize.make.variant import part_store
from tests.quantize.tiny import MODEL, change_config, make_checkpoint

IDS = [[1, 5, 9, 300, 17, 44, 8], [1, 700, 30, 31, 32, 33, 34, 35, 36], [1, 12, 13, 900, 15]]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Grouped queries, three layers, biases on query, key and value."""
    directory = tmp_path_factory.mktemp("compact") / "tiny"
    return open_checkpoint(make_checkpoint(directory, "qwen2", num_hidden_layers=3))


def logits(checkpoint: Checkpoint, model: Any = None) -> torch.Tensor:
    found = model or load_model(checkpoint, torch.float32)
    with torch.inference_mode():
        return torch.cat([found(torch.tensor([ids])).logits[0] for ids in IDS])


def scaled(directory: Path, factors: dict[str, float], columns: slice = slice(None)) -> Checkpoint:
    """A checkpoint with columns of the named tensors multiplied."""
    tensors = load_file(directory / "model.safetensors")
    for name, factor in factors.items():
        tensors[name][:, columns] *= factor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(directory)


@pytest.mark.parametrize(
    "text", ["magnitude:0.5", "wanda:2:4", "neurons:0.25", "heads:1", "layers:2", "svd:0.3"]
)
def test_steps_have_names(text: str) -> None:
    assert parse_step(text).name == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("wanda", "unknown step"),
        ("prune:0.5", "known, with other figures"),
        ("wanda:1", "between 0 and 1"),
        ("svd:0", "between 0 and 1"),
        ("heads:0", "heads:1 or more"),
        ("layers:1.5", "layers:1 or more"),
        ("svd:2:4", "2:4 is of masks"),
        ("wanda:4:2", "wanda takes one figure; known: .*wanda:2:4"),
        ("outliers:0.01", "outliers, and nothing else, name a quantizer"),
    ],
)
def test_steps_that_mean_nothing_are_refused(text: str, words: str) -> None:
    with pytest.raises(CompactError, match=words):
        parse_step(text)


def test_a_share_of_every_row_goes_and_it_is_the_lowest() -> None:
    of = normal(5, 40).abs()
    mask = choose.kept(of, 0.25)
    assert mask.sum(1).tolist() == [30] * 5
    assert (of.masked_fill(mask, 0).amax(1) <= of.masked_fill(~mask, 9).amin(1)).all()


def test_two_of_every_four_stay_and_they_are_the_highest() -> None:
    of = normal(6, 32).abs()
    mask = choose.kept_of_four(of).reshape(6, 8, 4)
    assert (mask.sum(-1) == 2).all()
    fours = of.reshape(6, 8, 4)
    assert (fours.masked_fill(~mask, 9).amin(-1) >= fours.masked_fill(mask, 0).amax(-1)).all()


@pytest.mark.parametrize("fours", [False, True])
def test_inputs_that_are_large_keep_their_weights_by_wanda_alone(fours: bool) -> None:
    weight, x = normal(64, 128), normal(512, 128, seed=1) * torch.exp(normal(128, seed=2))
    importance = x.square().mean(0)

    def error(importance: torch.Tensor | None) -> float:
        of = choose.scores(weight, importance)
        mask = choose.kept_of_four(of) if fours else choose.kept(of, 0.5)
        return float((x @ (weight * mask - weight).T).norm() / (x @ weight.T).norm())

    assert error(importance) < 0.85 * error(None)


def test_low_rank_is_exact_at_full_rank_and_weighs_inputs() -> None:
    weight, importance = normal(48, 32), torch.exp(normal(32, seed=3))
    assert torch.allclose(choose.low_rank(weight, 32).product(), weight, atol=1e-4)
    assert choose.rank_for((48, 32), 0.5) == int(0.5 * 48 * 32 / 80)
    plain, weighed = choose.low_rank(weight, 8), choose.low_rank(weight, 8, importance)
    assert weighed.numbers == 8 * (48 + 32)
    weighed_error, plain_error = (
        choose.relative_error(weight, one.product(), importance) for one in (weighed, plain)
    )
    assert weighed_error < plain_error
    values = torch.linalg.svdvals(weight)
    expected = float((values[8:].square().sum() / values.square().sum()).sqrt())
    assert choose.relative_error(weight, plain.product()) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("text", ["magnitude:0.5", "wanda:0.5", "wanda:2:4"])
def test_masks_leave_zeros_and_everything_else_as_it_was(tiny: Checkpoint, tmp_path: Path, text: str) -> None:
    done = take(tiny, parse_step(text), IDS, tmp_path / "out")
    made = open_checkpoint(tmp_path / "out")
    refuse_unfit(made)
    before, after = (load_file(one.path / "model.safetensors") for one in (tiny, made))
    linears = {f"{one.name}.weight" for one in read_modules(tiny).linears}
    zeros = 0
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        gone = (after[name] == 0) & (name in linears)
        zeros += int(gone.sum())
        assert torch.equal(tensor[~gone], after[name][~gone]), name
    assert zeros == done.zeros == sum(one.weights for one in read_modules(tiny).linears) // 2
    assert (done.parameters_after, done.bytes_after) == (done.parameters_before, done.bytes_before)


@pytest.mark.parametrize(
    ("text", "reader", "left"), [("neurons:0.25", "mlp.down_proj", 192), ("heads:1", "self_attn.o_proj", 64)]
)
def test_a_model_with_less_in_it_computes_what_the_whole_one_does_with_zeros_there(
    tiny: Checkpoint, tmp_path: Path, text: str, reader: str, left: int
) -> None:
    done = take(tiny, parse_step(text), IDS, tmp_path / "out")
    made = open_checkpoint(tmp_path / "out")
    refuse_unfit(made)
    whole, cut = load_model(tiny, torch.float32), load_model(made, torch.float32)
    for old, new in zip(whole.model.layers, cut.model.layers, strict=True):
        wide, narrow = old.get_submodule(reader).weight.data, new.get_submodule(reader).weight.data
        assert narrow.shape[1] == left
        # Which columns stayed is read off the matrix that has them.
        stayed = [int((wide - column.unsqueeze(1)).abs().sum(0).argmin()) for column in narrow.T]
        assert torch.equal(wide[:, stayed], narrow)
        assert all(a < b for a, b in itertools.pairwise(stayed))
        mask = torch.zeros(wide.shape[1])
        mask[stayed] = 1
        wide.mul_(mask)
    assert torch.allclose(logits(tiny, whole), logits(made, cut), atol=1e-4)
    assert not torch.allclose(logits(tiny), logits(made, cut), atol=1e-3)
    assert done.bytes_after < done.bytes_before


def test_the_channels_that_go_are_those_that_add_least(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "tiny")
    names = {f"model.layers.{layer}.mlp.down_proj.weight": 1e-3 for layer in range(2)}
    checkpoint = scaled(directory, names, slice(64, 128))
    done = take(checkpoint, parse_step("neurons:0.25"), IDS, tmp_path / "out")
    assert all(row.error < 1e-2 for row in done.groups)
    assert {row.left for row in done.groups} == {0.75}


def test_layers_that_do_nothing_go_first_and_the_rest_moves_up(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "tiny", num_hidden_layers=3)
    idle = {f"model.layers.1.{leaf}.weight": 0.0 for leaf in ("self_attn.o_proj", "mlp.down_proj")}
    checkpoint = scaled(directory, idle)
    done = take(checkpoint, parse_step("layers:1"), IDS, tmp_path / "out")
    made = open_checkpoint(tmp_path / "out")
    assert made.config["num_hidden_layers"] == 2
    assert done.what.startswith("layers, with 1 - cos(input, output): 1 (")
    assert torch.allclose(logits(checkpoint), logits(made), atol=1e-4)
    assert done.bytes_after < done.bytes_before


@pytest.mark.parametrize(
    ("architecture", "shape", "written_out"),
    [
        ("gemma2", {}, "layer_types"),
        ("gemma3_text", {"num_hidden_layers": 7}, "layer_types"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}, "layer_types"),
        ("llama", {"num_hidden_layers": 3, "eos_token_id": [2, 3, 4]}, ""),
    ],
)
def test_layers_that_move_up_stay_what_they_were(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    shape: dict[str, Any],
    written_out: str,
) -> None:
    """Older configurations say by a rule of numbers which layers look at a window alone."""
    settings = {"num_hidden_layers": 5, "sliding_window": 4, **shape}
    directory = make_checkpoint(tmp_path / "tiny", architecture, **settings)
    change_config(directory, layer_types=None)
    checkpoint = open_checkpoint(directory)
    count = settings["num_hidden_layers"]
    monkeypatch.setattr(making, "_influences", lambda *_: [0.5, 0.1, 0.6, 0.7, 0.8, 0.9, 1.0][:count])
    take(checkpoint, parse_step("layers:1"), IDS, tmp_path / "out")
    made = open_checkpoint(tmp_path / "out")
    whole = load_model(checkpoint, torch.float32)
    del whole.model.layers[1]
    expected = list(getattr(whole.config, "layer_types", None) or ())
    if written_out:
        del expected[1]
        whole.config.layer_types = expected
        assert made.config["layer_types"] == expected
    whole.config.num_hidden_layers, whole.config.use_cache = count - 1, False
    assert torch.allclose(logits(checkpoint, whole), logits(made), atol=1e-4)
    assert made.config["eos_token_id"] == checkpoint.config["eos_token_id"]


def test_layers_with_experts_stay_those_that_have_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"num_hidden_layers": 5, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "moe", "qwen3_moe", **shape))
    monkeypatch.setattr(making, "_influences", lambda *_: [0.1, 0.5, 0.6, 0.7, 0.8])
    take(checkpoint, parse_step("layers:1"), IDS, tmp_path / "out")
    made = open_checkpoint(tmp_path / "out")
    refuse_unfit(made)
    assert made.config["mlp_only_layers"] == [1, 2, 3]
    assert made.config["decoder_sparse_step"] == 1


@pytest.mark.parametrize("architecture", ["phi3", "glm4"])
@pytest.mark.parametrize("text", ["neurons:0.25", "heads:1"])
def test_matrices_that_are_stored_as_one_are_cut_in_each_part(
    tmp_path: Path, architecture: str, text: str
) -> None:
    directory = make_checkpoint(tmp_path / "tiny", architecture)
    # What goes adds nothing, so that the model computes what it did.
    down, size = ("mlp.down_proj", 64) if text.startswith("neurons") else ("self_attn.o_proj", 64)
    names = {f"model.layers.{layer}.{down}.weight": 0.0 for layer in range(2)}
    checkpoint = scaled(directory, names, slice(64, 64 + size))
    take(checkpoint, parse_step(text), IDS, tmp_path / "out")
    made = open_checkpoint(tmp_path / "out")
    refuse_unfit(made)
    assert torch.allclose(logits(checkpoint), logits(made), atol=1e-4)


def test_what_came_out_as_no_model_is_not_called_done(
    tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "without_layers", lambda checkpoint, left: dict(checkpoint.config))
    with pytest.raises(CompactError, match="do not go with what is cut"):
        take(tiny, parse_step("layers:1"), IDS, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_factors_of_low_rank_are_stored_as_their_product(tiny: Checkpoint, tmp_path: Path) -> None:
    done = take(tiny, parse_step("svd:0.5"), IDS, tmp_path / "out")
    linear = read_modules(tiny).linears[0]
    made = load_file(tmp_path / "out/model.safetensors")[f"{linear.name}.weight"]
    rank = choose.rank_for((linear.out_features, linear.in_features), 0.5)
    values = torch.linalg.svdvals(made.float())
    assert values[rank - 1] > 20 * values[rank]  # what is left is bfloat16's rounding
    assert all(0.4 < row.left <= 0.5 for row in done.groups)
    assert "no linear module of two factors" in done.exploited


def test_what_was_taken_stands_beside_the_weights(tiny: Checkpoint, tmp_path: Path) -> None:
    done = take(tiny, parse_step("magnitude:0.5"), [], tmp_path / "out")
    assert json.loads((tmp_path / "out/compaction.json").read_text()) == done.model_dump(mode="json")


def test_nothing_is_left_of_a_step_that_fails(
    tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(making, "write_shards", full)
    with pytest.raises(OSError, match="No space left"):
        take(tiny, parse_step("magnitude:0.5"), [], tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("heads:2", "a layer has 2 key-value heads"),
        ("layers:3", "the model has 3 layers"),
        ("neurons:0.9", "none would be left"),
    ],
)
def test_what_would_leave_nothing_is_refused(tiny: Checkpoint, tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(CompactError, match=words):
        take(tiny, parse_step(text), IDS, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_directory_that_exists_is_not_written_over(tiny: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CompactError, match="exists; name another"):
        take(tiny, Step("magnitude", 0.5), [], tmp_path)


def test_experts_and_wrappers_are_refused(tmp_path: Path) -> None:
    experts = open_checkpoint(make_checkpoint(tmp_path / "moe", "qwen3_moe"))
    with pytest.raises(CompactError, match="not cut here"):
        take(experts, parse_step("neurons:0.5"), IDS, tmp_path / "out")
    wrapper = open_checkpoint(make_checkpoint(tmp_path / "wrapper", "gemma3"))
    with pytest.raises(CompactError, match="give a text model"):
        take(wrapper, parse_step("magnitude:0.5"), [], tmp_path / "out")


def test_neurons_that_are_left_fit_groups_of_scales() -> None:
    assert neurons_left(768, 0.3) == 512
    assert neurons_left(100, 0.3) == 70


def test_a_model_is_like_itself_and_its_loss_is_transformers(tiny: Checkpoint) -> None:
    found = compare(tiny, tiny, [(ids, 1) for ids in IDS])
    assert (found.kl, found.agreement) == (0.0, 1.0)
    model = load_model(tiny, torch.bfloat16)
    with torch.inference_mode():
        losses = [float(model(torch.tensor([ids]), labels=torch.tensor([ids])).loss) for ids in IDS]
    weights = [len(ids) - 1 for ids in IDS]
    mean = sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)
    assert found.loss_before == pytest.approx(mean, rel=0.01)
    assert found.tokens == sum(weights)
    ends = compare(tiny, tiny, [(ids, len(ids) - 2) for ids in IDS])
    assert (ends.tokens, ends.kl) == (2 * len(IDS), 0.0)


def test_the_command_takes_steps_one_after_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from deploy.cli import main

    out = tmp_path / "smaller"
    calibration = ["--calibration", str(MODEL.parent / "data/calibration.jsonl")]
    main(["quantize", "compact", str(MODEL), str(out), "neurons:0.25", "wanda:2:4", *calibration])
    told = capsys.readouterr().out
    assert "192 of 768 MLP channels a layer" in told
    assert "has taken 2:4 kernels out" in told
    assert "simulated, a gate measures the engine" in told
    assert open_checkpoint(out).config["intermediate_size"] == 576
    assert [path.name for path in tmp_path.iterdir()] == ["smaller"]

    with pytest.raises(SystemExit) as status:
        main(["quantize", "compact", str(MODEL), str(tmp_path / "none"), "layers:4"])
    assert status.value.code == 2
    assert "the model has 4 layers; take fewer" in capsys.readouterr().err


def test_a_smaller_model_is_quantized_like_any_other(tiny: Checkpoint, tmp_path: Path) -> None:
    take(tiny, parse_step("neurons:0.25"), IDS, tmp_path / "smaller")
    smaller = open_checkpoint(tmp_path / "smaller")
    modules = read_modules(smaller)
    plan = uniform(modules, "w4a16-g64", method="mse")
    part_store(tmp_path / "variants", smaller, modules, None).assemble(plan, tmp_path / "variants/int4")
    parts = read_parts(tmp_path / "variants/int4")
    for linear in modules.linears:
        weight = linear_weight(parts, linear.name, scheme("w4a16-g64"))
        assert weight.shape == (linear.out_features, linear.in_features)
    assert any(linear.in_features == 192 for linear in modules.linears)
