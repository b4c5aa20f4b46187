"""Every known architecture, and every dress in which checkpoints come: checked, made, loaded, asked.

The models are random and small. What the engine answers is compared with the plan computed in torch (stored
weights turned back into numbers, inputs rounded where the scheme rounds them) and with the unquantized model:
were a variant served at 16 bits after all, it would agree with the wrong one. Experts are computed too.
What cannot be made is refused before work, with the reason.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from quantize.check import check_report
from quantize.core.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from quantize.core.dequantize import dequantized, read_tensor
from quantize.core.legality import Target
from quantize.core.loading import load_model
from quantize.core.modules import Modules, read_modules
from quantize.core.plan import Plan
from quantize.core.schemes import scheme
from quantize.core.targets import TARGETS, detect_cpu
from quantize.core.tensors import read_parts
from quantize.evaluate.bench import Bench, Span
from quantize.make.linears import exchanged, find_linears, observing
from quantize.make.ranges import round_inputs
from quantize.make.variant import compress
from tests.e2e.test_matrix import random_tokens
from tests.quantize.tiny import (
    VOCABULARY,
    add_outliers,
    as_hub_cache,
    change_config,
    make_checkpoint,
    split_in_shards,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]
HERE = TARGETS.get(detect_cpu() or "")
VISION = ROOT / ".venv-engine/lib/python3.11/site-packages/torchvision"

Dress = Callable[[Path], None]


def template_apart(path: Path) -> None:
    """The chat template in a file of its own, and nothing of it in the tokenizer's configuration."""
    assert (path / "chat_template.jinja").is_file()
    assert "chat_template" not in json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))


def with_consolidated(path: Path) -> None:
    """As Mistral releases its models: the same weights once more under names that vLLM prefers. Here they are
    another model's, so that an engine that read them would answer otherwise."""
    split_in_shards(path)
    other = make_checkpoint(path.with_name("other"), "mistral", seed=7, **SPREAD)
    shutil.move(other / "model.safetensors", path / "consolidated.safetensors")
    (path / "params.json").write_text('{"dim": 128, "n_layers": 2}', encoding="utf-8")


def read_only(path: Path) -> None:
    for file in path.iterdir():
        file.chmod(0o444)
    path.chmod(0o555)


SPREAD: Mapping[str, Any] = {"initializer_range": 0.1}
"""Weights so large that what a scheme changes is far above what 16-bit arithmetic does."""


@dataclass(frozen=True)
class Source:
    """A checkpoint made on the spot."""

    architecture: str = "llama"
    shape: Mapping[str, Any] = field(default_factory=dict)
    dress: Dress | None = None
    outliers: str = ""
    """Part of the names of matrices that have some; all have by default."""

    def make(self, path: Path) -> Path:
        make_checkpoint(path, self.architecture, **{**SPREAD, **self.shape})
        add_outliers(path, self.outliers)
        if self.dress:
            self.dress(path)
        return path


FINE: Mapping[str, Any] = {"dtype": "float16"}
"""For what loses little: arithmetic in float16 is eight times finer than in bfloat16."""

EVERY = ("w4a16-g32", "w8a8", "mixture")
SOURCES: Mapping[str, tuple[Source, tuple[str, ...]]] = {
    "llama": (Source(), EVERY),
    "llama, head": (Source(shape=FINE, outliers="lm_head"), ("head",)),
    "llama, tied": (Source(shape={"tie_word_embeddings": True}), EVERY),
    "qwen2 with biases": (Source("qwen2"), EVERY),
    "qwen3": (Source("qwen3"), EVERY),
    "qwen3_moe": (Source("qwen3_moe"), EVERY),
    "qwen3_moe, head": (Source("qwen3_moe", shape=FINE, outliers="lm_head"), ("head",)),
    "mixtral": (Source("mixtral"), EVERY),
    "gemma2": (Source("gemma2"), EVERY),
    "gemma3": (Source("gemma3_text"), EVERY),
    "gemma3 with images": (Source("gemma3"), EVERY),
    "mistral with consolidated": (Source("mistral", dress=with_consolidated), EVERY),
    "mistral3 with images": (Source("mistral3"), EVERY),
    "phi3": (Source("phi3"), EVERY),
    "float32": (Source(shape={"dtype": "float32"}), ("mixture",)),
    "float16": (Source(shape={"dtype": "float16"}), ("mixture",)),
    "shards": (Source(dress=split_in_shards), ("mixture",)),
    "hub cache": (Source(dress=as_hub_cache), ("mixture",)),
    "read-only": (Source(dress=read_only), ("mixture",)),
    "template apart": (Source(dress=template_apart), ("mixture",)),
}
"""Name to the source and the plans that are made of it."""


def plan_of(kind: str, modules: Modules, where: Target) -> Plan:
    """A plan by name, with bf16 where ``where`` has no kernel for a group."""

    def wanted(group_kind: str) -> str:
        match kind:
            case "mixture":
                return "w8a8" if "self_attn" in group_kind else "w4a16-g64"
            case "head":
                return "w8a8" if group_kind == "lm_head" else "bf16"
            case name:
                return name

    chosen = {group.name: wanted(group.kind) for group in modules}
    for group in modules:
        if not where.legal(scheme(where.instead(chosen[group.name])), group):
            chosen[group.name] = "bf16"
    return Plan(groups={name: where.instead(one) for name, one in chosen.items()}, method="rtn")


@dataclass
class Made:
    """A source, and the variants of it that were made."""

    path: Path
    checkpoint: Checkpoint
    modules: Modules

    def variant(self, kind: str, where: Target) -> tuple[Path, Plan, Modules]:
        modules = self.modules.with_head() if kind == "head" else self.modules
        plan, out = plan_of(kind, modules, where), self.path.parent / f"{kind}-{where.name}"
        if not out.exists():
            out.mkdir()
            compress(self.checkpoint, modules, plan, random_tokens(), out, self.path.parent / "log", kind)
        return out, plan, modules


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Made]]:
    made: dict[str, Made] = {}

    def source(name: str) -> Made:
        if name not in made:
            path = SOURCES[name][0].make(tmp_path_factory.mktemp("source") / "model")
            checkpoint = open_checkpoint(path)
            made[name] = Made(path, checkpoint, read_modules(checkpoint))
        return made[name]

    yield source
    for one in made.values():
        one.path.chmod(0o755)


CASES = [(name, kind) for name, (_, kinds) in SOURCES.items() for kind in kinds]


@pytest.mark.parametrize("name", SOURCES)
def test_it_is_checked(sources: Callable[[str], Made], name: str) -> None:
    """What the check says of bytes is what is on the disk afterwards."""
    where, made = TARGETS["vllm-cuda-hopper"], sources(name)
    report = check_report(made.checkpoint, where, calibration=[100] * 40)
    for kind in ("w4a16-g32", "w8a8"):
        row = next(row for row in report.schemes if row.scheme == kind)
        out, _, _ = made.variant(kind, where)
        assert sum(part.bytes for part in read_parts(out).values()) == row.bytes
        assert row.legal == report.groups


@pytest.mark.parametrize("name", SOURCES)
def test_every_matrix_is_made_as_planned(sources: Callable[[str], Made], name: str) -> None:
    """Also experts, and for a GPU, which has kernels for them; what is not planned is the source's own."""
    where, made = TARGETS["vllm-cuda-hopper"], sources(name)
    before = read_parts(made.path)
    for kind, worst in (("w4a16-g32", 0.3), ("w8a8", 0.08)):
        out, plan, modules = made.variant(kind, where)
        after = read_parts(out)
        assert set(plan.groups.values()) == {kind}
        for member in modules.linears:
            stored = "weight_packed" if kind.startswith("w4") else "weight"
            assert after[f"{member.name}.{stored}"].dtype in ("I32", "I8")
            weight = read_tensor(before[f"{member.name}.weight"]).float()
            error = (dequantized(after, member.name, scheme(kind)) - weight).norm() / weight.norm()
            assert 0 < error < worst, member.name
        for tensor in before.keys() - {f"{member.name}.weight" for member in modules.linears}:
            kept = read_tensor(after[tensor])
            assert (kept == read_tensor(before[tensor]).to(kept.dtype)).all(), tensor
    assert not list(out.glob("consolidated*"))
    assert not (out / "params.json").exists()
    assert (out / "chat_template.jinja").read_bytes() == (made.path / "chat_template.jinja").read_bytes()


def spans() -> list[Span]:
    rng = random.Random(0)
    return [([rng.randrange(8, VOCABULARY) for _ in range(48)], 1) for _ in range(3)]


def in_torch(made: Made, plan: Plan | None, variant: Path, modules: Modules) -> NDArray[np.float64]:
    """ln p of every token of the spans, by the source with the variant's stored weights in place of its own
    and inputs rounded as ``plan`` has it; by the source itself without a plan."""
    import torch

    dtype = torch.float16 if made.checkpoint.serving_dtype == "F16" else torch.bfloat16
    model, stored, rows = load_model(made.checkpoint, dtype), read_parts(variant), []
    schemes = {m.name: scheme(plan.groups[g.name]) for g in modules for m in g.members} if plan else {}
    weights = {
        name: dequantized(stored, name, how).to(model.dtype) for name, how in schemes.items() if how.weights
    }
    rounded = {name: how.activations for name, how in schemes.items() if how.activations}
    places = find_linears(model, modules.linears)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(exchanged(places, weights))
        stack.enter_context(
            observing({n: places[n] for n in rounded}, lambda name, x: round_inputs(x, rounded[name]))
        )
        for tokens, start in spans():
            logits = model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
            scores = torch.log_softmax(logits.float(), -1)[start - 1 : len(tokens) - 1]
            rows.append(scores.gather(1, torch.tensor(list(tokens[start:]))[:, None])[:, 0])
    return torch.cat(rows).double().numpy()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    if HERE is None:
        pytest.skip("this machine's CPU is no known target")
    log, site = tmp_path_factory.mktemp("bench") / "log", ROOT / "deploy/engine_site"
    with Bench(
        ROOT / ".venv-engine/bin/python", log, max_model_len=128, site=site, env=ENVIRONMENT
    ) as opened:
        yield opened


ENVIRONMENT = {"VLLM_CPU_INT4_W4A8": "0"}
"""So that int4 is what it says on AMX too."""


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_engine_computes_what_was_made(
    sources: Callable[[str], Made], bench: Bench, name: str, kind: str
) -> None:
    if name.endswith("with images") and not VISION.exists():
        pytest.skip("the engine's environment has no torchvision, without which vLLM serves no such wrapper")
    assert HERE is not None
    made = sources(name)
    out, plan, modules = made.variant(kind, HERE)
    served = bench.score(out, spans()).logp
    far = abs(served - in_torch(made, None, out, modules)).mean()
    near = abs(served - in_torch(made, plan, out, modules)).mean()
    assert set(plan.groups.values()) != {"bf16"}
    print(f"{name} {kind}: to the plan in torch {near:.4f}, to the source {far:.4f}")
    assert near < 0.5 * far


def packed(method: str) -> Dress:
    return lambda path: change_config(path, quantization_config={"quant_method": method, "bits": 4})


def settings_apart(path: Path) -> None:
    (path / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}', encoding="utf-8")


def only_pickles(path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


REFUSED: Mapping[str, tuple[Source, str]] = {
    "gpt-oss": (Source("gpt_oss"), r"GptOssForCausalLM: .*MXFP4.*register"),
    "deepseek v2": (Source("deepseek_v2"), r"DeepseekV2ForCausalLM: .*\(MLA\).*register"),
    "deepseek v3": (Source("deepseek_v3"), r"DeepseekV3ForCausalLM: .*\(MLA\).*register"),
    "llama 4": (Source("llama4_text"), r"Llama4ForCausalLM: its experts are stored transposed"),
    "unknown": (
        Source(dress=lambda path: change_config(path, architectures=["NewForCausalLM"])),
        r"NewForCausalLM: it is not known how an engine fuses its modules; known: .*MixtralForCausalLM",
    ),
    "fp8": (Source(dress=packed("fp8")), "is quantized already; register it, or give its original"),
    "awq": (Source(dress=packed("awq")), "is quantized already; register it, or give its original"),
    "gptq": (Source(dress=packed("gptq")), "is quantized already; register it, or give its original"),
    "gptq, settings apart": (Source(dress=settings_apart), "is quantized already; register it"),
    "only .bin": (Source(dress=only_pickles), "pickles, which are not read here. Convert them"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_made_is_refused_before_work(tmp_path: Path, name: str) -> None:
    source, said = REFUSED[name]
    path = source.make(tmp_path / "model")
    with pytest.raises(CheckpointError, match=said) as refusal:
        check_report(open_checkpoint(path), TARGETS["vllm-cuda-hopper"], calibration=[100] * 40)
    print(refusal.value)
