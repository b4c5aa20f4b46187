"""A checkpoint's matrices are found in torch, whatever transformers makes of them in memory."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from quantize.core.checkpoint import open_checkpoint
from quantize.core.dequantize import read_tensor
from quantize.core.loading import load_model
from quantize.core.modules import Linear, Modules, read_modules
from quantize.core.quantization_config import pattern
from quantize.core.tensors import read_parts
from quantize.make.linears import LinearError, decoder_layers, exchanged, find_linears, observing
from tests.quantize.tiny import make_checkpoint

ARCHITECTURES = (
    *("llama", "qwen2", "qwen3_moe", "mixtral", "gemma2", "gemma3", "mistral3", "phi3", "deepseek_v3"),
)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    import torch

    path = make_checkpoint(tmp_path_factory.mktemp(request.param) / "model", request.param)
    return path, load_model(open_checkpoint(path), torch.float32)


def test_weights_in_memory_are_those_on_disk(made: tuple[Path, Any]) -> None:
    path, model = made
    modules, parts = read_modules(open_checkpoint(path)), read_parts(path)
    linears = (*modules.linears, *(modules.head.members if modules.head else ()))
    places = find_linears(model, linears)
    assert len(places) == len(linears)
    assert len({(place.weight.data_ptr(), place.weight.shape) for place in places.values()}) == len(linears)
    for name, place in places.items():
        assert (place.weight == read_tensor(parts[f"{name}.weight"]).float()).all(), name
    assert len(decoder_layers(model)) == modules.layers == 2


def test_what_goes_in_is_seen_and_changed(made: tuple[Path, Any]) -> None:
    """Inputs as they are give the logits as they were; a changed input or weight of any of them does not."""
    import torch

    path, model = made
    places = find_linears(model, read_modules(open_checkpoint(path)).linears)
    ids = torch.randint(3, 2048, (1, 64), generator=torch.Generator().manual_seed(0))
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, inputs: torch.Tensor) -> None:
        assert inputs.shape[-1] == places[name].weight.shape[1]
        seen[name] = inputs

    with torch.inference_mode():
        before = model(ids, use_cache=False).logits
        with observing(places, keep):
            torch.testing.assert_close(model(ids, use_cache=False).logits, before)
        ups = {name for name in places if name.endswith(("up_proj", "w3")) and ".experts." in name}
        assert seen.keys() == places.keys() - ups  # they have the inputs of gate_proj
        for name in _one_of_each(places):
            with exchanged(places, {name: places[name].weight.flip(0)}):
                assert not torch.allclose(model(ids, use_cache=False).logits, before, atol=1e-6), name
            if name not in ups:
                with observing({name: places[name]}, lambda _, inputs: inputs.flip(-1)):
                    assert not torch.allclose(model(ids, use_cache=False).logits, before, atol=1e-6), name
        torch.testing.assert_close(model(ids, use_cache=False).logits, before, rtol=0, atol=0)


def _one_of_each(names: Mapping[str, object]) -> list[str]:
    """One module of each kind; of experts, the first (of four, of which every token goes to two)."""
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(name.partition("layers.0.")[2], name)
    return [
        name for kind, name in kinds.items() if kind and (".experts." not in kind or ".experts.0." in kind)
    ]


def test_experts_see_the_tokens_that_were_sent_to_them(tmp_path: Path) -> None:
    import torch

    path = make_checkpoint(tmp_path / "model", "mixtral")
    model, ids = load_model(open_checkpoint(path), torch.float32), torch.arange(3, 33)[None]
    places = find_linears(model, read_modules(open_checkpoint(path)).linears)
    rows: dict[str, int] = {}
    with (
        torch.inference_mode(),
        observing(places, lambda name, inputs: rows.update({name: inputs[..., 0].numel()})),
    ):
        model(ids, use_cache=False)
    for leaf in ("w1", "w2"):  # each of 30 tokens goes to two experts of a layer
        assert sum(rows.get(f"model.layers.1.block_sparse_moe.experts.{n}.{leaf}", 0) for n in range(4)) == 60
    assert rows["model.layers.0.self_attn.q_proj"] == 30


def test_shapes_are_enough(tmp_path: Path) -> None:
    """On the meta device, as for an estimate."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = make_checkpoint(tmp_path / "model", "qwen3_moe")
    linears = read_modules(open_checkpoint(path)).linears
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    assert {name: place.weight.shape for name, place in find_linears(model, linears).items()} == {
        one.name: (one.out_features, one.in_features) for one in linears
    }


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("model.layers.2.mlp.down_proj", 256, "lies in none of the 2 blocks of LlamaForCausalLM"),
        ("model.norm", 256, "lies in none"),
        ("model.layers.0.mlp.fc1", 256, "has no mlp.fc1"),
        ("model.layers.0.mlp.down_proj", 512, r"is \(128, 256\) in LlamaForCausalLM, \(128, 512\) on disk"),
    ],
)
def test_what_is_not_there_is_said(tmp_path: Path, name: str, size: int, said: str) -> None:
    import torch

    model = load_model(open_checkpoint(make_checkpoint(tmp_path / "model")), torch.float32)
    with pytest.raises(LinearError, match=said):
        find_linears(model, [Linear(name, 128, size)])


def test_a_wrappers_tower_is_counted_and_left_alone(tmp_path: Path) -> None:
    for architecture, prefix in (("gemma3", "vision_tower."), ("mistral3", "multi_modal_projector.")):
        path = make_checkpoint(tmp_path / architecture, architecture)
        modules: Modules = read_modules(open_checkpoint(path))
        assert all(one.name.startswith("language_model.model.layers.") for one in modules.linears)
        parts = read_parts(path)
        outside = sum(part.bytes for name, part in parts.items() if not name.startswith("language_model."))
        assert any(name.startswith(prefix) for name in parts)
        assert modules.tower_bytes == outside > 0
        stored = sum(part.bytes for part in parts.values())
        assert modules.other_bytes + 2 * sum(one.weights for one in modules.linears) == stored


def test_patterns_match_the_text_part_by_all_its_names_and_nothing_of_a_tower(tmp_path: Path) -> None:
    """Both have layers with a ``self_attn.q_proj``; an engine would look for a tower's scales."""
    path = make_checkpoint(tmp_path / "model", "gemma3")
    parts = read_parts(path)
    tower = [name.removesuffix(".weight") for name in parts if name.startswith("vision_tower.")]
    fused = [name.replace("q_proj", "qkv_proj") for name in tower]
    for group in read_modules(open_checkpoint(path)):
        matched = re.compile(pattern(group).removeprefix("re:"))
        for member in group.members:
            assert matched.match(member.name)  # on disk and in vLLM
            assert matched.match(member.name.replace("language_model.model.", "model.language_model."))
        assert not any(map(matched.match, (*tower, *fused)))
