"""What `tiercel quantize` decides before it starts engines."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from deploy.demo import with_what_was_made
from deploy.making import make_one, make_plans, make_variants, role_tasks
from deploy.measuring import Turns, answering_at_once, speed_or_none
from deploy.models import one_model, registry_of
from deploy.placement import Machine
from gateway.config import Config, ModelConfig, load_config
from quantize.card import Card
from quantize.core.checkpoint import open_checkpoint
from quantize.core.modules import read_modules
from quantize.core.plan import Plan, uniform
from quantize.core.targets import target
from quantize.evaluate.client import EngineClient
from quantize.make.compress import QuantizeError
from quantize.registry import Registry
from tests.deploy.test_supervisor import ROOT


@pytest.mark.parametrize(
    ("threads", "cores", "at_once"),
    [
        ("1", 2, 2),
        ("1", 16, 2),
        ("2", 2, 1),
        ("8", 4, 1),
        (None, 2, 2),
        (None, 1, 1),
        ("many", 8, 1),
        ("0", 8, 1),
    ],
)
def test_engines_answer_side_by_side_only_with_threads_of_their_own(
    threads: str | None, cores: int, at_once: int
) -> None:
    model = one_model(load_config(ROOT / "tiercel.yaml"))
    env = {} if threads is None else {"OMP_NUM_THREADS": threads}
    model = replace(model, engine=model.engine.model_copy(update={"env": env}))
    assert answering_at_once(model, Machine({0: tuple(range(cores))}, 1 << 40)) == at_once


@pytest.fixture
def config(tmp_path: Path) -> Config:
    path = tmp_path / "tiercel.yaml"
    path.write_text(
        f"""
models: {{assistant: {{path: {ROOT}/deploy/assistant/model, serve: [bf16, int8, int4]}}}}
variants_dir: variants
roles: {{core: {{}}}}
default_role: core
""",
        encoding="utf-8",
    )
    return load_config(path)


@pytest.fixture
def model(config: Config) -> ModelConfig:
    return one_model(config)


def plans_of(model: ModelConfig) -> dict[str, Plan]:
    modules = read_modules(open_checkpoint(model.path))
    return {
        "int8": uniform(modules, "w8a8-r7", method="rtn"),
        "int4": uniform(modules, "w4a16-g32", method="rtn"),
    }


def test_what_the_target_refuses_is_left_out_and_the_rest_is_made(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def add(self: Registry, checkpoint: object, variant: str, *_: object, **__: object) -> Card:
        made.append(variant)
        return self.card("bf16").model_copy(update={"variant": variant})

    monkeypatch.setattr(Registry, "add", add)
    said: list[str] = []
    looked: list[int] = []
    plans = plans_of(model)
    avx2 = target("vllm-cpu-avx2")
    cards = make_plans(model, plans, avx2, said.append, lambda _: looked.append(len(made)))
    assert [card.variant for card in cards] == ["bf16", "int8"]
    assert made == ["int8"]
    assert looked == [0]  # before any work
    assert said[0].startswith("int4 is left out, vllm-cpu-avx2 does not serve it: model.layers.0.")
    with pytest.raises(QuantizeError, match=r"^int4: model\.layers\.0\."):
        make_plans(model, {"int4": plans["int4"]}, avx2, said.append)


def test_the_reference_answers_only_what_calibrates_something(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.making.calibration_for", lambda *_: None)
    monkeypatch.setattr(Registry, "add", lambda self, *_, **__: self.card("bf16"))
    asked: list[bool] = []
    for variants in (["bf16"], ["bf16", "int4"]):
        make_variants(model, variants, lambda _: None, "vllm-cpu-vnni", asked.append)
    for method in ("rtn", "gptq"):
        make_one(model, None, "w4a16-g64", method, "auto", lambda _: None, "vllm-cpu-vnni", asked.append)
    assert asked == [False, True, False, True]


def test_eight_bits_are_smoothed(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}

    def plans(_model: ModelConfig, plans: dict[str, Plan], *_: object, **__: object) -> list[Card]:
        seen.update({name: plan.method for name, plan in plans.items()})
        return []

    monkeypatch.setattr("deploy.making.make_plans", plans)
    make_variants(model, ["bf16", "int8", "int4"], lambda _: None, "vllm-cpu-vnni")
    assert seen == {"int8": "smooth+rtn", "int4": "smooth+imatrix+gptaq"}


def test_the_demo_goes_on_with_what_was_made(config: Config, model: ModelConfig, tmp_path: Path) -> None:
    bf16 = registry_of(model).add_reference(open_checkpoint(model.path))
    cards = [bf16, bf16.model_copy(update={"variant": "int8"})]
    said: list[str] = []
    path = tmp_path / "tiercel.yaml"
    narrowed, read_from = with_what_was_made(config, path, cards, said.append)
    assert said == ["going on without int4"]
    assert narrowed.served == ("assistant:bf16", "assistant:int8")
    assert (one_model(narrowed).path, narrowed.variants_dir) == (model.path, config.variants_dir)
    assert load_config(read_from) == narrowed
    everything = [*cards, bf16.model_copy(update={"variant": "int4"})]
    assert with_what_was_made(config, path, everything, said.append) == (config, path)


def test_items_take_what_their_role_sets(model: ModelConfig, tmp_path: Path) -> None:
    lines = [
        '{"messages": [{"role": "user", "content": "a"}], "expected": "b"}',
        '{"messages": [{"role": "user", "content": "c"}], "expected": "b", "max_tokens": 9}',
    ]
    (tmp_path / "core.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    role = model.roles["core"].model_copy(
        update={
            "tasks": tmp_path / "core.jsonl",
            "max_tokens": 2000,
            "chat_template_kwargs": {"enable_thinking": False},
        }
    )
    long, short = role_tasks(replace(model, roles={"core": role}))["core"]
    assert (long.max_tokens, short.max_tokens) == (2000, 9)
    assert long.chat_template_kwargs == short.chat_template_kwargs == {"enable_thinking": False}


async def test_an_engine_is_timed_while_no_other_answers() -> None:
    turns = Turns(2)
    now = {"beside": 0, "alone": 0}
    most = 0

    async def engine() -> None:
        nonlocal most
        async with turns.one():
            now["beside"] += 1
            most = max(most, now["beside"])
            assert not now["alone"]
            await asyncio.sleep(0.01)
            now["beside"] -= 1
        async with turns.alone():
            now["alone"] += 1
            assert now == {"beside": 0, "alone": 1}
            await asyncio.sleep(0.01)
            now["alone"] -= 1

    async with asyncio.timeout(60):
        await asyncio.gather(*(engine() for _ in range(6)))
    assert most == 2


async def test_an_engine_that_cannot_be_timed_stops_nothing() -> None:
    said: list[str] = []
    async with (
        TestServer(web.Application()) as server,
        EngineClient(str(server.make_url("")).rstrip("/"), "m") as client,
    ):
        card = Card.model_construct(variant="int8", target=None)
        assert await speed_or_none(client, card, 1024, said.append) is None
    assert "int8: its speed was not measured" in said[0]
    assert "answered 404" in said[0]


async def test_who_gives_up_waiting_to_be_alone_blocks_nobody() -> None:
    turns = Turns(2)

    async def alone() -> None:
        async with turns.alone():
            pass

    async with asyncio.timeout(60):
        async with turns.one():
            waiting = asyncio.create_task(alone())
            await asyncio.sleep(0.01)
            waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await alone()
        async with turns.one(), turns.one():
            pass
