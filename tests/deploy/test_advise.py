"""Advice for every situation: a technique, a reason in words, and a command that the command line takes."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from deploy.advice.advise import Advice, advise, mixed
from deploy.advice.facts import GGUF_BITS, Facts, Wish
from deploy.advice.hardware import (
    GPUS,
    Hardware,
    described_cpu,
    described_edge,
    described_gpus,
)
from deploy.advice.measured import FINDINGS
from deploy.advice.rules import DEPLOY, EDGE, FINETUNE, Technique
from deploy.advice.show import advice_page, format_advice
from deploy.advice.steps import Asked, smaller_size
from deploy.cli import main, parsed, parser
from quantize.core.shape import (
    LLAMAS,
    Shape,
    ShapeError,
    parameters_of,
    shape_of_config,
    shape_of_parameters,
)
from quantize.core.targets import TargetError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gateway"))

from gateway_stack import settings, write_variants

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "deploy" / "assistant" / "model"
GB = 1e9
HARDWARE = {
    **{text: described_gpus(text) for text in ("8GB", "24GB", "H100", "4xH100", "A100", "RTX5090")},
    "cpu": described_cpu("16GB", "vllm-cpu-vnni"),
    "avx2": described_cpu("16GB", "vllm-cpu-avx2"),
    "edge": described_edge("8GB"),
    "phone": described_edge("2GB"),
}
LEARN = {"goal": "finetune"}
TRAINED = {"none": None, "H100": HARDWARE["H100"], "4xH200": described_gpus("4xH200")}


def facts(parameters: str, hardware: str, **wish: Any) -> Facts:
    asked = {"goal": "deploy", "loss": 2.0, "context": 4096, "concurrency": 8, **wish}
    return Facts(shape_of_parameters(parameters_of(parameters)), HARDWARE[hardware], Wish(**asked))


def technique(found: Advice) -> list[str]:
    return [one.technique for one in found.choices]


KNOWN = next(a.choices for a in parser()._actions if isinstance(a, argparse._SubParsersAction)) or {}


def refuse_unknown(command: str) -> None:
    """Let the real parser read it."""
    words = shlex.split(command)
    assert words[0] == "tiercel"
    parsed(words[1:])


EVERY = list(
    itertools.product(
        ("360M", "7B", "13B", "34B"),
        HARDWARE,
        ("deploy", "finetune"),
        (0.0, 1.0, 2.0, 10.0),
        ((2048, 1), (4096, 16)),
        TRAINED,
    )
)
SITUATIONS = random.Random(4).sample(EVERY, 100)


def test_every_situation_gives_a_command_that_can_be_typed() -> None:
    commands, seen = set(), set()
    for parameters, hardware, goal, loss, (context, concurrency), trained in SITUATIONS:
        asked = {"goal": goal, "loss": loss, "context": context, "concurrency": concurrency}
        situation = facts(parameters, hardware, **asked, training=TRAINED[trained])
        found = advise(situation, Asked("my model", configured=loss == 1.0))
        assert found.choices, (parameters, hardware, asked)
        for choice in found.choices:
            seen.add(choice.rule)
            assert choice.commands
            assert "{" not in choice.why
            commands.update(choice.commands)
        assert not set(technique(found)) & found.against.keys()
        assert all("{" not in why for why in found.against.values())
    for command in commands:
        refuse_unknown(command)
    assert len(commands) > 40
    assert len(seen) > 10


def test_a_smaller_model_that_is_advised_is_one_that_fits() -> None:
    for hardware in ("8GB", "24GB", "cpu", "edge"):
        found = advise(facts("70B", hardware))
        assert technique(found) == [Technique.SMALLER]
        (command,) = found.choices[0].commands
        options = parsed(shlex.split(command)[1:])
        assert options.parameters == smaller_size(facts("70B", hardware))
        again = advise(facts(options.parameters, hardware))
        assert Technique.SMALLER not in technique(again)


def test_what_fits_is_what_placement_says() -> None:
    found = advise(facts("70B", "4xH100"))
    row = next(row for row in found.serving if row.weights.startswith("16 bits") and row.kv == "16 bits")
    assert (row.gpus, row.replicas, row.problem) == (2, 2, "")
    (kept,) = (
        row
        for row in advise(facts("70B", "24GB")).serving
        if row.weights.startswith("16") and row.kv == "fp8"
    )
    assert "GiB" in kept.problem


@pytest.mark.parametrize(
    ("parameters", "hardware", "wish", "wanted"),
    [
        ("7B", "H100", {"loss": 0.1}, ["16 bits"]),
        ("8B", "24GB", {"loss": 2.0}, ["PTQ, 8 bits"]),
        ("8B", "24GB", {"loss": 10.0, "concurrency": 1}, ["PTQ, 4 bits"]),
        ("7B", "24GB", {"loss": 2.0}, ["PTQ, 8 bits, and KV quantization"]),
        ("32B", "24GB", {"concurrency": 1}, ["mixed plan"]),
        ("32B", "24GB", {"concurrency": 8, "loss": 1.0}, ["mixed plan and KV quantization"]),
        ("13B", "24GB", {"concurrency": 1, "loss": 0.2}, ["PTQ, 8 bits"]),
        ("70B", "24GB", {}, ["smaller model"]),
        ("70B", "24GB", {"training": HARDWARE["H100"]}, ["distillation"]),
        ("7B", "edge", {"concurrency": 1}, ["GGUF"]),
        ("7B", "phone", {"concurrency": 1}, ["smaller model"]),
        ("8B", "A100", {**LEARN, "training": HARDWARE["A100"]}, ["LoRA", "PTQ, 8 bits"]),
        ("13B", "24GB", {**LEARN, "training": HARDWARE["24GB"], "concurrency": 1}, ["QLoRA", "PTQ, 8 bits"]),
        ("1B", "H100", {**LEARN, "training": HARDWARE["H100"], "loss": 0.1}, ["full fine-tuning", "16 bits"]),
        ("70B", "24GB", {**LEARN, "training": HARDWARE["24GB"]}, ["smaller model"]),
    ],
)  # fmt: skip
def test_what_is_advised(parameters: str, hardware: str, wish: dict[str, Any], wanted: list[str]) -> None:
    assert technique(advise(facts(parameters, hardware, **wish))) == wanted


EXPERTS = shape_of_config(
    {
        **dict.fromkeys(("hidden_size", "max_position_embeddings"), 2048),
        **dict.fromkeys(("num_attention_heads", "num_experts"), 16),
        "num_hidden_layers": 8,
        "vocab_size": 32000,
        "intermediate_size": 768,
    },
    "experts",
)


def test_every_rule_is_reached() -> None:
    here = HARDWARE["24GB"]
    reached = [
        facts("8B", "edge", concurrency=1),
        facts("1B", "edge", concurrency=1),
        facts("13B", "edge", concurrency=1, context=1024, loss=10.0),
        facts("70B", "edge"),
        facts("1B", "24GB", loss=0.1),
        facts("7B", "24GB", loss=0.1),
        facts("8B", "24GB", loss=10.0, concurrency=1),
        facts("8B", "24GB"),
        facts("7B", "24GB"),
        facts("3B", "8GB", loss=1.0, context=2048, training=TRAINED["H100"], concurrency=32),
        facts("32B", "24GB", concurrency=1),
        facts("34B", "24GB", concurrency=3, loss=10.0, context=2048),
        facts("32B", "24GB", concurrency=8, loss=1.0),
        facts("34B", "24GB", concurrency=4, loss=10.0),
        Facts(EXPERTS, HARDWARE["cpu"], Wish("deploy", 2.0, 1024, 1)),
        Facts(EXPERTS, HARDWARE["cpu"], Wish("deploy", 2.0, 2048, 100)),
        Facts(EXPERTS, here, Wish("finetune", 2.0, 1024, 1, here)),
        facts("70B", "24GB", training=HARDWARE["24GB"]),
        facts("70B", "24GB"),
        facts("1B", "H100", **LEARN, loss=0.1, training=HARDWARE["H100"]),
        facts("7B", "24GB", **LEARN, training=here),
        facts("13B", "24GB", **LEARN, training=here, concurrency=1),
        facts("70B", "24GB", **LEARN, training=here),
    ]
    seen = {choice.rule for one in reached for choice in advise(one).choices}
    assert seen == {rule.name for rule in (*EDGE, *DEPLOY, *FINETUNE)}


def test_training_wins_back_what_less_than_eight_bits_lose() -> None:
    found = advise(facts("3B", "8GB", loss=1.0, context=2048, training=TRAINED["H100"], concurrency=32))
    assert technique(found) == [Technique.QAT]
    assert any(command.startswith("tiercel train qat") for command in found.choices[0].commands)


def test_int8_weights_are_not_advised_where_the_target_has_none() -> None:
    found = advise(facts("8B", "RTX5090"))
    assert found.choices[0].commands[1].startswith("tiercel quantize fp8 ")
    assert "int8" not in " ".join(found.choices[0].commands)


def test_a_plan_is_asked_for_with_the_bytes_that_there_are() -> None:
    situation = facts("32B", "24GB", concurrency=8, loss=1.0)
    (command,) = (one for one in advise(situation).choices[0].commands if " plan " in one)
    options = parsed(shlex.split(command)[1:])
    assert options.kv == ["fp8"]
    assert (options.concurrency, options.context) == (8, 4096)
    assert options.bytes + 1.5 * 2**30 < situation.hardware.memory


def test_llama_7b_in_mixed_precision_takes_4_5_gb_by_textbooks_and_more_as_an_engine_stores_it() -> None:
    shape: Shape = LLAMAS["Llama 7B"].shape("Llama 7B")
    situation = Facts(shape, HARDWARE["24GB"], Wish("deploy", 2.0, 2048, 1))
    plan = mixed(situation)
    eights = sum(group.weights for group in shape.modules if plan.groups[group.name] == "w8a8")
    assert (eights + (shape.parameters - eights) / 2) / GB == pytest.approx(4.5, abs=0.1)
    # Embeddings and head stay at 16 bits, and 4-bit weights have scales.
    assert plan.weight_bytes(shape.modules) / GB == pytest.approx(4.93, abs=0.05)
    bits = situation.bits_within(round(4.5 * GB))
    assert bits == pytest.approx(4.9, abs=0.051)  # what a plan of 4.5 GB is asked for with


def test_the_tables_have_every_precision_and_every_way_to_train() -> None:
    found = advise(facts("7B", "24GB", goal="finetune", training=HARDWARE["24GB"]))
    nominal = {row.bits: row.bytes / GB for row in found.weights if not row.stored}
    assert nominal[16] == pytest.approx(14, rel=0.01)
    assert {row.kv for row in found.kv} >= {"16 bits", "fp8", "int8_per_token_head", "int4_per_token_head"}
    ways = {row.way: row for row in found.training}
    assert ways["QLoRA"].fits
    assert not ways["full"].fits
    assert ways["QLoRA"].bytes / GB == pytest.approx(10, abs=1)
    assert ways["full, adamw-8bit"].bytes / GB == pytest.approx(50, abs=4)
    for row in found.training:
        parts = (row.weights, row.gradients, row.optimizer, row.activations, row.overhead)
        assert row.bytes == sum(parts)


def test_every_measured_figure_stands_in_its_document() -> None:
    for finding in FINDINGS:
        text = re.sub(r"\s+", " ", (ROOT / finding.document).read_text(encoding="utf-8"))
        for figure in finding.figures:
            assert figure in text, f"{finding.name}: {finding.document} does not say {figure}"


def test_hardware_in_words() -> None:
    assert len(described_gpus("4xH100").machine.gpus) == 4
    assert described_gpus("h100").target is described_gpus("H100-80GB").target
    assert described_gpus("2x24GB").memory == 2 * 24 * 2**30
    assert "assumed" in described_gpus("24GB").note
    assert described_gpus("24GB", "vllm-cuda-ampere").note == ""
    assert all(described_gpus(name).target for name in GPUS)
    for wrong in ("", "0xH100", "H999", "100xH100", "0.1GB", "-24GB"):
        with pytest.raises(ShapeError, match="--gpu"):
            described_gpus(wrong)
    with pytest.raises(TargetError, match="no target of --gpu"):
        described_gpus("24GB", "vllm-cpu-amx")
    with pytest.raises(ShapeError, match="--cpu"):
        described_cpu("much")
    with pytest.raises(ShapeError, match="--edge"):
        described_edge("0GB")


def test_everything_that_failed_its_gates_is_left_out() -> None:
    fine = facts("8B", "24GB", loss=10.0, concurrency=1)
    failed = Facts(fine.shape, fine.hardware, fine.wish, failed=frozenset({4}))
    assert technique(advise(fine)) == [Technique.PTQ4]
    assert technique(advise(failed)) == [Technique.PTQ8]
    proven = Facts(fine.shape, fine.hardware, fine.wish, proven=frozenset({4}))
    assert advise(proven, Asked("m", configured=True)).choices[0].commands == ("tiercel up",)


def test_what_cards_of_this_machine_say_is_shown_and_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_variants(tmp_path / "variants")
    models = {"assistant": {"path": str(MODEL), "serve": ["bf16", "int4"]}}
    path = tmp_path / "tiercel.yaml"
    path.write_text(settings(tmp_path / "variants", {}, models=models))
    here = dataclasses.replace(HARDWARE["cpu"], here=True)
    monkeypatch.setattr("deploy.advice.hardware.this_machine", lambda _target: here)
    main(["advise", "--config", str(path), "--json"])
    found = Advice.model_validate_json(capsys.readouterr().out)
    assert found.model == str(MODEL)
    assert any(text.startswith("assistant:int8: KL 0.001, passes for no role") for text in found.cards)
    assert not any("init" in command for choice in found.choices for command in choice.commands)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, config = tmp_path / "advice.html", tmp_path / "none.yaml"
    main(["advise", str(MODEL), "--gpu", "24GB", "--config", str(config), "--json", "--out", str(page)])
    found = Advice.model_validate_json(capsys.readouterr().out)
    assert found.parameters == pytest.approx(4.19e6, rel=0.01)
    assert found.choices[0].commands[0] == f"tiercel init {MODEL}"
    text = page.read_text(encoding="utf-8")
    assert "<svg" in text
    assert "<script" not in text
    main(["advise", str(MODEL / "config.json"), "--edge", "4GB", "--config", str(config)])
    out = capsys.readouterr().out
    assert "tiercel export gguf" in out
    assert "█" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "which model"),
        (["--parameters", "many"], "--parameters many"),
        (["here", "--parameters", "7B"], "two models"),
        (["./nowhere"], "no such directory"),
        (["--parameters", "7B", "--gpu", "H7"], "H7 is not known"),
        (["--parameters", "7B", "--loss", "-1"], "--loss -1"),
        (["--parameters", "7B", "--loss", "nan"], "--loss nan"),
        (["--parameters", "7B", "--context", "99999999"], "--context 99999999"),
        (["--parameters", "7B", "--concurrency", "0"], "--concurrency 0"),
        (["--parameters", "7B", "--gpu", "24GB", "--target", "vllm-cpu-amx"], "no target of --gpu"),
    ],
)
def test_what_cannot_be_advised_on_is_said_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["advise", *words, "--config", str(tmp_path / "none.yaml")])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_text_and_page_say_the_same() -> None:
    found = advise(facts("13B", "24GB", loss=1.0))
    text, page = format_advice(found), advice_page(found)
    for choice in found.choices:
        for command in choice.commands:
            assert command in text
            assert command in page
    assert json.loads(found.model_dump_json())["hardware"] == "one GPU, 24GB"
    assert all(kind in format_advice(advise(facts("7B", "edge", concurrency=1))) for kind in GGUF_BITS)


def test_hardware_is_a_value() -> None:
    assert isinstance(HARDWARE["24GB"], Hardware)


def refuse_no_command(words: Sequence[str]) -> None:
    """Let each word lead on to the next, as far as they are names of commands."""
    above: Any = KNOWN
    for word in words:
        if not above or not word.islower() or not word.isalpha():
            return
        assert word in above, f"{' '.join(words)}: no such command"
        below = above[word]._actions
        above = next((a.choices for a in below if isinstance(a, argparse._SubParsersAction)), None)


@pytest.mark.parametrize("page", ["advice.md", "techniques.md"])
def test_what_the_page_says_to_type_can_be_typed(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    lines = [line.partition("#")[0].strip() for line in text.splitlines() if line.startswith("tiercel ")]
    inline = re.findall(r"`(tiercel [^`…]+)`", text)
    assert len(lines) + len(inline) > 5
    for command in [*lines, *(one for one in inline if " --" in one and "MODEL" not in one)]:
        refuse_unknown(command)
    for command in inline:
        refuse_no_command(command.split()[1:])


LLAMA_1B = {"architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "num_attention_heads": 32,
            "num_key_value_heads": 8, "num_hidden_layers": 16, "vocab_size": 128256,
            "intermediate_size": 8192}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "more", "said"),
    [
        ({"architectures": ["DeepseekV3ForCausalLM"], "kv_lora_rank": 512}, [], "(MLA)"),
        ({"architectures": ["FalconForCausalLM"]}, [], "not known how an engine fuses"),
        ({"architectures": ["BertModel"], "model_type": "bert"}, [], "is an encoder"),
        ({"architectures": ["Phi3ForCausalLM"]}, ["--edge", "8GB"], "not exported to GGUF"),
        ({"n_shared_experts": 1}, [], "n_shared_experts, which no Llama-like model has"),
        ({"hidden_size": 0}, [], "hidden_size is 0"),
        ({"num_key_value_heads": "8"}, [], "num_key_value_heads is '8'"),
        ({"num_hidden_layers": -2}, [], "num_hidden_layers is -2"),
    ],
)
def test_a_configuration_that_says_no_sizes_or_gets_no_commands_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], more: list[str], said: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_1B | changes), encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["advise", str(path), *(more or ["--gpu", "24GB"]), "--config", str(tmp_path / "none.yaml")])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("architecture", "parameters"),
    [("LlamaForCausalLM", 1_498_482_688), ("Gemma2ForCausalLM", 1_235_814_400)],
)
def test_embeddings_are_counted_once_where_the_architecture_ties_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], architecture: str, parameters: int
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_1B | {"architectures": [architecture]}), encoding="utf-8")
    main(["advise", str(path), "--gpu", "24GB", "--json", "--config", str(tmp_path / "none.yaml")])
    assert json.loads(capsys.readouterr().out)["parameters"] == parameters
