"""Parts made block by block are what llm-compressor would make, byte for byte where that can be asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantize.card import Calibration
from quantize.core.checkpoint import Checkpoint, open_checkpoint, weight_bytes
from quantize.core.dequantize import dequantized
from quantize.core.modules import Modules, read_modules
from quantize.core.plan import Plan, uniform
from quantize.core.schemes import scheme
from quantize.core.tensors import read_parts
from quantize.make.blocks import Blocks
from quantize.make.calibration import CalibrationSet
from quantize.make.gptq import gptq
from quantize.make.parts import PartStore
from quantize.make.ranges import find_grid, restored, rounded
from quantize.make.statistics import InputStatistics, observe
from quantize.make.storage import stored_tensors
from quantize.make.streaming import QuantizeError, solved, streams
from tests.quantize.tiny import VOCABULARY, make_checkpoint

torch = pytest.importorskip("torch")

Made = tuple[Checkpoint, Modules, CalibrationSet]
SCHEMES = ("w4a16", "w4a16-g64", "w4a16-g32-asym", "w3a16-g64", "w8a16-g64", "w8a8", "w8a8-r7", "w4a8-g64")


def layer(rows: int = 48, columns: int = 128, tokens: int = 600) -> tuple[Any, Any]:
    """A weight, and the second moments of inputs some of which are large."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    mixed = torch.randn(columns, columns, generator=generator) * 0.2 + torch.diag(
        torch.rand(columns, generator=generator) * 4
    )
    x = torch.randn(tokens, columns, generator=generator) @ mixed
    return weight, x.T @ x / tokens


def loss(weight: Any, other: Any, moments: Any) -> float:
    """E |Wx - Ŵx|²."""
    change = other - weight
    return float(((change @ moments) * change).sum())


def resident(file: Path) -> int:
    """Bytes of this process's mappings of a file that are in memory."""
    found, mine = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if not line[0].isupper():
            mine = line.endswith(str(file))
        elif mine and line.startswith("Rss:"):
            found += int(line.split()[1]) << 10
    return found


def test_one_block_of_the_files_is_in_memory_at_a_time(tmp_path: Path) -> None:
    directory = make_checkpoint(
        tmp_path / "model", hidden_size=256, intermediate_size=1024, num_hidden_layers=8
    )
    checkpoint, file = open_checkpoint(directory), directory / "model.safetensors"
    blocks = Blocks(checkpoint, read_modules(checkpoint), "cpu")
    seen = []
    for number in range(len(blocks)):
        with blocks.loaded(number) as block:
            assert all(bool(parameter.isfinite().all()) for parameter in block.parameters())
            seen.append(resident(file))
        assert float(blocks.files[f"model.layers.{number}.mlp.up_proj.weight"].abs().sum()) > 0
    assert file.stat().st_size > 15_000_000
    assert 0 < min(seen) <= max(seen) < 6_000_000, seen


@pytest.mark.parametrize("name", ["w4a16-g64", "w4a16", "w4a16-g32-asym", "w8a16-g64"])
def test_gptq_is_llm_compressors(name: str) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    how = scheme(name)
    assert how.weights is not None
    weight, moments = layer()
    grid = find_grid(weight, how, "minmax", None, torch.bfloat16)
    # In one call with another matrix and another scheme on the same inputs: rows do not see each other.
    other = find_grid(weight * 2, scheme("w3a16-g64"), "minmax", None, torch.bfloat16)
    mine, _ = gptq([(weight, grid), (weight * 2, other)], moments)
    zero = torch.zeros_like(grid.scale) if grid.zero is None else grid.zero
    theirs, _, _ = quantize_weight(
        weight.clone()[None],
        moments.clone()[None],
        grid.scale[None],
        zero[None].to(torch.int8),
        None,
        QuantizationArgs(**how.weights.arguments(), actorder="static"),
    )
    assert loss(weight, restored(mine, grid), moments) == pytest.approx(
        loss(weight, theirs[0], moments), rel=0.01
    )
    assert (restored(mine, grid) - theirs[0]).abs().gt(1e-6).float().mean() < 0.005
    assert loss(weight, restored(mine, grid), moments) < 0.8 * loss(
        weight, restored(rounded(weight, grid), grid), moments
    )


def test_ranges_by_importance_lose_less_where_it_counts() -> None:
    weight, moments = layer()
    importance = moments.diagonal()
    lost = {}
    for ranges in ("minmax", "mse", "imatrix"):
        grid = find_grid(weight, scheme("w4a16"), ranges, importance, torch.bfloat16)
        error = (restored(rounded(weight, grid), grid) - weight).square() * importance
        lost[ranges] = float(error.sum())
    assert lost["imatrix"] < lost["minmax"]


@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_weights_of_inputs_that_calibration_never_turned_on_are_rounded_to_nearest(size: float) -> None:
    """Other text may turn them on. Those of the others are what they are without them."""
    weight, moments = layer()
    moments = size * moments
    off = torch.zeros(128, dtype=torch.bool)
    off[3::5] = True
    moments[off] = moments[:, off] = 0
    grid = find_grid(weight, scheme("w4a16"), "minmax", None, torch.bfloat16)
    (found,) = gptq([(weight, grid)], moments)
    assert torch.equal(found[:, off], rounded(weight, grid)[:, off])
    (others,) = gptq([(weight[:, ~off], grid)], moments[~off][:, ~off])
    assert (found[:, ~off] != others).float().mean() < 0.005
    (nothing,) = gptq([(weight, grid)], torch.zeros_like(moments))
    assert torch.equal(nothing, rounded(weight, grid))


def test_ranges_do_not_forget_weights_of_inputs_that_calibration_never_turned_on() -> None:
    weight, _ = layer()
    importance = torch.zeros(128)
    importance[::16] = torch.rand(8, generator=torch.Generator().manual_seed(2)) + 0.1
    off = importance == 0
    errors = {}
    for ranges in ("mse", "imatrix"):
        grid = find_grid(weight, scheme("w4a16-g32"), ranges, importance, torch.bfloat16)
        errors[ranges] = float((restored(rounded(weight, grid), grid) - weight)[:, off].square().mean())
    assert errors["imatrix"] < 2 * errors["mse"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("choice", [("w4a16-g64", "gptq"), ("w4a16-g64", "imatrix"), ("w8a8-static", "rtn")])
def test_inputs_that_are_not_finite_are_refused_by_name(choice: tuple[str, str], bad: float) -> None:
    """Everything would be rounded to nearest otherwise, and nobody would know."""
    weight, moments = layer()
    moments[5, 5] = bad
    if choice[1] != "gptq":
        moments = moments.diagonal()
    inputs = InputStatistics(600, moments, -1.0, 1.0)
    with pytest.raises(QuantizeError, match=r"calibration's inputs of layers\.3\.up_proj are not finite"):
        solved([("layers.3.up_proj", choice)], {"layers.3.up_proj": weight}, inputs, torch.bfloat16, 1.0)


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_stored_is_what_compressed_tensors_stores(name: str) -> None:
    from compressed_tensors.compressors.naive_quantized import IntQuantizationCompressor
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    how = scheme(name)
    assert how.weights is not None
    weight, _ = layer()
    grid = find_grid(weight, how, "minmax", None, torch.bfloat16)
    q = rounded(weight, grid)
    mine = stored_tensors(q, grid, how, None, torch.bfloat16)
    compressor = PackedQuantizationCompressor if how.activations is None else IntQuantizationCompressor
    state = {
        "weight": restored(q, grid),
        "weight_scale": grid.scale.to(torch.bfloat16),
        "weight_zero_point": (torch.zeros_like(grid.scale) if grid.zero is None else grid.zero).to(
            torch.int8
        ),
    }
    arguments = QuantizationArgs(**how.weights.arguments())
    theirs = compressor.compress(state, QuantizationScheme(targets=["Linear"], weights=arguments))
    assert mine.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(mine[key], tensor), key


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("model")
    checkpoint = open_checkpoint(make_checkpoint(folder / "model"))
    generator = torch.Generator().manual_seed(0)
    sequences = [
        torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        for length in (9, 30, 31, 64, 64)
    ]
    described = Calibration(source="random", sha256="0" * 64, samples=5, tokens=198)
    return checkpoint, read_modules(checkpoint), CalibrationSet(sequences, described)


def test_statistics_are_those_of_the_whole_model(made: Made) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint, modules, calibration = made
    blocks = Blocks(checkpoint, modules, "cpu")
    states = blocks.start(calibration.sequences)
    found: dict[str, Any] = {}
    for number in range(len(blocks)):
        groups = [group for group in modules if group.layer == number]
        with blocks.loaded(number):
            found |= observe(blocks, number, states, groups, {group.name for group in groups}).inputs
        assert all(p.is_meta for p in blocks.layers[number].parameters())
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.bfloat16)
    seen: dict[str, list[Any]] = {}
    for name in found:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, inputs, name=name: seen.setdefault(name, []).append(inputs[0][0].float())
        )
    with torch.no_grad():
        for sequence in calibration.sequences:
            model(torch.tensor([sequence]))
    for name, rows in seen.items():
        x = torch.cat(rows)
        assert found[name].tokens == len(x) == 198
        assert torch.allclose(found[name].moments, x.T @ x / len(x), rtol=0.05, atol=0.02), name
        assert found[name].most == pytest.approx(float(x.max()), rel=0.05)


def test_any_mixture_is_put_together_in_bytes_that_were_predicted(made: Made, tmp_path: Path) -> None:
    checkpoint, modules, calibration = made
    store = PartStore(tmp_path / "parts", checkpoint, modules, calibration)
    names = ["w4a16-g64", "w8a8", "bf16", "w4a16-g32-asym"]
    groups = {group.name: names[number % 4] for number, group in enumerate(modules)}
    methods = {name: "rtn" for name, how in groups.items() if how == "w8a8"}
    plan = Plan(groups=groups, method="imatrix+gptq", methods=methods, kv="fp8")
    store.assemble(plan, tmp_path / "whole")
    store.link(plan, tmp_path / "linked")
    assert weight_bytes(tmp_path / "whole") == weight_bytes(tmp_path / "linked") == plan.weight_bytes(modules)
    whole, linked = read_parts(tmp_path / "whole"), read_parts(tmp_path / "linked")
    assert whole.keys() == linked.keys()
    assert sum(name.endswith(("k_scale", "v_scale")) for name in whole) == 2 * modules.layers
    files = list((tmp_path / "linked").glob("*.safetensors"))
    assert files
    assert all(file.stat().st_nlink == 2 for file in files)
    for group in modules:
        for member in group.members:
            how = scheme(groups[group.name])
            weight = dequantized(read_parts(checkpoint.path), member.name, scheme("bf16"))
            error = (dequantized(whole, member.name, how) - weight).norm() / weight.norm()
            assert error < {"bf16": 1e-6, "w8a8": 0.01}.get(how.name, 0.2)
    config = json.loads((tmp_path / "whole" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["format"] == "mixed-precision"


def test_a_killed_run_goes_on_and_finished_parts_stay(made: Made, tmp_path: Path) -> None:
    checkpoint, modules, calibration = made
    store = PartStore(tmp_path, checkpoint, modules, calibration)
    plan = uniform(modules, "w4a16-g64", method="gptq")
    first = {file.name: file.stat().st_mtime_ns for file in store.files(plan).values()}
    lost = store.file(modules.groups[3].name, ("w4a16-g64", "gptq"))
    before = lost.read_bytes()
    lost.unlink()
    lost.with_name(f".partial-{lost.name}").write_bytes(b"half")
    again = {file.name: file.stat().st_mtime_ns for file in store.files(plan).values()}
    assert lost.read_bytes() == before
    assert {name for name in first if first[name] != again[name]} == {lost.name}


def test_ranges_without_data_do_not_depend_on_choices_beside_them(made: Made, tmp_path: Path) -> None:
    checkpoint, modules, calibration = made
    name, choice = modules.groups[0].name, ("w4a16-g64", "mse")
    found = []
    for beside in ((), (("w4a16-g64", "imatrix"),)):
        store = PartStore(tmp_path / str(len(beside)), checkpoint, modules, calibration)
        store.make({name: [choice, *beside]})
        found.append(store.file(name, choice).read_bytes())
    assert found[0] == found[1]


def test_without_data_only_ranges_are_made(made: Made, tmp_path: Path) -> None:
    checkpoint, modules, _ = made
    store = PartStore(tmp_path, checkpoint, modules, None)
    store.make({group.name: [("w8a8", "rtn"), ("w4a16-g64", "mse")] for group in modules})
    with pytest.raises(QuantizeError, match="need calibration data"):
        store.make({modules.groups[0].name: [("w4a16-g64", "gptq")]})


@pytest.mark.parametrize(
    ("lengths", "said"), [([1] * 20, "every calibration sequence is a single token"), ([0, 30], "is empty")]
)
@pytest.mark.parametrize("method", ["smooth+rtn", "imatrix+gptq", "imatrix+gptaq"])
def test_sequences_that_say_nothing_are_refused_before_work(
    made: Made, tmp_path: Path, lengths: list[int], said: str, method: str
) -> None:
    checkpoint, modules, calibration = made
    sequences = [[7] * length for length in lengths]
    store = PartStore(tmp_path, checkpoint, modules, CalibrationSet(sequences, calibration.description))
    with pytest.raises(QuantizeError, match=said):
        store.files(uniform(modules, "w8a8" if method == "smooth+rtn" else "w4a16-g64", method=method))
    assert [one.name for one in tmp_path.rglob("*") if one.is_file()] == [".lock"]


def test_what_is_not_made_here_is_llm_compressors() -> None:
    assert streams(("w4a16-g64", "imatrix+gptq"))
    assert streams(("fp8-dynamic", "rtn"))
    assert streams(("bf16", "rtn"))
    assert not any(map(streams, [("w8a8", "smoothquant+rtn"), ("nvfp4", "rtn"), ("w4a16", "autoround")]))
    assert not streams(("bf16", "rotation+rtn"))
