"""A variant that its engine cannot load is marked broken with the engine's words, and is never served."""

import shutil
import stat
from pathlib import Path

import pytest

from deploy.engine import EngineSpec, free_port, running
from deploy.engine_failures import EngineLoadError
from deploy.engine_log import reason
from deploy.fleet.engines import engine_specs
from deploy.measuring import unless_broken
from deploy.models import registry_of
from gateway.cards import load_cards
from gateway.config import Config, load_config
from quantize.card import Card, CardError
from quantize.core.checkpoint import open_checkpoint
from quantize.core.modules import read_modules
from quantize.core.plan import uniform
from tests.quantize.small import write_base

WORDS = "ValueError: The output_size 48 is not divisible by 32"
ENGINE = f"""#!/bin/sh
echo "(Worker pid=12) ERROR 11-21 core.py: {WORDS}"
echo "(Worker pid=12) exiting"
exit 1
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    write_base(tmp_path / "model")
    engine = tmp_path / "python"
    engine.write_text(ENGINE, encoding="utf-8")
    engine.chmod(engine.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "core.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "what is due"}], "expected": "$5"}\n', encoding="utf-8"
    )
    path = tmp_path / "tiercel.yaml"
    path.write_text(
        f"""
models: {{assistant: {{path: {tmp_path}/model, serve: [bf16, int4]}}}}
variants_dir: variants
roles: {{core: {{tasks: core.jsonl}}}}
default_role: core
engine: {{python: {engine}, start_timeout_s: 30, stop_timeout_s: 5}}
""",
        encoding="utf-8",
    )
    return load_config(path)


@pytest.fixture
def cards(config: Config) -> list[Card]:
    model = config.of("assistant")
    checkpoint, registry = open_checkpoint(model.path), registry_of(model)

    def make(out: Path) -> None:
        shutil.copyfile(model.path / "model.safetensors", out / "model.safetensors")

    plan = uniform(read_modules(checkpoint), "w4a16-g32")
    return [registry.add_reference(checkpoint), registry.add(checkpoint, "int4", plan, None, make=make)]


async def serve(config: Config, card: Card) -> str:
    """Start the variant's engine, as an evaluation does."""
    spec = EngineSpec(
        card=card,
        directory=config.variants_dir / "assistant" / card.variant / card.version,
        settings=config.engine,
        port=free_port("127.0.0.1"),
        log=config.variants_dir / ".logs" / "engine.log",
    )
    async with running(spec, lambda _: None):
        return "served"


async def test_it_is_marked_and_neither_served_nor_routed_to(config: Config, cards: list[Card]) -> None:
    registry = registry_of(config.of("assistant"))
    said: list[str] = []
    assert await unless_broken(registry, cards[1], serve(config, cards[1]), said.append) is None
    broken = registry.card("int4")
    assert (broken.state, broken.engine_words) == ("broken", WORDS)
    assert said == [f"int4 {broken.version} is broken, the engine cannot load it: {WORDS}"]
    for use in (engine_specs, load_cards):
        with pytest.raises(CardError, match=r"int4 .* is broken: .*output_size 48.* take it out of serve"):
            use(config)


async def test_a_reference_that_does_not_load_stops_everything(config: Config, cards: list[Card]) -> None:
    registry = registry_of(config.of("assistant"))
    with pytest.raises(EngineLoadError, match="ended with status 1"):
        await unless_broken(registry, cards[0], serve(config, cards[0]), lambda _: None)
    assert registry.card("bf16").state == "ready"


def test_the_line_that_says_why_is_found() -> None:
    assert reason(f"INFO ok\nKeyError: 'x'\n  File a.py\n(EngineCore) {WORDS}\nbye\n") == WORDS
    assert reason("Segmentation fault\n\n") == "Segmentation fault"
    assert reason("") == "it said nothing"
