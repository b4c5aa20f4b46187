"""Roles without tasks: the reference is asked once, and what it answers calibrates and judges."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import deploy.unlabelled as module
from deploy.engine import EngineSpec
from deploy.making import all_items, labelled_items, role_tasks
from deploy.measuring import say_hopeless
from deploy.models import one_model, registry_of
from deploy.placement import Gpu, Machine
from deploy.unlabelled import (
    ask_reference,
    calibrating,
    calibration_for,
    is_answered,
    judging,
    version_in_use,
)
from gateway.config import ConfigError, Conversations, ModelConfig, RoleSettings, load_config, parse_config
from quantize.core.checkpoint import open_checkpoint
from quantize.make.compress import QuantizeError
from tests.deploy.test_supervisor import ROOT
from tests.quantize.scripted_engine import ScriptedEngine
from tests.quantize.tiny import make_checkpoint

MACHINE = Machine({0: (0, 1)}, 1 << 40)
COUNT = 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=512)


@pytest.fixture
def model(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    monkeypatch.setattr(module, "look", lambda: MACHINE)
    monkeypatch.setattr(module, "identity", lambda *_: {"engine": "vllm 1"})
    path = tmp_path / "tiercel.yaml"
    path.write_text(
        f"""
models: {{tiny: {{path: {checkpoint}, serve: [bf16, int8]}}}}
variants_dir: variants
conversations: {{count: {COUNT}, max_tokens: 16}}
roles:
  default: {{}}
  auxiliary: {{budget: {{max_kl: 0.2}}}}
  longer: {{max_tokens: 24}}
  labelled: {{tasks: {ROOT}/deploy/assistant/data/intent_classifier.jsonl}}
default_role: default
""",
        encoding="utf-8",
    )
    return one_model(load_config(path))


@asynccontextmanager
async def reference(model: ModelConfig, engine: ScriptedEngine) -> AsyncIterator[dict[str, EngineSpec]]:
    """The reference's engine, running."""
    card = registry_of(model).add_reference(open_checkpoint(model.path))
    directory = registry_of(model).path("bf16", card.version)
    async with engine.serve() as url:
        port = urlsplit(url).port
        assert port is not None
        yield {card.id: EngineSpec(card, directory, model.engine, port, model.log("bf16"))}


def answer(text: str) -> str:
    return f"an answer to {len(text)} characters"


async def test_the_reference_is_asked_once_for_all_roles_that_ask_alike(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, said = ScriptedEngine(answer), list[str]()
    assert not is_answered(model)
    async with reference(model, engine) as engines:
        await ask_reference(model, said.append, engines, to_calibrate=True)
        # 20 calibrate; 20 judge default and auxiliary, and 20 with more tokens judge the third role.
        assert len(engine.asked) == 3 * COUNT // 2
        assert [text.split(" conversations to ")[0] for text in said] == ["the reference answers 20"] * 3
        assert is_answered(model)
        await ask_reference(model, said.append, engines, to_calibrate=True)
        assert len(engine.asked) == 3 * COUNT // 2

        # Another engine: what judges is asked anew, what calibrates is not.
        monkeypatch.setattr(module, "identity", lambda *_: {"engine": "vllm 2"})
        await ask_reference(model, said.append, engines, to_calibrate=True)
        assert len(engine.asked) == 5 * COUNT // 2


async def test_items_of_roles_without_tasks_are_its_answers(model: ModelConfig) -> None:
    without = replace(model, roles={"default": model.roles["default"]})
    with pytest.raises(QuantizeError, match="no role has items: the reference has answered nothing yet"):
        role_tasks(without)
    assert set(all_items(model)) == {"labelled"}
    async with reference(model, ScriptedEngine(answer)) as engines:
        await ask_reference(model, lambda _text: None, engines)
    tasks = role_tasks(model)
    assert set(tasks) == set(model.roles)
    assert tasks["default"] == tasks["auxiliary"] != tasks["longer"]
    assert {item.check for item in tasks["default"]} == {"reference"}
    assert {item.max_tokens for item in tasks["longer"] if item.json_schema} <= {72}
    assert tasks["labelled"] == labelled_items(model)["labelled"]


async def test_calibration_has_the_answers_as_soon_as_there_are_any(model: ModelConfig) -> None:
    opened = open_checkpoint(model.path)
    prompts = calibration_for(model, opened, version_in_use(model))
    assert prompts.description.source == "conversations of Tiercel, prompts alone"
    async with reference(model, ScriptedEngine(answer)) as engines:
        await ask_reference(model, lambda _text: None, engines, to_calibrate=True)
    answered = calibration_for(model, opened, version_in_use(model))
    assert answered.description.source == "conversations of Tiercel, answered by the reference"
    assert answered.description.samples == prompts.description.samples == COUNT // 2
    assert answered.description.tokens > prompts.description.tokens
    assert answered.description.sha256 != prompts.description.sha256
    own = replace(model, calibration=ROOT / "deploy/assistant/data/calibration.jsonl")
    assert calibration_for(own, opened, "").description.source == "calibration.jsonl"


async def test_questions_of_ones_own_calibration_file_are_answered(
    model: ModelConfig, tmp_path: Path
) -> None:
    """Lines that end with an answer stay as they are, and so does what is too long to be asked."""

    def line(*texts: str) -> str:
        roles = ("user", "assistant") * len(texts)
        said = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
        return json.dumps({"messages": said})

    whole = [line(f"question {number}", f"right {number}") for number in range(16)]
    asked = [line(f"question {number}") for number in range(16, 20)]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join([*whole, "", *asked, line("long " * 600)]), encoding="utf-8")
    own = replace(model, roles={}, calibration=path)
    opened, said = open_checkpoint(model.path), list[str]()
    before = calibration_for(own, opened, "")
    assert before.description.source == "own.jsonl"
    engine = ScriptedEngine(answer)
    async with reference(own, engine) as engines:
        await ask_reference(own, said.append, engines, to_calibrate=True)
        assert len(engine.asked) == 4
        assert said[-1].startswith(
            "the reference answers 4 conversations to calibrate with, 1 of all being too long"
        )
        assert is_answered(own)
        await ask_reference(own, said.append, engines, to_calibrate=True)
        assert len(engine.asked) == 4
    after = calibration_for(own, opened, version_in_use(own))
    assert after.description.source == "own.jsonl, questions answered by the reference"
    assert after.description.sha256 != before.description.sha256
    assert after.sequences[:16] == before.sequences[:16]
    assert after.sequences[-1] == before.sequences[-1]
    for mine, its in zip(after.sequences[16:20], before.sequences[16:20], strict=True):
        assert len(mine) > len(its)


async def test_where_all_is_labelled_and_calibrated_nothing_is_asked(model: ModelConfig) -> None:
    labelled = replace(
        model,
        roles={"labelled": model.roles["labelled"]},
        calibration=ROOT / "deploy/assistant/data/calibration.jsonl",
    )
    await ask_reference(labelled, lambda _text: None, to_calibrate=True)
    assert not registry_of(labelled).variants(), "not even the reference was needed"
    assert is_answered(replace(labelled, roles={})) is False, "which is not there"


def test_how_many_are_asked_depends_on_the_machine(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = replace(model, conversations=Conversations())
    on_cpu, to_calibrate = judging(free, ""), calibrating(free, "")
    assert (len(on_cpu.conversations), on_cpu.asking.max_tokens) == (module.CPU_JUDGING, module.CPU_TOKENS)
    assert to_calibrate is not None
    assert len(to_calibrate.conversations) == module.CPU_CALIBRATING
    fifty = replace(model, conversations=Conversations(count=50))
    both = judging(fifty, ""), calibrating(fifty, "")
    assert [len(asked.conversations) for asked in both if asked is not None] == [25, 25]
    gpu = Machine({0: (0, 1)}, 1 << 40, (Gpu(0, "some", 1 << 36, 1 << 36),), "1")
    monkeypatch.setattr(module, "look", lambda: gpu)
    on_gpu = judging(free, "")
    assert on_gpu.asking.max_tokens == module.GPU_TOKENS
    assert len(on_gpu.conversations) > len(on_cpu.conversations)
    assert on_cpu.left_out < on_gpu.left_out < 505, "longer answers leave a small context less room"
    shorter = replace(model, engine=model.engine.model_copy(update={"max_model_len": 128}))
    assert judging(shorter, "").left_out > judging(model, "").left_out


def test_a_role_says_how_it_is_asked(model: ModelConfig) -> None:
    role = RoleSettings(max_tokens=7, chat_template_kwargs={"enable_thinking": True})
    asking = judging(model, "", role).asking
    assert (asking.max_tokens, asking.template) == (7, {"enable_thinking": True})
    assert judging(model, "").asking.template == {}


def test_too_few_conversations_are_said_before_work(model: ModelConfig) -> None:
    said: list[str] = []
    say_hopeless(replace(model, roles={"default": model.roles["default"]}), 2, said.append)
    assert said == [
        "no variant can pass for default: min_first_choice_agreement: faultless answers to 20 conversations "
        "do not pass among 2 gates; at least 34 are needed"
    ]


def test_a_role_whose_models_have_no_items_in_common_is_said_before_work(model: ModelConfig) -> None:
    said: list[str] = []
    shared = RoleSettings(models=("other", model.name))
    say_hopeless(replace(model, roles={"shared": shared}), 1, said.append)
    assert said[-1] == (
        f"nothing of {model.name} can pass for shared: models are compared by right answers to the same "
        "items, and it and other have none in common; set roles.shared.tasks"
    )


def test_no_conversations_at_all_are_refused() -> None:
    text = "models: {a: {path: /a, serve: [bf16]}}\nvariants_dir: v\nroles: {r: {}}\ndefault_role: r\n"
    with pytest.raises(ConfigError, match=r"conversations.count: .* greater than or equal to 2, got 0"):
        parse_config(text + "conversations: {count: 0}\n", "x", Path("/"))
