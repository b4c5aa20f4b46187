"""Experts are made with their own inputs, also one that no token came to, in the memory that was said."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from quantize.card import Calibration
from quantize.core.checkpoint import Checkpoint, open_checkpoint
from quantize.core.dequantize import dequantized, read_tensor
from quantize.core.modules import Group, Linear, Modules, read_modules
from quantize.core.schemes import scheme
from quantize.cost import making_memory
from quantize.make.calibration import CalibrationSet
from quantize.make.parts import PartStore
from quantize.make.rate import Rates
from quantize.make.statistics import first_of
from tests.quantize.tiny import VOCABULARY, make_checkpoint

torch = pytest.importorskip("torch")

LEAVES = {"qwen3_moe": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}


def calibration(lengths: tuple[int, ...] = (60,) * 24) -> CalibrationSet:
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    described = Calibration(source="random", sha256="0" * 64, samples=len(lengths), tokens=sum(lengths))
    return CalibrationSet(sequences, described)


def experts_of(modules: Modules) -> Group:
    return next(group for group in modules if group.kind.endswith("experts"))


@pytest.mark.parametrize("architecture", LEAVES)
def test_gate_and_up_share_inputs_and_down_has_its_own(tmp_path: Path, architecture: str) -> None:
    """In whatever order the header has them."""
    group = experts_of(read_modules(open_checkpoint(make_checkpoint(tmp_path / "model", architecture))))
    gate, up, down = LEAVES[architecture]
    sizes = {member.name: member.in_features for member in group.members}
    for members in (group.members, group.members[::-1], sorted(group.members, key=lambda one: one.name[-6:])):
        ordered = replace(group, members=tuple(members))
        for member in members:
            first, parent = first_of(ordered, member.name), member.name.rpartition(".")[0]
            leaves = (down,) if member.name.endswith(down) else (gate, up)
            assert first in [f"{parent}.{leaf}" for leaf in leaves]
            assert sizes[first] == member.in_features
        assert len({first_of(ordered, member.name) for member in members}) == 2 * len(members) // 3


def test_experts_lose_less_by_gptq_on_what_the_router_sends_them(tmp_path: Path) -> None:
    from quantize.make.blocks import Blocks
    from quantize.make.statistics import observe

    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "model", "qwen3_moe"))
    modules, given = read_modules(checkpoint), calibration()
    group = experts_of(modules)
    blocks = Blocks(checkpoint, modules, "cpu")
    with blocks.loaded(0):
        states = blocks.start(given.sequences)
        inputs = observe(blocks, 0, states, [group], {group.name}).inputs
    store = PartStore(tmp_path / "parts", checkpoint, modules, given)
    lost = dict.fromkeys(("mse", "imatrix+gptq"), 0.0)
    for method in lost:
        choice = ("w3a16-g64", method)
        store.make({group.name: [choice]})
        part = store.tensors(store.file(group.name, choice))
        for member in group.members:
            weight = blocks.files[f"{member.name}.weight"].float()
            change = dequantized(part, member.name, scheme(choice[0])) - weight
            moments = inputs[first_of(group, member.name)].moments
            assert moments.shape == (member.in_features,) * 2
            lost[method] += float(((change @ moments) * change).sum() / ((weight @ moments) * weight).sum())
    assert lost["imatrix+gptq"] < 0.9 * lost["mse"]


def test_an_expert_that_no_token_came_to_scales_its_inputs_as_the_others_of_its_layer(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = make_checkpoint(tmp_path / "model", "qwen3_moe", num_experts=32)
    tensors = load_file(path / "model.safetensors")
    router = tensors["model.layers.0.mlp.gate.weight"]
    router[2:4] = 0.0
    router[:2] *= 50
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(path)
    modules = read_modules(checkpoint)
    group = experts_of(modules)
    store = PartStore(tmp_path / "parts", checkpoint, modules, calibration((2, 2, 2, 2)))
    choices = [("fp8", "rtn"), ("w4a16-g32", "imatrix+gptq")]
    store.make({group.name: choices})
    part = store.tensors(store.file(group.name, choices[0]))
    scales: dict[str, list[float]] = {"gate_proj": [], "up_proj": [], "down_proj": []}
    for member in group.members:
        scales[member.name.rpartition(".")[2]].append(float(read_tensor(part[f"{member.name}.input_scale"])))
    assert scales["gate_proj"] == scales["up_proj"]
    for found in (scales["gate_proj"], scales["down_proj"]):
        assert min(found) > 1e-6
        assert found.count(max(found)) > 16, "the largest, and those of whom nothing is known"
        assert len(set(found)) > 2


def shaped(experts: int, hidden: int, inner: int, heads: tuple[int, int]) -> Modules:
    """A block of it."""
    sizes = (("down_proj", hidden, inner), ("gate_proj", inner, hidden), ("up_proj", inner, hidden))
    mlp = "model.layers.0.mlp.experts"
    inside = [Linear(f"{mlp}.{e}.{leaf}", n, k) for e in range(experts) for leaf, n, k in sizes]
    place = "model.layers.0.self_attn"
    outside = [Linear(f"{place}.{leaf}_proj", 128 * n, hidden) for leaf, n in zip("qk", heads, strict=True)]
    groups = (
        Group(f"{place}.qkv_proj", "self_attn.qkv_proj", 0, tuple(outside)),
        Group(mlp, "mlp.experts", 0, tuple(inside)),
    )
    return Modules(groups, 0)


@pytest.mark.parametrize(
    ("shape", "arrays"),
    [
        ((128, 2048, 768, (32, 4)), 8.2e9),  # Qwen3-30B-A3B
        ((8, 4096, 14336, (32, 8)), 19.8e9),  # Mixtral 8x7B
    ],
)
def test_memory_of_large_experts_is_about_that_of_the_arrays_that_are_there_at_once(
    shape: tuple[int, int, int, tuple[int, int]], arrays: float
) -> None:
    modules = shaped(*shape)
    checkpoint = Checkpoint(Path(), {"hidden_size": shape[1], "num_hidden_layers": 1})
    choices = {group.name: [("w4a16-g32", "imatrix+gptq")] for group in modules}
    found = making_memory(checkpoint, modules, choices, 60_000, Rates(9e13, 9e13, 2, True))
    assert arrays < found < 1.4 * arrays


MEASURED = """
import sys
from pathlib import Path
from quantize.core.checkpoint import open_checkpoint
from quantize.core.modules import read_modules
from quantize.core.resources import peak_memory
from quantize.make.parts import PartStore
from tests.quantize.test_experts import calibration, experts_of

checkpoint = open_checkpoint(Path(sys.argv[1]))
modules = read_modules(checkpoint)
store = PartStore(Path(sys.argv[2]), checkpoint, modules, calibration())
store.make({experts_of(modules).name: [("w4a16-g32", "imatrix+gptq")]})
print(peak_memory())
"""


def test_memory_of_experts_is_what_making_them_takes(tmp_path: Path) -> None:
    """A process of its own; what it mapped of the model's file is told apart."""
    path = make_checkpoint(
        tmp_path / "model", "qwen3_moe", hidden_size=512, moe_intermediate_size=256, num_experts=64,
        num_experts_per_tok=8, num_hidden_layers=1,
    )  # fmt: skip
    checkpoint = open_checkpoint(path)
    modules = read_modules(checkpoint)
    name = experts_of(modules).name
    choices = {
        g.name: [("w4a16-g32", "imatrix+gptq") if g.name == name else ("bf16", "rtn")] for g in modules
    }
    said = making_memory(checkpoint, modules, choices, 24 * 60, Rates(9e10, 9e10, 2))
    command = [sys.executable, "-c", MEASURED, str(path), str(tmp_path / "parts")]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    taken = int(done.stdout.split()[-1]) - (path / "model.safetensors").stat().st_size
    assert 0.75 * taken < said < 1.5 * taken
