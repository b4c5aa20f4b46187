"""Checkpoints made elsewhere: what their configuration and tensors mean, and when they are refused.

The configurations are in the shape that llm-compressor 0.14, AutoRound 0.15, AutoAWQ and GPTQModel write.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantize.card import CardError, hash_files
from quantize.core.checkpoint import CheckpointError, open_checkpoint
from quantize.core.dequantize import linear_weight
from quantize.core.modules import Linear
from quantize.core.schemes import scheme
from quantize.core.targets import TARGETS
from quantize.core.tensors import read_parts
from quantize.register.formats import Prequantized, read_prequantized
from quantize.registry import Registry
from tests.quantize.small import (
    CONFIG,
    Tensors,
    base_tensors,
    linears,
    write_base,
    write_checkpoint,
    write_tokenizer,
)

NAMES = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")]
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def weights(**changes: Any) -> dict[str, Any]:
    """As llm-compressor saves them: everything is written, most of it null."""
    return {
        "actorder": "static",
        "block_structure": None,
        "dynamic": False,
        "group_size": None,
        "num_bits": 8,
        "observer": "memoryless_minmax",
        "observer_kwargs": {},
        "strategy": "channel",
        "symmetric": True,
        "type": "int",
        **changes,
    }


def compressed(*groups: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        **changes,
    }


def group(
    wanted: dict[str, Any], inputs: dict[str, Any] | None = None, targets: tuple[str, ...] = ("Linear",)
):
    return {"targets": list(targets), "weights": wanted, "input_activations": inputs}


W4G64 = weights(num_bits=4, strategy="group", group_size=64)
FP8 = weights(type="float", strategy="tensor")
FP8_BLOCK_INPUTS = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True}
AUTO_ROUND = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    "bits": 4,
    "group_size": 64,
    "sym": True,
    "data_type": "int",
    "autoround_version": "0.15.1",
    "block_name_to_quantize": "model.layers",
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


def read(settings: dict[str, Any]) -> Prequantized:
    return read_prequantized(
        Path("made/elsewhere"), {"quantization_config": settings}, [Linear(name, 64, 64) for name in NAMES]
    )


@pytest.mark.parametrize(
    ("settings", "layout", "method", "found"),
    [
        (compressed(group(W4G64)), "compressed-tensors", "unknown", "w4a16-g64"),
        (compressed(group(weights(), TOKEN)), "compressed-tensors", "unknown", "w8a8"),
        (
            compressed(group(weights(), {**TOKEN, "symmetric": False})),
            "compressed-tensors",
            "unknown",
            "w8a8-asym",
        ),
        (
            compressed(group(FP8, weights(type="float", strategy="tensor"))),
            "compressed-tensors",
            "unknown",
            "fp8",
        ),
        (
            compressed(
                group(weights(type="float", strategy="block", block_structure=[128, 128]), FP8_BLOCK_INPUTS)
            ),
            "compressed-tensors",
            "unknown",
            "fp8-block",
        ),
        (GPTQ, "gptq", "gptq", "w4a16-g128"),
        (GPTQ | {"group_size": -1, "sym": False, "bits": 8}, "gptq", "gptq", "w8a16-asym"),
        (GPTQ | {"provider": "auto-round"}, "gptq", "autoround", "w4a16-g128"),
        (AWQ, "awq", "awq", "w4a16-g128-asym"),
        (
            {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": False},
            "awq",
            "awq",
            "w4a16-g64",
        ),
        (AUTO_ROUND, "gptq", "autoround", "w4a16-g64"),
        (
            AUTO_ROUND | {"packing_format": "auto_round:auto_awq", "sym": False},
            "awq",
            "autoround",
            "w4a16-g64-asym",
        ),
    ],
)
def test_every_format_gives_the_schemes_it_was_made_with(
    settings: dict[str, Any], layout: str, method: str, found: str
) -> None:
    read_one = read(settings)
    assert (read_one.layout, read_one.method) == (layout, method)
    assert read_one.schemes == dict.fromkeys(NAMES, found)
    assert read_one.kv == "auto"


@pytest.mark.parametrize(
    ("settings", "exception"),
    [
        (compressed(group(W4G64), ignore=["lm_head", "re:.*layers.0.mlp.*"]), "bf16"),
        (compressed(group(weights(), TOKEN, ("re:.*layers.0.mlp",)), group(W4G64)), "w8a8"),
        (GPTQ | {"group_size": 64, "dynamic": {r"+:model\.layers\.0\.mlp.*": {"bits": 8}}}, "w8a16-g64"),
        (GPTQ | {"group_size": 64, "dynamic": {r"-:.*0\.mlp.*": {}}}, "bf16"),
        (AUTO_ROUND | {"extra_config": {NAMES[1]: {"bits": 16}}}, "bf16"),
        (AUTO_ROUND | {"extra_config": {r".*0\.mlp.*": {"bits": 8, "group_size": 32}}}, "w8a16-g32"),
        (AWQ | {"group_size": 64, "zero_point": False, "modules_to_not_convert": ["layers.0.mlp"]}, "bf16"),
    ],
)
def test_modules_that_differ_are_told_apart(settings: dict[str, Any], exception: str) -> None:
    assert list(read(settings).schemes.values()) == ["w4a16-g64", exception, "w4a16-g64", "w4a16-g64"]


def test_a_kv_cache_scheme_is_read() -> None:
    kv = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    assert read(compressed(group(W4G64), kv_cache_scheme=kv)).kv == "fp8"
    with pytest.raises(CheckpointError, match="no KV-cache scheme has"):
        read(compressed(group(W4G64), kv_cache_scheme=kv | {"num_bits": 4}))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (None, "has no quantization_config"),
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' is not read; export"),
        ({"quant_method": "gptq", "bits": 4}, "quantization_config lacks 'group_size'"),
        (AUTO_ROUND | {"data_type": "mx_fp"}, "data_type 'mx_fp' with 16-bit inputs is not read"),
        (AWQ | {"version": "gemv"}, "only gemm is read"),
        (compressed(group(weights(num_bits=12))), "cannot be understood"),
        (compressed(group(FP8, TOKEN)), "no scheme has weights"),
    ],
)
def test_what_is_not_read_is_refused_in_one_sentence(settings: Any, sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        read(settings)


def pack(values: np.ndarray) -> np.ndarray:
    """Unsigned 4-bit values (rows, columns) to int32 (rows, columns / 8), the first in the lowest bits."""
    words = values.astype(np.uint32).reshape(len(values), -1, 8)
    return (words << np.arange(0, 32, 4, dtype=np.uint32)).sum(-1).astype(np.uint32).view(np.int32)


def quantized(layout: str, group_size: int = 32) -> tuple[Tensors, dict[str, np.ndarray]]:
    """A whole checkpoint with random integers in ``layout``, and the weights (N, K) that they stand for."""
    random = np.random.default_rng(1)
    tensors = {n: t for n, t in base_tensors().items() if n.removesuffix(".weight") not in linears()}
    stand_for = {}
    for name, (n, k) in linears().items():
        q = random.integers(0, 16, (n, k))
        zero = random.integers(1, 16, (n, k // group_size))
        scale = random.uniform(0.01, 0.02, zero.shape).astype(np.float16)
        wide = [np.repeat(part.astype(np.float32), group_size, 1) for part in (zero, scale)]
        stand_for[name] = (q - wide[0]) * wide[1]
        tensors[f"{name}.scales"] = np.ascontiguousarray(scale.T)
        if layout == "gptq":
            tensors[f"{name}.qweight"] = np.ascontiguousarray(pack(q).T)
            tensors[f"{name}.qzeros"] = pack((zero - 1).T)
        else:
            order = np.arange(n).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].ravel()
            tensors[f"{name}.qweight"] = pack(q.T[:, order])
            tensors[f"{name}.qzeros"] = pack(zero.T[:, order])
    return tensors, stand_for


SETTINGS = {
    "gptq": GPTQ | {"group_size": 32, "sym": False},
    "awq": AWQ | {"group_size": 32},
}


@pytest.fixture(params=["gptq", "awq"])
def outside(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tensors, _ = quantized(request.param)
    config = CONFIG | {"quantization_config": SETTINGS[request.param]}
    return write_checkpoint(tmp_path / "outside", tensors, config)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "variants", "assistant", "bf16")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_packed_integers_are_read_as_they_were_meant(tmp_path: Path, layout: str) -> None:
    tensors, stand_for = quantized(layout)
    parts = read_parts(write_checkpoint(tmp_path, tensors, CONFIG))
    for name, wanted in stand_for.items():
        found = linear_weight(parts, name, scheme("w4a16-g32-asym")).numpy()
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_registering_changes_no_byte_and_supplies_what_is_missing(
    registry: Registry, outside: Path, base: Path
) -> None:
    before = hash_files(outside)
    card = registry.register(outside, "theirs", open_checkpoint(base))
    assert hash_files(outside) == before
    assert before.items() <= card.files.items()
    assert set(card.files) - set(before) == {"tokenizer.json", "chat_template.jinja"}
    assert [note.split(" is ")[0] for note in card.notes] == ["the tokenizer", "the chat template"]
    assert (card.origin, card.scheme, card.weight_bits) == ("registered", "w4a16-g32-asym", 4)
    assert card.bits_per_weight == pytest.approx(4 + (16 + 4) / 32)
    assert set(card.module_bits) == set(linears())
    assert registry.card("theirs") == card
    assert registry.register(outside, "theirs", open_checkpoint(base)) == card
    with pytest.raises(CardError, match="is the reference's name"):
        registry.register(outside, "bf16", open_checkpoint(base))


def test_pickles_stay_outside(registry: Registry, outside: Path, base: Path) -> None:
    (outside / "training_args.bin").write_bytes(b"a pickle")
    card = registry.register(outside, "theirs", open_checkpoint(base))
    assert "training_args.bin" not in card.files
    assert any("training_args.bin" in note for note in card.notes)


def without(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


Q = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (changed(f"{Q}.scales", lambda t: np.where(t == t[0, 0], np.float16("nan"), t)), "scales holds NaN"),
        (changed(f"{Q}.qweight", lambda t: t[:, :8].copy()), r"up_proj\.qweight has shape .* 128 x 64 has"),
        (changed("model.norm.weight", lambda t: t[:32].copy()), r"norm\.weight has shape \(32,\), the base"),
        (without(f"{Q}.scales"), r"up_proj\.scales is missing; w4a16-g32-asym needs it"),
        (without("model.embed_tokens.weight"), r"embed_tokens\.weight is missing; the base model has it"),
    ],
)
def test_damaged_or_foreign_tensors_are_refused(
    registry: Registry, tmp_path: Path, base: Path, spoil: Callable[[Tensors], None], sentence: str
) -> None:
    tensors, _ = quantized("gptq")
    spoil(tensors)
    config = CONFIG | {"quantization_config": SETTINGS["gptq"]}
    path = write_checkpoint(tmp_path / "spoiled", tensors, config)
    with pytest.raises(CheckpointError, match=sentence):
        registry.register(path, "theirs", open_checkpoint(base))
    assert registry.variants() == ()


def test_another_model_or_vocabulary_is_refused(registry: Registry, outside: Path, base: Path) -> None:
    config = json.loads((outside / "config.json").read_text())
    (outside / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"num_hidden_layers is 3, the base model .* has 2"):
        registry.register(outside, "theirs", open_checkpoint(base))
    (outside / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shutil.copy(base / "tokenizer.json", outside)
    text = (outside / "tokenizer.json").read_text().replace('"w7"', '"seven"')
    (outside / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match="another vocabulary than the base model's tokenizer"):
        registry.register(outside, "theirs", open_checkpoint(base))


def test_a_scheme_that_splits_a_fused_group_is_refused(
    registry: Registry, tmp_path: Path, base: Path
) -> None:
    tensors, _ = quantized("gptq")
    prefix = "model.layers.0.self_attn.q_proj"
    for suffix in ("qweight", "qzeros", "scales"):
        del tensors[f"{prefix}.{suffix}"]
    tensors[f"{prefix}.weight"] = base_tensors()[f"{prefix}.weight"]
    settings = SETTINGS["gptq"] | {"dynamic": {r"-:.*0\.self_attn\.q_proj": {}}}
    path = write_checkpoint(tmp_path / "split", tensors, CONFIG | {"quantization_config": settings})
    with pytest.raises(CheckpointError, match=r"must share one scheme: .*q_proj is bf16, .*k_proj is w4a16"):
        registry.register(path, "theirs", open_checkpoint(base))


def test_an_order_of_columns_that_the_target_does_not_load_is_refused(
    registry: Registry, tmp_path: Path, base: Path
) -> None:
    tensors, _ = quantized("gptq")
    settings = SETTINGS["gptq"] | {"desc_act": True}
    path = write_checkpoint(tmp_path / "ordered", tensors, CONFIG | {"quantization_config": settings})
    here = TARGETS["vllm-cpu-avx512"]
    with pytest.raises(
        CheckpointError, match=r"ordered: .*actorder group.*; quantize it again with actorder"
    ):
        registry.register(path, "theirs", open_checkpoint(base), here)
    assert registry.register(path, "theirs", open_checkpoint(base)).notes[0].startswith("columns are in")
    assert read(compressed(group(W4G64 | {"actorder": "group"}))).orders == dict.fromkeys(NAMES, "group")
    assert read(GPTQ | {"desc_act": True, "group_size": -1}).orders == {}  # one group has no order


def test_a_head_of_its_own_must_not_be_lost(registry: Registry, tmp_path: Path) -> None:
    own = base_tensors()
    own["lm_head.weight"] = base_tensors(seed=1)["lm_head.weight"]
    base = write_checkpoint(tmp_path / "base", own, CONFIG)
    write_tokenizer(base)
    tensors, _ = quantized("gptq")
    config = CONFIG | {"quantization_config": SETTINGS["gptq"]}
    del tensors["lm_head.weight"]
    path = write_checkpoint(tmp_path / "headless", tensors, config)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing; the base model has it"):
        registry.register(path, "theirs", open_checkpoint(base))


def test_a_head_that_the_configuration_does_not_tie_must_be_stored(
    registry: Registry, tmp_path: Path, base: Path
) -> None:
    tensors, _ = quantized("gptq")
    del tensors["lm_head.weight"]
    config = CONFIG | {"quantization_config": SETTINGS["gptq"]}
    untied = write_checkpoint(tmp_path / "untied", tensors, config | {"tie_word_embeddings": False})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        registry.register(untied, "theirs", open_checkpoint(base))
    tied = write_checkpoint(tmp_path / "tied", tensors, config | {"tie_word_embeddings": True})
    assert registry.register(tied, "theirs", open_checkpoint(base)).state == "ready"


@pytest.mark.parametrize(("layout", "file"), [("gptq", "quantize_config.json"), ("awq", "quant_config.json")])
def test_settings_in_a_file_of_their_own_are_read_and_told_to_the_engine(
    registry: Registry, tmp_path: Path, base: Path, layout: str, file: str
) -> None:
    tensors, _ = quantized(layout)
    path = write_checkpoint(tmp_path / "outside", tensors, CONFIG)
    alone = {name: value for name, value in SETTINGS[layout].items() if name != "quant_method"}
    (path / file).write_text(json.dumps(alone), encoding="utf-8")
    card = registry.register(path, "theirs", open_checkpoint(base))
    assert card.scheme == "w4a16-g32-asym"
    written = json.loads((registry.path("theirs") / "config.json").read_text(encoding="utf-8"))
    assert written == CONFIG | {"quantization_config": {"quant_method": layout, **alone}}
    assert json.loads((path / "config.json").read_text(encoding="utf-8")) == CONFIG


def test_a_second_source_of_weights_is_left_behind(registry: Registry, outside: Path, base: Path) -> None:
    for name in ("consolidated.safetensors", "params.json", "old.gguf"):
        (outside / name).write_text("{}", encoding="utf-8")
    card = registry.register(outside, "theirs", open_checkpoint(base))
    assert not {"consolidated.safetensors", "params.json", "old.gguf"} & set(card.files)
    assert any("consolidated.safetensors, old.gguf, params.json" in note for note in card.notes)
