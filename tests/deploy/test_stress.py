"""`tiercel quantize robustness` and `soak` on engines that are scripted: what is started, asked, kept "
"and said."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from aiohttp import web

import deploy.robustness as robustness_module
import deploy.soaking as soaking_module
from deploy.cli import main
from deploy.engine import EngineSpec
from deploy.models import one_model, registry_of
from deploy.placement import Machine
from deploy.robustness import format_robustness, measure_robustness
from deploy.soaking import format_soak, soak_variant
from gateway.config import ModelConfig, load_config
from quantize.card import Card
from quantize.core.checkpoint import open_checkpoint
from quantize.core.modules import read_modules
from quantize.core.plan import uniform
from quantize.evaluate.soak import Slope
from quantize.evaluate.tasks import TaskError
from tests.quantize.scripted_engine import ScriptedEngine
from tests.quantize.small import write_fleet


class Writing(ScriptedEngine):
    async def _completions(self, request: web.Request) -> web.Response:
        return web.json_response({"usage": {"completion_tokens": (await request.json())["max_tokens"]}})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_fleet(tmp_path)


@pytest.fixture
def model(path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    made = one_model(load_config(path))
    checkpoint, registry = open_checkpoint(made.path), registry_of(made)

    def make(out: Path) -> None:
        (out / "model.safetensors").write_bytes((made.path / "model.safetensors").read_bytes())
        (out / "config.json").write_text("{}", encoding="utf-8")

    registry.add(checkpoint, "int4", uniform(read_modules(checkpoint), "w4a16-g32"), None, make=make)
    registry.add_reference(checkpoint)
    monkeypatch.setattr(robustness_module, "look", lambda: Machine({0: (0, 1)}, 1 << 40))
    monkeypatch.setattr(robustness_module, "identity", lambda *_: {"engine": "vllm 1"})
    return made


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The variants whose engines were started. int4 answers rightly as long as nothing has changed."""
    order: list[str] = []

    def right(text: str) -> str:
        return "$5"

    def brittle(text: str) -> str:
        return "$5" if text.startswith("when is invoice ") and text.endswith(" due?") else "no"

    @asynccontextmanager
    async def variant_engine(model: ModelConfig, card: Card, say: object) -> AsyncIterator[EngineSpec]:
        order.append(card.variant)
        async with Writing(right if card.variant == "bf16" else brittle).serve() as url:
            parts = urlsplit(url)
            settings = model.engine.model_copy(update={"host": parts.hostname})
            directory = registry_of(model).path(card.variant, card.version)
            yield EngineSpec(card, directory, settings, parts.port or 0, model.log(card.variant))

    monkeypatch.setattr(robustness_module, "variant_engine", variant_engine)
    monkeypatch.setattr(soaking_module, "variant_engine", variant_engine)
    return order


def silent(_text: str) -> None:
    pass


async def test_reference_and_variant_are_asked_once_and_the_drop_is_told(
    model: ModelConfig, started: list[str]
) -> None:
    found = await measure_robustness(model, ["int4"], ["domain", "empty"], silent, count=10)
    assert started == ["bf16", "int4"]
    domain, empty = found.rows
    assert (domain.role, domain.kind, domain.items) == ("core", "domain", 10)
    assert (domain.plain, domain.more_lost) == (10, 1)
    assert (empty.more_lost, empty.answered) == (None, 10)
    text = format_robustness(found)
    assert "10 -> 0" in text
    assert "10 -> 10" in text
    assert "+100.0 points" in text
    again = await measure_robustness(model, ["int4"], ["domain", "empty"], silent, count=10)
    assert again == found
    assert started == ["bf16", "int4"]  # nothing was started for what is known
    await measure_robustness(model, ["int4"], ["domain", "empty"], silent, count=10, seed=1)
    assert started == ["bf16", "int4"] * 2


async def test_a_role_that_is_not_there_is_named(model: ModelConfig, started: list[str]) -> None:
    with pytest.raises(TaskError, match="--role nobody: no such role has items; there are core"):
        await measure_robustness(model, ["int4"], ["typos"], silent, roles=["nobody"])
    assert started == []


def test_on_the_command_line(
    path: Path, model: ModelConfig, started: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["quantize", "robustness", "--kinds", "typos", "--items", "4", "--json", "--config", str(path)])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["variant"], row["items"]) for row in rows] == [("int4", 4)]
    for words, said in (
        (["robustness", "--items", "0"], "--items 0"),
        (["robustness", "bf16"], "nothing but the reference"),
        (["soak", "int4", "--minutes", "0"], "--minutes 0"),
        (["soak", "int3"], "int3"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["quantize", *words, "--config", str(path)])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err


async def test_a_soak_asks_the_roles_items_and_says_what_it_saw(
    model: ModelConfig, started: list[str]
) -> None:
    found = await soak_variant(model, "int4", 0.001, silent)
    assert started == ["int4"]
    assert (found.variant, found.probes, found.rounds >= 3) == ("assistant:int4", 8, True)
    assert found.memory is None  # the engine is no process of its own here
    text = format_soak(found)
    assert "run for longer" in text
    assert text.endswith("nothing drifts")
    growing = Slope(per_hour=6e6, low=5e6, high=7e6, median=1e9, over_run=0.1)
    drifting = format_soak(found.model_copy(update={"memory": growing}))
    assert "memory: 1000 MB, +6 MB an hour (+5 to +7); grows by 10.0 % over the run" in drifting
    assert drifting.endswith("something drifts")
