"""Groups of a plan that are made one behind the other, on what the groups before them give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantize.card import Calibration
from quantize.core.checkpoint import Checkpoint, open_checkpoint
from quantize.core.dequantize import dequantized
from quantize.core.methods import MethodError, in_order, independent, parse_method
from quantize.core.modules import Modules, read_modules
from quantize.core.plan import Plan, uniform
from quantize.core.schemes import scheme
from quantize.core.targets import target
from quantize.core.tensors import read_file_parts
from quantize.make.asymmetric import DAMPING, corrected
from quantize.make.calibration import CalibrationSet
from quantize.make.parts import PartStore
from quantize.plan.planner import PlanError
from quantize.plan.session import choices_on
from tests.quantize.tiny import VOCABULARY, make_checkpoint

torch = pytest.importorskip("torch")

SCHEME, METHOD = "w3a16-g64", "smooth+imatrix+gptaq"


def sequences(seed: int, lengths: tuple[int, ...] = (9, 30, 31, 64, 64, 64, 64)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def store_of(directory: Path, checkpoint: Checkpoint, modules: Modules) -> PartStore:
    found = sequences(0)
    described = Calibration(source="random", sha256="0" * 64, samples=len(found), tokens=sum(map(len, found)))
    return PartStore(directory, checkpoint, modules, CalibrationSet(found, described))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Modules]:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path_factory.mktemp("model") / "model"))
    return checkpoint, read_modules(checkpoint)


def test_what_is_rounded_gives_on_changed_inputs_what_the_weight_gives_on_its_own() -> None:
    """W' is the ridge regression of W x on x̂."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 24, generator=generator)
    changed = x @ (torch.eye(24) + 0.2 * torch.randn(24, 24, generator=generator))
    weight = torch.randn(8, 24, generator=generator)
    moments = changed.T @ changed / 400
    found = corrected(weight, moments, (x - changed).T @ changed / 400)
    damping = DAMPING * float(moments.diagonal().mean())
    rows = torch.cat([changed, (400 * damping) ** 0.5 * torch.eye(24)])
    wanted = torch.cat([x @ weight.T, (400 * damping) ** 0.5 * weight.T])
    assert torch.allclose(found, torch.linalg.lstsq(rows, wanted).solution.T, atol=1e-4)
    before, after = ((x @ weight.T - changed @ w.T).square().mean() for w in (weight, found))
    assert after < 0.2 * before


def test_inputs_that_did_not_change_or_are_all_zero_change_no_weight() -> None:
    weight = torch.randn(8, 24, generator=torch.Generator().manual_seed(1))
    moments = torch.eye(24)
    assert torch.equal(corrected(weight, moments, torch.zeros(24, 24)), weight)
    assert torch.equal(corrected(weight, torch.zeros(24, 24), torch.zeros(24, 24)), weight)


def bytes_of(files: dict[str, Path]) -> dict[str, bytes]:
    return {name: file.read_bytes() for name, file in files.items()}


def test_the_first_group_is_gptqs_and_a_killed_run_ends_with_the_same_bytes(
    tiny: tuple[Checkpoint, Modules], tmp_path: Path
) -> None:
    """Nothing is quantized before the first group, so its inputs are the model's."""
    checkpoint, modules = tiny
    store = store_of(tmp_path / "parts", checkpoint, modules)
    plain = store.files(uniform(modules, SCHEME, method=independent(METHOD)))
    ordered = store.files(uniform(modules, SCHEME, method=METHOD))
    whole = bytes_of(ordered)
    same = {name for name, file in plain.items() if file.read_bytes() == whole[name]}
    first = "model.layers.0.self_attn.qkv_proj.safetensors"
    assert {first, "kept.safetensors"} <= same
    assert not any("layers.1" in name for name in same)
    for name in (f"{group.name}.safetensors" for group in modules):
        if "layers.1" in name or "down_proj" in name:
            ordered[name].unlink()
    again = store_of(tmp_path / "parts", checkpoint, modules)
    assert bytes_of(again.files(uniform(modules, SCHEME, method=METHOD))) == whole
    afresh = store_of(tmp_path / "others", checkpoint, modules)
    assert bytes_of(afresh.files(uniform(modules, SCHEME, method=METHOD))) == whole


def outputs(model: Any, plan: Plan, store: PartStore, tokens: list[list[int]]) -> Any:
    """Last hidden states with the plan's weights in the model; without smoothing."""
    for group in store.modules:
        part = read_file_parts(store.files(plan)[f"{group.name}.safetensors"])
        for member in group.members:
            weight = dequantized(part, member.name, scheme(plan.groups[group.name]))
            model.get_submodule(member.name).weight.data = weight
    with torch.no_grad():
        return torch.cat([model.model(torch.tensor([one])).last_hidden_state[0] for one in tokens])


def test_errors_of_groups_before_are_made_up_for(tiny: tuple[Checkpoint, Modules], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint, modules = tiny
    store = store_of(tmp_path / "parts", checkpoint, modules)
    held_out = sequences(1)
    wrong = {}
    for method in ("imatrix+gptq", "imatrix+gptaq"):
        model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
        with torch.no_grad():
            right = torch.cat([model.model(torch.tensor([one])).last_hidden_state[0] for one in held_out])
        plan = uniform(modules, SCHEME, method=method)
        wrong[method] = float((outputs(model, plan, store, held_out) - right).square().mean())
    assert wrong["imatrix+gptaq"] < 0.97 * wrong["imatrix+gptq"], wrong


def test_a_mixture_is_made_behind_what_every_group_of_it_became(
    tiny: tuple[Checkpoint, Modules], tmp_path: Path
) -> None:
    """Groups of 8 bits and of 16 stay the parts that they are; those behind them depend on them."""
    checkpoint, modules = tiny
    store = store_of(tmp_path / "parts", checkpoint, modules)
    kinds = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    names = [f"model.layers.{layer}.{kind}" for layer in range(modules.layers) for kind in kinds]
    assert sorted(names) == sorted(group.name for group in modules)

    def plan(second: str) -> Plan:
        groups = dict.fromkeys(names, SCHEME) | {names[0]: "w8a8", names[1]: second}
        return Plan(groups=groups, method=METHOD, methods={names[0]: "smooth+rtn", names[1]: "smooth+rtn"})

    found = {second: store.files(plan(second)) for second in ("w8a8", "bf16")}
    for files in found.values():
        assert files[f"{names[0]}.safetensors"] == store.file(names[0], ("w8a8", "smooth+rtn"))
    eight, sixteen = (bytes_of(found[second]) for second in ("w8a8", "bf16"))
    assert all(eight[f"{name}.safetensors"] != sixteen[f"{name}.safetensors"] for name in names[4:])
    store.assemble(plan("w8a8"), tmp_path / "variant")
    assert (tmp_path / "variant" / "config.json").is_file()


def test_experts_are_made_as_parts_are(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "model", "qwen3_moe"))
    modules = read_modules(checkpoint)
    store = store_of(tmp_path / "parts", checkpoint, modules)
    files = store.files(uniform(modules, SCHEME, method="imatrix+gptaq"))
    experts = [group.name for group in modules if group.kind.endswith("experts")]
    assert experts
    for group in modules:
        part = store.file(group.name, (SCHEME, "imatrix+gptq"))
        assert (files[f"{group.name}.safetensors"] == part) == (group.name in experts)


def test_what_depends_on_a_plan_is_no_part_of_others(
    tiny: tuple[Checkpoint, Modules], tmp_path: Path
) -> None:
    checkpoint, modules = tiny
    store = store_of(tmp_path / "parts", checkpoint, modules)
    name = next(iter(modules)).name
    with pytest.raises(MethodError, match=r"made for one plan, in its order.*smooth\+imatrix\+gptq$"):
        store.make({name: [(SCHEME, METHOD)]})
    with pytest.raises(PlanError, match="is tried on the best one"):
        choices_on(target("vllm-cpu-vnni"), modules, ["w4a16-g64"], [METHOD])
    for how, method in (("fp8-dynamic", "imatrix+gptaq"), ("w8a8-static", METHOD)):
        with pytest.raises(MethodError, match=r"integers alone; take imatrix|not measured behind smoothing"):
            store.files(uniform(modules, how, method=method))
    assert [one.name for one in (tmp_path / "parts").rglob("*") if one.is_file()] == [".lock"]
    with pytest.raises(MethodError, match="gptaq goes after smooth or no transform"):
        parse_method("awq+imatrix+gptaq")


def test_methods_and_their_counterparts() -> None:
    assert in_order("smooth+imatrix+gptq") == METHOD
    assert independent(METHOD) == "smooth+imatrix+gptq"
    assert [in_order(name) for name in ("awq+gptq", "smooth+rtn", "imatrix")] == [
        "awq+gptq",
        "smooth+rtn",
        "imatrix",
    ]
