"""What :mod:`quantize.core.targets` says of this machine holds on the real engine.

Every plan that it calls legal loads and answers; plans that it refuses fail there, or answer wrongly.
The models are random and small, so that a case takes seconds; their shapes are what the rules are about.
"""

import json
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from quantize.card import Calibration
from quantize.core.checkpoint import open_checkpoint
from quantize.core.modules import Group, Modules, read_modules
from quantize.core.plan import Plan
from quantize.core.schemes import KV_SCHEMES, kv_scheme, scheme
from quantize.core.targets import TARGETS, detect_cpu
from quantize.evaluate.bench import Bench, Span
from quantize.make.calibration import CalibrationSet
from quantize.make.variant import compress
from tests.quantize.tiny import VOCABULARY, make_checkpoint

TRIED = ("vllm-cpu-avx512", "vllm-cpu-vnni")
"""Targets on which the whole matrix has run. Elsewhere it says so and does nothing, unless it is asked for:
an expected failure would pass whatever happens. A processor is added here once all of it passes there."""
TRY = "TIERCEL_TRY_RULES"
"""Environment variable with which the matrix runs on a processor that is not in TRIED."""
HERE = TARGETS.get(detect_cpu() or "")

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "deploy/assistant/model"

MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {}),
    "narrow": ("llama", {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 3,
                         "num_key_value_heads": 1}),
    "wide": ("llama", {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8,
                       "num_key_value_heads": 4, "head_dim": 64}),
    "odd outputs": ("llama", {"intermediate_size": 232}),
    "odd inputs": ("llama", {"hidden_size": 112}),
    "heads of 80": ("llama", {"hidden_size": 320, "intermediate_size": 640, "head_dim": 80}),
    "heads of 40": ("llama", {"head_dim": 40}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {}),
    "gemma3": ("gemma3_text", {}),
    "phi3": ("phi3", {}),
    "experts": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model and a plan: part of a group's name to scheme, the first that fits; bf16 elsewhere."""

    model: str
    schemes: Mapping[str, str]
    kv: str = "auto"

    def __str__(self) -> str:
        listed = ",".join(f"{part or 'all'}={name}" for part, name in self.schemes.items()) or "bf16"
        return f"{self.model}-{listed}-{self.kv}".replace(" ", "_")

    def plan(self, modules: Modules) -> Plan:
        found = {
            group.name: next((name for part, name in self.schemes.items() if part in group.name), "bf16")
            for group in modules
        }
        return Plan(groups=found, kv=self.kv, method="rtn")


def whole(model: str, name: str, kv: str = "auto") -> Case:
    return Case(model, {"": name}, kv)


MIXED = {"self_attn": "w8a8", "down_proj": "w8a8", "gate_up": "w4a16-g64"}
LEGAL = (
    Case("llama", {}),
    Case("llama", {}, "fp8"),
    Case("llama", {}, "fp8_e5m2"),
    *(whole("llama", name) for name in (
        "w4a16", "w4a16-asym", "w4a16-g128", "w4a16-g128-asym", "w4a16-g64", "w4a16-g64-asym", "w4a16-g32",
        "w4a16-g32-asym", "w8a8", "w8a8-r7", "w8a8-asym", "w8a8-static", "w4a8-g128", "fp8-dynamic",
    )),
    whole("llama", "w4a16-g64", "fp8"),
    whole("llama", "w8a8", "fp8"),
    whole("llama", "w4a16-g128", "fp8_e5m2"),
    Case("llama", MIXED),
    Case("llama", MIXED, "fp8"),
    Case("llama", {"layers.0": "w8a8", "": "w4a16-g32"}),
    Case("llama", {"layers.0": "bf16", "": "w4a16-g64-asym"}),
    Case("llama", {"qkv": "bf16", "": "w4a16-g64"}),
    Case("llama", {"gate_up": "bf16", "": "w8a8"}),
    Case("llama", {"qkv": "w4a16-g32", "o_proj": "w4a16-asym", "gate_up": "w8a8-asym", "": "w4a16-g128"}),
    whole("wide", "w4a16-g256"),
    whole("wide", "w4a16"),
    whole("narrow", "w4a16-g32"),
    whole("narrow", "w8a8"),
    whole("heads of 80", "w8a8"),
    whole("heads of 80", "w4a16-g32-asym"),
    Case("odd outputs", {"self_attn": "w4a16-g64"}),
    whole("qwen2", "w4a16-g64"),
    whole("qwen2", "w8a8"),
    whole("qwen3", "w4a16-g32", "fp8"),
    Case("qwen3", MIXED),
    whole("mistral", "w4a16-g128"),
    Case("mistral", MIXED, "fp8"),
    Case("gemma3", MIXED),
    Case("phi3", {"qkv": "w4a16-g64", "": "w8a8"}),
    Case("experts", {}),
    Case("experts", {"qkv": "w4a16-g64", "o_proj": "w8a8"}),
)  # fmt: skip
ONLY_WITHOUT_AMX = (
    whole("narrow", "w4a16"),
    whole("narrow", "w4a16-g48"),
    whole("narrow", "w4a16-g96"),
    Case("odd outputs", {"self_attn": "w4a16-g16", "gate_up": "w8a8"}),
)
ILLEGAL = (
    *(whole("llama", name) for name in ("w2a16-g64", "w3a16-g128", "w8a16", "w8a16-g128", "fp8", "fp8a16",
                                        "nvfp4a16", "mxfp4")),
    Case("llama", {"down_proj": "fp8"}),
    Case("odd outputs", {"gate_up": "w4a16-g64"}),
    Case("odd inputs", {"gate_up": "w4a16-g16"}),
    whole("heads of 80", "w8a8", "fp8"),
    Case("heads of 40", {}),
    Case("experts", {"experts": "w4a16-g32"}),
)  # fmt: skip
ONLY_ILLEGAL_WITHOUT_AMX = (
    whole("wide", "fp8-block"),
    Case("experts", {"experts": "w8a8"}),
)


def skip_where_amx_differs(case: Case, without: Sequence[Case]) -> None:
    if HERE is TARGETS["vllm-cpu-amx"] and case in without:
        pytest.skip(f"{case}: AMX kernels have other rules for it")


@dataclass(frozen=True)
class Matrix:
    """Makes checkpoints, once each, and loads them."""

    bench: Bench
    directory: Path

    def model(self, name: str) -> Path:
        path = self.directory / name.replace(" ", "_")
        if not path.exists():
            architecture, shape = MODELS[name]
            make_checkpoint(path, architecture, **shape)
        return path

    def made(self, model: str, plan: Plan, modules: Modules, name: str) -> Path:
        if set(plan.groups.values()) == {"bf16"} and not kv_scheme(plan.kv).calibrated:
            return self.model(model)
        path = self.directory / name
        checkpoint = open_checkpoint(self.model(model))
        compress(checkpoint, modules, plan, random_tokens(), path, self.directory / "log", name)
        return path

    def modules(self, model: str) -> Modules:
        return read_modules(open_checkpoint(self.model(model)))

    def error(self, case: Case, plan: Plan, modules: Modules) -> str | None:
        path = self.made(case.model, plan, modules, str(case))
        return self.bench.load_error(path, "auto" if kv_scheme(plan.kv).calibrated else plan.kv)


def random_tokens() -> CalibrationSet:
    rng = random.Random(0)
    sequences = [[rng.randrange(3, VOCABULARY) for _ in range(64)] for _ in range(8)]
    return CalibrationSet(sequences, Calibration(source="random", sha256="0" * 64, samples=8, tokens=512))


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    if HERE is None:
        pytest.skip("this machine's CPU is no known target")
    if HERE.name not in TRIED and TRY not in os.environ:
        pytest.skip(f"the rules of {HERE.name} have not all been tried on the engine; {TRY}=1 tries them")
    directory = tmp_path_factory.mktemp("matrix")
    python, site = ROOT / ".venv-engine/bin/python", ROOT / "deploy/engine_site"
    with Bench(python, directory / "bench.log", max_model_len=256, site=site) as bench:
        yield Matrix(bench, directory)


def problems(case: Case, modules: Modules, head_dim: int, plan: Plan) -> list[str]:
    assert HERE is not None
    return [str(problem) for problem in HERE.check_plan(plan, modules, head_dim)]


@pytest.mark.parametrize("case", [*LEGAL, *ONLY_WITHOUT_AMX], ids=str)
def test_legal_plans_load_and_answer(matrix: Matrix, case: Case) -> None:
    skip_where_amx_differs(case, ONLY_WITHOUT_AMX)
    modules = matrix.modules(case.model)
    head_dim = open_checkpoint(matrix.model(case.model)).head_dim
    plan = case.plan(modules)
    refused = problems(case, modules, head_dim, plan)
    if refused and HERE is TARGETS["vllm-cpu-avx2"]:
        pytest.skip(refused[0])
    assert refused == []
    assert matrix.error(case, plan, modules) is None


@pytest.mark.parametrize("case", [*ILLEGAL, *ONLY_ILLEGAL_WITHOUT_AMX], ids=str)
def test_illegal_plans_are_refused_and_fail_in_the_engine(matrix: Matrix, case: Case) -> None:
    skip_where_amx_differs(case, ONLY_ILLEGAL_WITHOUT_AMX)
    modules = matrix.modules(case.model)
    plan = case.plan(modules)
    assert problems(case, modules, open_checkpoint(matrix.model(case.model)).head_dim, plan)
    assert matrix.error(case, plan, modules) is not None


@pytest.mark.parametrize("others", ["w4a16-g64", "bf16"])
def test_members_of_a_fused_matrix_in_two_schemes(matrix: Matrix, others: str) -> None:
    """As a checkpoint made elsewhere can have it: our plans give a fused group one scheme."""
    assert HERE is not None
    modules = matrix.modules("llama")
    schemes = {one.name: "w8a8" if one.name.endswith("q_proj") else others for one in modules.linears}
    found = HERE.check_modules(schemes, modules, 32)
    assert {problem.module.rpartition(".")[2] for problem in found} == {"qkv_proj"}
    apart = Modules(
        tuple(
            Group(one.name, one.name.partition(f"layers.{group.layer}.")[2], group.layer, (one,))
            for group in modules
            for one in group.members
        ),
        modules.other_bytes,
    )
    path = matrix.made("llama", Plan(groups=schemes, method="rtn"), apart, f"split-{others}")
    assert matrix.bench.load_error(path) is not None


def test_reordered_inputs(matrix: Matrix) -> None:
    assert HERE is not None
    modules = matrix.modules("llama")
    path = matrix.made("llama", whole("llama", "w8a8").plan(modules), modules, "reordered")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    for group in config["quantization_config"]["config_groups"].values():
        group["weights"]["actorder"] = "group"
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert HERE.act_order_problems("model.layers.0.mlp.down_proj", "group")
    assert "activation ordering" in (matrix.bench.load_error(path) or "")


def test_kv_types_that_load_are_those_that_answer_rightly(matrix: Matrix) -> None:
    """On a CPU the engine loads INT8 and INT4 caches per token and head, and then answers wrongly."""
    assert HERE is not None
    rng = random.Random(0)
    spans: list[Span] = [([rng.randrange(3, VOCABULARY) for _ in range(96)], 1) for _ in range(3)]
    reference = matrix.directory / "reference.npz"
    matrix.bench.score(DEMO, spans, save=reference)
    head_dim = open_checkpoint(DEMO).head_dim

    def loss(kv: str) -> float:
        return float(matrix.bench.score(DEMO, spans, kv=kv, reference=reference).kl.mean())

    refused: Callable[[str], bool] = lambda kv: bool(HERE.kv_problems(kv, head_dim))  # noqa: E731
    for kv in KV_SCHEMES:
        if not refused(kv):
            assert loss(kv) < 0.05, kv
        elif kv.endswith("per_token_head"):
            assert loss(kv) > 0.2, kv


def test_the_matrix_is_broad() -> None:
    assert len(LEGAL) >= 24
    assert len({case.model for case in LEGAL}) >= 6
    named = {name for case in LEGAL for name in case.schemes.values()}
    candidates = {name for name in named if scheme(name).weights}
    assert {"w4a16", "w4a16-g32", "w4a16-g64", "w4a16-g128", "w8a8", "w8a8-asym"} <= candidates
