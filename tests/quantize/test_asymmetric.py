"""Groups of a plan that are made one behind the other, on what the groups before them give."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from tqdm import TMonitor

from quantize.card import Calibration
from quantize.core.checkpoint import Checkpoint, open_checkpoint
from quantize.core.dequantize import dequantized
from quantize.core.methods import MethodError, in_order, independent, parse_method
from quantize.core.modules import Modules, read_modules
from quantize.core.plan import Plan, uniform
from quantize.core.schemes import scheme
from quantize.core.targets import target
from quantize.core.tensors import read_file_parts
from quantize.make import asymmetric, blocks, halting
from quantize.make.asymmetric import DAMPINGS, Moments, corrected
from quantize.make.calibration import CalibrationSet
from quantize.make.parts import PartStore
from quantize.make.statistics import InputStatistics
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


def moments_of(x: Any, seen: Any) -> Moments:
    inputs = InputStatistics(len(x), seen.T @ seen / len(x), float(seen.min()), float(seen.max()))
    return Moments(inputs, (x - seen).T @ seen / len(x))


def halved(x: Any, seen: Any) -> tuple[Moments, list[Moments]]:
    """Of all rows, and of either half of them."""
    return moments_of(x, seen), [moments_of(x[half::2], seen[half::2]) for half in (0, 1)]


def test_what_is_rounded_gives_on_changed_inputs_what_the_weight_gives_on_its_own() -> None:
    """W' - W is a share of what the ridge regression of W x on x̂ says, which other inputs confirm."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(800, 24, generator=generator)
    changed = x @ (torch.eye(24) + 0.2 * torch.randn(24, 24, generator=generator))
    weight = torch.randn(8, 24, generator=generator)
    whole, halves = halved(x[:400], changed[:400])
    (found,) = corrected([weight], whole, halves)

    def ridge(damping: float) -> Any:
        added = damping * float(whole.inputs.moments.diagonal().mean())
        rows = torch.cat([changed[:400], (400 * added) ** 0.5 * torch.eye(24)])
        wanted = torch.cat([x[:400] @ weight.T, (400 * added) ** 0.5 * weight.T])
        return torch.linalg.lstsq(rows, wanted).solution.T

    regression = ridge(min(DAMPINGS))
    share = float((found - weight).norm() / (regression - weight).norm())
    assert 0.9 < share <= 1, "little noise: the least damping and nearly all of it"
    assert torch.allclose(found, weight + share * (regression - weight), atol=1e-4)
    before, after = ((x[400:] @ weight.T - changed[400:] @ w.T).square().mean() for w in (weight, found))
    assert after < 0.2 * before


def test_a_correction_that_the_other_half_does_not_bear_out_is_not_made() -> None:
    """Few rows, and changes that have nothing to do with the inputs: a regression of them is noise."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(8, 64, generator=generator)
    x, other = torch.randn(2, 96, 64, generator=generator)
    whole, halves = halved(x + other, x)
    (found,) = corrected([weight], whole, halves)
    factor = whole.inputs.moments + min(DAMPINGS) * torch.eye(64)
    unchecked = weight @ whole.mismatch @ torch.linalg.inv(factor)
    fresh_x, fresh_other = torch.randn(2, 4000, 64, generator=generator)

    def error(changed: Any) -> float:
        return float(((fresh_x + fresh_other) @ weight.T - fresh_x @ changed.T).square().mean())

    assert (found - weight).norm() < 0.3 * unchecked.norm()
    assert error(found) < 1.05 * error(weight) < 1.3 * error(weight) < error(weight + unchecked)


def test_inputs_that_did_not_change_are_all_zero_or_of_one_half_change_no_weight() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(8, 24, generator=generator), torch.randn(400, 24, generator=generator)
    other = torch.randn(5, 24, generator=generator)
    for inputs in (x, torch.zeros_like(x)):
        found = corrected([weight, other], *halved(inputs, inputs))
        assert all(map(torch.equal, found, (weight, other)))
    whole, halves = halved(x, 0.5 * x)
    (changed,) = corrected([weight], whole, halves)
    assert not torch.equal(changed, weight)
    (alone,) = corrected([weight], whole, halves[:1])
    assert torch.equal(alone, weight)


def working_threads() -> int:
    """How many there are; tqdm has one more of its own from some bar on."""
    return sum(not isinstance(one, TMonitor) for one in threading.enumerate())


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


def test_what_halts_makes_the_same_whether_it_is_kept_or_begun_anew(
    tiny: tuple[Checkpoint, Modules], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept, a block is passed once by each of two states and once for the order of its groups."""
    checkpoint, modules = tiny
    plan = uniform(modules, SCHEME, method=METHOD)
    monkeypatch.setattr(blocks, "BATCH_TOKENS", 128)
    passes: list[int] = []
    through = blocks.Blocks.through

    def counted(self: blocks.Blocks, layer: int, *rest: Any) -> Any:
        passes.append(layer)
        return through(self, layer, *rest)

    found, counts, threads = {}, {}, working_threads()
    some = 200 * halting.kept_bytes(int(checkpoint.text_config["hidden_size"]), modules.linears)
    for held in (1 << 30, some, 0):
        store = store_of(tmp_path / str(held), checkpoint, modules)
        with monkeypatch.context() as patch:
            patch.setattr(halting, "HELD_BYTES", held)
            patch.setattr(blocks.Blocks, "through", counted)
            found[held] = bytes_of(store.files(plan))
        counts[held] = passes.count(0)
        passes.clear()
    assert found[1 << 30] == found[some] == found[0]
    batches = len(list(blocks.batched(list(map(len, sequences(0))), 128)))
    smoothing = batches
    assert batches > 2
    assert counts[1 << 30] == smoothing + 1 + 2 * batches
    assert counts[0] == smoothing + 1 + 2 * batches * 5, "up to four groups and through the whole"
    assert counts[1 << 30] < counts[some] < counts[0]
    assert working_threads() == threads, "no pass is left that halts"


def test_an_error_in_a_halting_pass_is_told_and_leaves_no_thread(
    tiny: tuple[Checkpoint, Modules], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, modules = tiny
    store = store_of(tmp_path / "parts", checkpoint, modules)
    threads = working_threads()
    real = asymmetric.solved

    def fails(tasks: Any, *rest: Any) -> Any:
        if "down_proj" in tasks[0][0]:
            raise OSError("no room is left")
        return real(tasks, *rest)

    monkeypatch.setattr(asymmetric, "solved", fails)
    with pytest.raises(OSError, match="no room is left"):
        store.files(uniform(modules, SCHEME, method=METHOD))
    assert working_threads() == threads
    monkeypatch.setattr(asymmetric, "solved", real)

    def breaks(*_: Any) -> Any:
        raise ValueError("rounded wrongly")

    monkeypatch.setattr(asymmetric, "round_inputs", breaks)
    with pytest.raises(ValueError, match="rounded wrongly"):
        store.files(uniform(modules, "w8a8", method=METHOD))
    assert working_threads() == threads


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
