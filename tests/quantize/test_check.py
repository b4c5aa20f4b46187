"""The check before any work: what is possible for a model, why the rest is not, and what it will cost."""

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantize.card import Calibration
from quantize.check import (
    CheckReport,
    check_report,
    format_check,
    kept_rows,
    reference_bytes,
    refuse_pattern,
    refuse_short,
    refuse_unfit,
)
from quantize.core.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from quantize.core.companions import largest_token
from quantize.core.cost import Cost
from quantize.core.modules import Group, Linear, Modules, read_modules
from quantize.core.plan import uniform
from quantize.core.targets import TARGETS
from quantize.cost import estimate
from quantize.make.calibration import CalibrationSet
from quantize.make.rate import Rates, matmul_rate, usable_cores
from quantize.plan import session
from quantize.plan.cost import planning_cost
from quantize.plan.session import choices_on


@pytest.fixture(autouse=True)
def without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is asked about (tests/quantize/test_account.py) takes ten seconds of import."""
    for name in ("refuse_other_tensors", "refuse_bad_tokenizer"):
        monkeypatch.setattr(f"quantize.check.{name}", lambda _: None)


def write_model(
    path: Path,
    hidden: int = 256,
    inner: int = 768,
    layers: int = 2,
    heads: tuple[int, int] = (4, 2),
    vocabulary: int = 512,
    **config: Any,
) -> Checkpoint:
    """A checkpoint of which only the headers are real: its weights are a hole in a file. ``heads`` are of
    queries and of keys, 64 wide."""
    (queries, kv_heads), head_dim = heads, 64
    shapes: dict[str, list[int]] = {"model.embed_tokens.weight": [vocabulary, hidden]}
    for layer in range(layers):
        place = f"model.layers.{layer}."
        for name, n, k in (
            ("self_attn.q_proj", queries * head_dim, hidden),
            ("self_attn.k_proj", kv_heads * head_dim, hidden),
            ("self_attn.v_proj", kv_heads * head_dim, hidden),
            ("self_attn.o_proj", hidden, queries * head_dim),
            ("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):  # fmt: skip
            shapes[f"{place}{name}.weight"] = [n, k]
    header, offset = {}, 0
    for name, (n, k) in shapes.items():
        header[name] = {"dtype": "BF16", "shape": [n, k], "data_offsets": [offset, offset + 2 * n * k]}
        offset += 2 * n * k
    text = json.dumps(header).encode()
    path.mkdir(parents=True, exist_ok=True)
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    settings = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "num_attention_heads": queries,
        "num_key_value_heads": kv_heads, "num_hidden_layers": layers, "head_dim": head_dim,
        "max_position_embeddings": 1024, "vocab_size": vocabulary, **config,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokens = {
        "model": {"vocab": {"a": 0, "b": vocabulary - 2}},
        "added_tokens": [{"id": vocabulary - 1, "content": "<|turn|>"}],
    }
    (path / "tokenizer.json").write_text(json.dumps(tokens), encoding="utf-8")
    (path / "chat_template.jinja").write_text("<|turn|>{{ messages }}", encoding="utf-8")
    return open_checkpoint(path)


IDLE = Rates(wide=9e10, narrow=2.02e11, cores=2)
"""Of the two cores on which the recorded figures were taken."""


def rounded_cost(checkpoint: Checkpoint) -> Cost:
    modules = read_modules(checkpoint)
    return estimate(checkpoint, modules, uniform(modules, "w8a8", method="rtn"), [], IDLE)


def report(checkpoint: Checkpoint, target: str = "vllm-cpu-vnni", **more: Any) -> CheckReport:
    return check_report(checkpoint, TARGETS[target], rates=IDLE, **{"calibration": [256] * 256, **more})


def test_report_says_what_is_possible_and_why_the_rest_is_not(tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path)
    found = report(checkpoint)
    rows = {row.scheme: row for row in found.schemes}
    assert found.groups == 8
    assert rows["w4a16-g64"].legal == 8
    assert rows["w4a16-g64"].problems == ()
    assert rows["w4a16-g64"].bits_per_weight == pytest.approx(4.25, abs=0.01)
    assert rows["w8a16"].legal == 0
    assert rows["w8a16"].problems == ("8 bits, but CPUWNA16 takes 4 bits",)
    assert rows["w8a16"].bytes == found.bf16_bytes
    assert "unusable" in (rows["fp8-dynamic"].note or "")
    text = format_check(found)
    for words in (
        "w4a16-g64",
        "CPUWNA16 takes 4 bits",
        "answers wrongly",
        "1 ranks: fits",
        "w8a8 by smooth+rtn",
    ):
        assert words in text
    assert CheckReport.model_validate_json(found.model_dump_json()) == found


def test_a_scheme_that_fits_some_groups_is_counted_with_bf16_in_the_rest(tmp_path: Path) -> None:
    found = report(write_model(tmp_path, inner=720))
    row = next(row for row in found.schemes if row.scheme == "w4a16-g64")
    assert row.legal == 6  # all but down_proj, whose 720 inputs are no whole groups of 64
    assert any(problem.startswith("mlp.down_proj: K is 720") for problem in row.problems)
    assert "6/8" in format_check(found)


def test_what_stays_at_16_bits_is_counted(tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path, tie_word_embeddings=True)
    (kept,) = report(checkpoint).kept
    least = min(row.bytes for row in report(checkpoint).schemes)
    assert kept.bytes == 2 * 512 * 256
    assert kept.share == pytest.approx(kept.bytes / least)
    said = format_check(report(checkpoint))
    assert "embeddings, which are the head too: 0.26 MB at 16 bits, " in said
    assert "looks embeddings up at 16 bits" in said


def test_a_head_of_its_own_says_in_what_it_could_be_served(tmp_path: Path) -> None:
    modules = read_modules(write_model(tmp_path))
    head = Group("lm_head", "lm_head", -1, (Linear("lm_head", 512, 256),))
    whole = Modules(modules.groups, modules.other_bytes + 2 * 512 * 256, head, modules.embedding_bytes)
    said = {row.what: row.why for row in kept_rows(whole, TARGETS["vllm-cpu-vnni"], 1_000_000)}
    assert said["output head"] == "a plan may give it w8a8, in which vllm-cpu-vnni serves it"
    assert whole.with_head().other_bytes == modules.other_bytes
    assert whole.with_head().groups[-1] is head
    assert whole.with_head().layers == modules.layers
    with pytest.raises(KeyError, match="the model has none of its own"):
        modules.with_head()


def test_rules_that_were_only_read_are_said(tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path)
    assert not report(checkpoint).untried
    said = format_check(report(checkpoint, "vllm-cuda-hopper"))
    assert "of vllm-cuda-hopper, these rules were read in vLLM 0.32's sources and not run" in said
    assert "w8a16-g64" in report(checkpoint, "vllm-cuda-hopper").untried
    assert "w8a16-g128" not in report(checkpoint, "vllm-cuda-hopper").untried


def test_ranks_that_do_not_fit_are_said(tmp_path: Path) -> None:
    found = report(write_model(tmp_path), "vllm-cuda-hopper", tensor_parallel=8)
    assert found.ranks[4] is None
    assert found.ranks[8] == "4 attention heads are not a multiple of 8"
    assert any("tensor parallelism" in warning for warning in found.warnings)
    assert any("read in" in warning for warning in found.warnings)


def test_memory_and_disk_are_checked_before_work(tmp_path: Path) -> None:
    found = report(write_model(tmp_path), memory_free=10_000_000)
    (warning,) = found.warnings
    assert "calibration needs about" in warning
    assert "free are 10.00 MB" in warning
    assert "warning: memory" in format_check(found)


def test_cost_grows_with_what_it_is_made_of(tmp_path: Path) -> None:
    small = write_model(tmp_path / "small")
    large = write_model(tmp_path / "large", hidden=1024, inner=4096)

    def cost(checkpoint: Checkpoint, count: int = 100, method: str = "gptq") -> tuple[int, float]:
        modules = read_modules(checkpoint)
        made = estimate(
            checkpoint, modules, uniform(modules, "w4a16-g32", method=method), [100] * count, IDLE
        )
        low, high = made.seconds_range
        assert low < made.seconds < high
        return made.memory_bytes, made.seconds

    assert cost(large) > cost(small)
    assert cost(small, 1000) > cost(small)
    assert cost(small, method="rtn") == cost(small, 1000, method="rtn")
    assert cost(small, method="awq+gptq")[1] > cost(small)[1]
    assert cost(small, method="autoround")[1] > cost(small)[1]
    # The parts that the module's text names: the model, and the Hessians of one block.
    hessians = 4 * (6 * 1024**2 + 4096**2)
    memory = cost(large)[0] - cost(large, method="imatrix")[0]
    assert memory > hessians


def smol(path: Path) -> Checkpoint:
    """The shape of SmolLM2-135M, of which figures were recorded on two idle cores, with 100 conversations of
    6,774 tokens: docs/benchmarks/quantization.md."""
    return write_model(path, 576, 1536, 30, (9, 3), 49_152, tie_word_embeddings=True)


LENGTHS = (67,) * 26 + (68,) * 74
SHIPPED = (103,) * 91 + (104,) * 101
"""Those that ship with Tiercel, without answers: 19,877 tokens."""


@pytest.mark.parametrize(
    ("scheme", "method", "lengths", "seconds", "memory"),
    [
        ("w8a8", "rtn", LENGTHS, 15.7, 771e6),
        ("w8a8", "smooth+rtn", LENGTHS, 32.5, 985e6),
        ("w4a16-g64", "imatrix+gptq", LENGTHS, 51.1, 1004e6),
        ("w4a16-g32-asym", "smooth+imatrix+gptaq", SHIPPED, 254, 1426e6),
    ],
)
def test_estimates_of_variants_are_within_a_factor_of_two_of_what_was_recorded(
    tmp_path: Path, scheme: str, method: str, lengths: tuple[int, ...], seconds: float, memory: float
) -> None:
    checkpoint = smol(tmp_path)
    modules = read_modules(checkpoint)
    found = estimate(checkpoint, modules, uniform(modules, scheme, method=method), lengths, IDLE)
    assert seconds / 2 < found.seconds < 2 * seconds
    assert memory / 2 < found.memory_bytes + found.mapped_bytes < 2 * memory
    assert found.seconds_range[0] <= seconds <= found.seconds_range[1]


def test_the_estimate_of_a_plan_is_within_a_factor_of_two_of_what_was_recorded(tmp_path: Path) -> None:
    """Twelve plans at 5 bits from these schemes; the largest process was the engine."""
    checkpoint = smol(tmp_path)
    modules = read_modules(checkpoint)
    schemes = ("w4a16-g128", "w4a16-g64", "w4a16-g32", "w8a8")
    choices = choices_on(TARGETS["vllm-cpu-vnni"], modules, schemes, ("imatrix+gptq",))
    found = planning_cost(checkpoint, modules, choices, LENGTHS[:75], LENGTHS[:25], rates=IDLE)
    assert 242 / 2 < found.seconds < 2 * 242
    assert 2476e6 < found.memory_bytes + found.mapped_bytes < 2 * 2476e6


def test_tuning_is_told_as_long_as_it_was_recorded_to_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """120 steps took 22 minutes beside much else."""
    monkeypatch.setattr(session, "machine_rates", lambda: IDLE)
    found = [[1] * length for length in (154,) * 26 + (155,) * 46]
    described = Calibration(source="x", sha256="0" * 64, samples=len(found), tokens=sum(map(len, found)))
    planning = session.PlanningSession(
        tmp_path / "plans",
        smol(tmp_path / "model"),
        CalibrationSet(found, described),
        TARGETS["vllm-cpu-vnni"],
        choosing=[([1, 1], 1)],
    )
    memory, seconds = planning.tuning_cost(120)
    assert 22 * 60 / 1.6 < seconds < 22 * 60 * 1.6
    assert memory > sum(map(len, found)) * 4 * 49_152


def test_each_recipe_and_a_plan_are_told_with_how_it_is_known(tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path)
    text = format_check(report(checkpoint, calibration=[100] * 40))
    for words in (
        "w8a8 by smooth+rtn",
        "w4a16-g32-asym by smooth+imatrix+gptaq",
        "a plan, 12 tried on the engine",
        "40 conversations, 4,000 tokens (as given)",
        "2 cores, taken to be idle",
    ):
        assert words in text
    said = format_check(report(checkpoint, shipped=True))
    assert "256 conversations, at most 65,536 tokens (those of Tiercel, with the model's own answers" in said
    refused = format_check(report(checkpoint, "vllm-cpu-avx2"))
    assert "the int4 kernel is not in the engine's AVX2 build" in refused


def test_a_machine_that_others_use_is_measured_in_its_own_time() -> None:
    """Threads that take the cores meanwhile would halve a rate by the clock on the wall."""
    alone = matmul_rate.__wrapped__("float32", "cpu")
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * usable_cores())]
    try:
        beside = matmul_rate.__wrapped__("float32", "cpu")
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert beside > 0.6 * alone


def test_unknown_architecture_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path, architectures=["BertModel"])
    with pytest.raises(
        CheckpointError, match=r"BertModel: it is not known how an engine fuses .* known: .*LlamaForCausalLM"
    ):
        report(checkpoint)
    with pytest.raises(CheckpointError, match="none: it is not known how"):
        refuse_unfit(write_model(tmp_path, architectures=[]))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path, vocab_size=300)
    with pytest.raises(
        CheckpointError, match="largest id is 511, the model's vocab_size 300; put the model's"
    ):
        refuse_unfit(checkpoint)


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path, quantization_config={"quant_method": "compressed-tensors"})
    with pytest.raises(CheckpointError, match="quantized already; register it"):
        refuse_unfit(checkpoint)


def test_largest_token(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    assert largest_token(tmp_path) is None
    file.write_text(json.dumps({"model": {"vocab": [["a", 0.0], ["b", -1.0]]}}), encoding="utf-8")
    assert largest_token(tmp_path) == 1
    for damaged in ("{", "{}", '{"model": {"vocab": 3}}', "[]"):
        file.write_text(damaged, encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"is no tokenizer|is not valid JSON|holds no JSON object"):
            largest_token(tmp_path)


def test_too_little_room_is_said_before_work(tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path / "model")
    cost = rounded_cost(checkpoint)
    refuse_short(cost, tmp_path / "not made yet", memory_free=10**12, disk_free=10**12)
    with pytest.raises(CheckpointError, match="memory: calibration needs about"):
        refuse_short(cost, tmp_path, memory_free=10**6)
    with pytest.raises(CheckpointError, match="disk: a variant takes up to"):
        refuse_short(cost, tmp_path, memory_free=10**12, disk_free=10**3)


def test_an_added_token_beyond_the_vocabulary_counts_where_the_template_writes_it(tmp_path: Path) -> None:
    write_model(tmp_path)
    file = tmp_path / "tokenizer.json"
    tokens = json.loads(file.read_text(encoding="utf-8"))
    tokens["added_tokens"].append({"id": 512, "content": "<image_soft_token>"})
    file.write_text(json.dumps(tokens), encoding="utf-8")
    refuse_unfit(open_checkpoint(tmp_path))  # as Gemma 3 has it
    (tmp_path / "chat_template.jinja").write_text("<image_soft_token>{{ messages }}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="largest id is 512, the model's vocab_size 512"):
        refuse_unfit(open_checkpoint(tmp_path))


def test_disk_is_counted_for_all_copies(tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path / "model")
    cost = rounded_cost(checkpoint)
    room = 2 * cost.disk_bytes + 5
    refuse_short([cost, cost], tmp_path, memory_free=10**12, disk_free=room, more_bytes=5)
    with pytest.raises(CheckpointError, match="disk: 3 variants take up to"):
        refuse_short([cost, cost, cost], tmp_path, memory_free=10**12, disk_free=room)
    with pytest.raises(CheckpointError, match="disk: 2 variants and the reference take up to"):
        refuse_short([cost, cost], tmp_path, memory_free=10**12, disk_free=room, more_bytes=6)
    assert reference_bytes(checkpoint, tmp_path / "variants") == 0  # links
    assert reference_bytes(checkpoint, Path("/proc/1")) > 2 * 512 * 256


def test_a_path_that_the_engine_reads_as_a_pattern_is_refused(tmp_path: Path) -> None:
    refuse_pattern(tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"has \[ in its path, which vLLM reads as a pattern"):
        refuse_pattern(tmp_path / "a[b]")


def test_settings_of_a_quantizer_in_a_file_of_their_own_are_seen(tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path)
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": 64}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="quantized already; register it"):
        refuse_unfit(checkpoint)
