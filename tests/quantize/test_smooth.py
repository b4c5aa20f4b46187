"""Smoothing scales: the model stays the same function, and 8-bit inputs lose less."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantize.card import Calibration
from quantize.core.checkpoint import open_checkpoint
from quantize.core.methods import MethodError, parse_method
from quantize.core.modules import read_modules
from quantize.core.plan import Plan, uniform
from quantize.core.tensors import read_parts
from quantize.make import smooth
from quantize.make.calibration import CalibrationSet
from quantize.make.parts import PartStore
from quantize.make.smooth import best_scales, block_scales, folded, places, smoothable, unsmoothed
from quantize.make.streaming import streams
from quantize.plan.simulated import SimulatedModel
from tests.quantize.tiny import VOCABULARY, make_checkpoint

torch = pytest.importorskip("torch")


def calibration() -> CalibrationSet:
    generator = torch.Generator().manual_seed(0)
    lengths = (9, 30, 31, 64, 64, 200)
    sequences = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    described = Calibration(source="random", sha256="0" * 64, samples=len(lengths), tokens=sum(lengths))
    return CalibrationSet(sequences, described)


def outliers(directory: Path, factor: float = 30.0) -> None:
    """Make two channels of every norm's output, of every value and of every up projection large."""
    from safetensors.torch import load_file, save_file

    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if ".layers." in name and (("layernorm" in name and "q_norm" not in name) or "v_proj" in name):
            tensor[[3, 17]] *= factor
        if "up_proj.weight" in name and "gate_up" not in name:
            tensor[[5, 40]] *= factor
    save_file(tensors, file, metadata={"format": "pt"})


def logits(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = torch.randint(3, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids).logits[0]


ARCHITECTURES = {
    "llama": [],
    "mistral": [],
    "qwen2": [],
    "qwen3": [],
    "phi3": [],
    "ernie4_5": [],
    "glm4": [],
    "gemma": [],
    "gemma2": [],
    "gemma3_text": [],
    "arcee": ["mlp.down_proj"],
    "cohere": ["mlp.gate_up_proj", "self_attn.qkv_proj"],
    "exaone4": ["mlp.gate_up_proj", "self_attn.qkv_proj"],
    "qwen3_moe": ["mlp.experts"],
    "mixtral": ["block_sparse_moe.experts"],
}
"""Model type to the kinds of groups that are left as they are."""


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_scaled_model_is_the_same_function(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = make_checkpoint(tmp_path / "model", name, dtype="float32")
    file = directory / "model.safetensors"
    generator = torch.Generator().manual_seed(3)
    tensors = load_file(file)
    for key, tensor in tensors.items():  # norms and biases of ones and zeros would hide mistakes
        if tensor.ndim == 1:
            tensors[key] = tensor + 0.3 * torch.rand(tensor.shape, generator=generator)
    save_file(tensors, file, metadata={"format": "pt"})
    before = logits(directory)
    checkpoint = open_checkpoint(directory)
    modules = read_modules(checkpoint)
    assert unsmoothed(checkpoint.config, modules) == ARCHITECTURES[name]
    scales: dict[str, Any] = {}
    for layer in range(modules.layers):
        groups = smoothable(checkpoint.config, modules, layer)
        rows = {
            group.members[0].name: torch.randn(32, group.members[0].in_features, generator=generator)
            * (4 * torch.randn(group.members[0].in_features, generator=generator)).exp()
            for group in groups
        }
        energy = {name: x.square().mean(0) for name, x in rows.items()}
        scales |= block_scales(checkpoint, groups, rows, energy, tensors, torch.float32)
    changed = {key: folded(key, tensor, scales).contiguous() for key, tensor in tensors.items()}
    assert sum(not torch.equal(changed[key], tensors[key]) for key in tensors) >= 2 * modules.layers
    save_file(changed, file, metadata={"format": "pt"})
    after = logits(directory)
    assert (after - before).abs().max() < 2e-4 * before.abs().max()


def error(scale: Any, x: Any, w: Any) -> float:
    """The squared error of outputs with inputs rounded by token and weights by row, by doing it."""

    def rounded(tensor: Any) -> Any:
        step = tensor.abs().amax(-1, keepdim=True) / 127
        return (tensor / step).round() * step

    return float((rounded(x / scale) @ rounded(w * scale).T - x @ w.T).square().sum())


def test_scales_lower_the_error_more_than_smoothquants_do() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 96, generator=generator) * torch.randn(96, generator=generator).exp()
    x[:, 7] *= 40
    w = torch.randn(64, 96, generator=generator) * torch.rand(96, generator=generator)
    half = (x.abs().amax(0) / w.abs().amax(0)).sqrt()
    found = best_scales(x, x.square().mean(0), [w[:40], w[40:]])
    assert error(found, x, w) < 0.95 * error(half, x, w)
    assert error(found, x, w) < 0.1 * error(torch.ones(96), x, w)


def test_heads_that_share_values_have_one_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 96, generator=generator), torch.randn(32, 96, generator=generator)
    found = best_scales(x, x.square().mean(0), [w], (6, 2)).reshape(2, 3, 16)
    assert torch.equal(found[:, 0], found[:, 1])
    assert torch.equal(found[:, 0], found[:, 2])
    assert not torch.allclose(found[0, 0], found[1, 0])


def test_rows_are_spread_and_leave_first_tokens_out() -> None:
    lengths = [1, 40, 300, 3000, 700]
    found = places([[number] * length for number, length in enumerate(lengths)])
    assert 0 not in found
    assert all(mine.rows and 0 < at < lengths[n] for n, mine in found.items() for at in mine.rows)
    many = places([[number, *range(99)] for number in range(200)])
    assert 100 < sum(len(mine.rows) for mine in many.values()) <= 300
    assert {n: (mine.begin, list(mine.rows)) for n, mine in places([[7] * 5]).items()} == {
        0: (1, [1, 2, 3, 4])
    }


def test_what_sequences_have_in_common_in_front_is_sampled_once() -> None:
    """Else scales are for the tokens of one system message, and the questions behind it lose by them."""
    system = list(range(50))
    asked = [[*system, 100 + number, 900] for number in range(40)]
    found = places([*asked, asked[0], system])
    assert set(found) == set(range(40))
    assert found[0].begin == 1
    assert {mine.begin for number, mine in found.items() if number} == {50}
    assert sum(len(mine.rows) for mine in found.values()) == 51 + 39 * 2


@pytest.mark.parametrize("name", ["smooth+awq+rtn", "smooth+autoround", "rotation+smooth+gptq"])
def test_no_other_transform_beside_it(name: str) -> None:
    with pytest.raises(MethodError, match="smooth goes before"):
        parse_method(name)
    assert parse_method("smooth").solver == "rtn"
    assert streams(("w8a8", "smooth+rtn"))
    assert streams(("w4a16-g64", "smooth+imatrix+gptq"))
    assert streams(("bf16", "smooth+rtn"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> PartStore:
    folder = tmp_path_factory.mktemp("smooth")
    directory = make_checkpoint(folder / "model", "qwen2")
    outliers(directory)
    checkpoint = open_checkpoint(directory)
    return PartStore(folder / "parts", checkpoint, read_modules(checkpoint), calibration())


def test_a_mixture_of_smoothed_parts_is_the_model(store: PartStore, tmp_path: Path) -> None:
    modules = store.modules
    store.assemble(uniform(modules, "bf16", method="smooth+rtn"), tmp_path / "same")
    before, after = logits(store.checkpoint.path), logits(tmp_path / "same")
    reference = (before - before.mean()).norm()
    assert (after - before).norm() < 0.02 * reference  # bfloat16's own rounding of the rows
    choices = ("w8a8", "w4a16-g32", "bf16")
    groups = {group.name: choices[number % 3] for number, group in enumerate(modules)}
    methods = {name: "smooth+imatrix+gptq" for name, how in groups.items() if how == "w4a16-g32"}
    plan = Plan(groups=groups, method="smooth+rtn", methods=methods, kv="fp8")
    store.link(plan, tmp_path / "mixed")
    made = read_parts(tmp_path / "mixed")
    for name, part in read_parts(tmp_path / "same").items():
        if name in made and made[name].dtype == "BF16":
            assert made[name].bytes == part.bytes
    values = {name: part for name, part in made.items() if name.endswith("v_scale")}
    assert len(values) == modules.layers
    config = json.loads((tmp_path / "mixed" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["format"] == "mixed-precision"


def test_scales_do_not_depend_on_what_else_the_pass_is_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts are kept by what decides them. GPTQ's pass sees all conversations, that for scales a sample."""
    monkeypatch.setattr(smooth, "SAMPLED_TOKENS", 150)
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "model"))
    modules = read_modules(checkpoint)
    found = []
    for name, methods in (("alone", ["smooth+rtn"]), ("beside", ["smooth+rtn", "gptq"])):
        store = PartStore(tmp_path / name, checkpoint, modules, calibration())
        store.make({group.name: [("w8a8", method) for method in methods] for group in modules})
        found.append(store.smoothing.everything(modules.layers))
    alone, beside = found
    assert alone.keys() == beside.keys()
    for name, scale in alone.items():
        assert torch.allclose(scale.float(), beside[name].float(), rtol=0.02), name


def test_plain_and_smoothed_parts_are_never_in_one_plan(store: PartStore, tmp_path: Path) -> None:
    first, *others = (group.name for group in store.modules)
    groups = {first: "w4a16-g32", **dict.fromkeys(others, "w8a8")}
    plan = Plan(groups=groups, method="smooth+rtn", methods={first: "gptq"})
    with pytest.raises(MethodError, match="rewrite the model differently"):
        store.assemble(plan, tmp_path / "mixed")


def test_fixed_scales_of_inputs_are_refused(store: PartStore, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="not measured behind smoothing"):
        store.assemble(uniform(store.modules, "w8a8-static", method="smooth+rtn"), tmp_path / "static")


def test_scales_of_cached_values_are_those_of_the_smoothed_model(store: PartStore) -> None:
    from quantize.core.dequantize import read_tensor

    groups = {group.name: [("bf16", "smooth+rtn")] for group in store.modules}
    store.make(groups, kv=["fp8"], transforms=("smooth",))
    store.make({}, kv=["fp8"])
    plain, smooth = (store.tensors(store.kv_file("fp8", t)) for t in ((), ("smooth",)))
    for name, part in plain.items():
        before, after = float(read_tensor(part)), float(read_tensor(smooth[name]))
        assert after == pytest.approx(before, rel=0.05) if "k_scale" in name else after < 0.5 * before


def test_in_torch_a_smoothed_plan_loses_less(store: PartStore) -> None:
    assert store.calibration is not None
    model = SimulatedModel(store, [(tokens, 1) for tokens in store.calibration.sequences[-2:]])
    reference = model.log_probabilities()
    kl = {
        method: model.kl({group.name: ("w8a8", method) for group in store.modules}, reference)
        for method in ("rtn", "smooth+rtn")
    }
    assert kl["smooth+rtn"] < 0.3 * kl["rtn"]
    with model.swapped({group.name: ("bf16", "smooth+rtn") for group in store.modules}):
        assert model.divergence(reference) < 1e-6
