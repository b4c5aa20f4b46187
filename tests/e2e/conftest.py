"""A real stack for the end-to-end tests: `tiercel quantize`, then `tiercel up`, as a user runs them."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
import yaml

from deploy.assistant.prompts import SYSTEM_PROMPTS
from deploy.engine import free_port
from gateway.config import Config, ModelConfig, load_config
from quantize.card import Card, read_card, variant_directory

ROOT = Path(__file__).resolve().parents[2]
CLINC150 = ROOT.parent / "shared/data/clinc150.json"
INTENT_ITEMS = 300
RECORD_ITEMS = {"intent_classifier": 120, "specialist": 120, "summarizer": 60, "core": 30}
"""So many as the gates need: the specialist's limit is the strictest, and core takes 16 bits or nothing."""
LONG_ITEMS = 10
"""Of which each takes as long as many others, and no limit is on them."""
STOPPING = ("test_kept.py", "test_vectors.py", "test_watch.py")
"""Tests that read the stack's configuration, and stop it: they start engines of their own."""


def clinc150_items() -> list[dict[str, object]]:
    """A fixed sample of CLINC150's validation split as held-out items of the intent role."""
    pairs = json.loads(CLINC150.read_text(encoding="utf-8"))["val"]
    system = {"role": "system", "content": SYSTEM_PROMPTS["intent_classifier"]}
    return [
        {"messages": [system, {"role": "user", "content": text}], "expected": label, "max_tokens": 8}
        for text, label in random.Random(0).sample(pairs, INTENT_ITEMS)
    ]


def extraction_items() -> list[dict[str, object]]:
    """Answers in JSON, half of them guided by the engine: the model has never seen any, so the others are
    none."""
    schema = {
        "type": "object",
        "properties": {"intent": {"enum": ["bill_due", "balance", "weather"]}, "sure": {"type": "boolean"}},
        "required": ["intent", "sure"],
        "additionalProperties": False,
    }
    system = {"role": "system", "content": SYSTEM_PROMPTS["intent_classifier"]}
    texts = ("when is my bill due", "what is my balance", "will it rain in oslo", "how much do i have left")
    return [
        {
            "messages": [system, {"role": "user", "content": text}],
            "expected": '{"intent": "bill_due", "sure": true}',
            "check": "json",
            "json_schema": schema,
            "guided": guided,
            "max_tokens": 48,
        }
        for guided in (True, False)
        for text in texts
    ]


@dataclass(frozen=True)
class Stack:
    """A running stack, and what its model's cards say, by the variant's own name."""

    config: Config
    cards: dict[str, Card]
    log: Path

    @property
    def model(self) -> ModelConfig:
        return self.config.of("assistant")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.config.gateway.port}"


_running: list[Callable[[], None]] = []
"""How to stop the session's stack: for tests that start engines of their own, since three are the limit."""


def stop_stack() -> None:
    """Stop the session's stack, if it runs; tests that need it have been run before (:func:`_turn`)."""
    while _running:
        _running.pop()()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    mine = [item for item in items if item.path.is_relative_to(here)]
    others = [item for item in items if not item.path.is_relative_to(here)]
    items[:] = [*others, *sorted(mine, key=_turn)]


def _turn(item: pytest.Item) -> int:
    """Tests of the session's stack first, then those that stop it, of which some read its configuration."""
    if "stack" not in getattr(item, "fixturenames", ()):
        return 2
    return 1 if item.path.name in STOPPING else 0


@pytest.fixture(autouse=True)
def _no_more_than_three_engines(request: pytest.FixtureRequest) -> None:
    if "stack" not in request.fixturenames:
        stop_stack()


def shipped_items(name: str) -> list[str]:
    """Lines of one of the demo's files."""
    return (ROOT / f"deploy/assistant/data/{name}.jsonl").read_text(encoding="utf-8").splitlines()


def written(path: Path, lines: list[str]) -> str:
    """The name of a file with such lines, which is written."""
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path.name


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    directory = tmp_path_factory.mktemp("stack")
    settings = yaml.safe_load((ROOT / "tiercel.yaml").read_text(encoding="utf-8"))
    model = settings["models"]["assistant"]
    model["path"] = str(ROOT / "deploy/assistant/model")
    model["calibration"] = str(ROOT / "deploy/assistant/data/calibration.jsonl")
    # Made once per checkout: a variant is kept while everything that it is made from is the same.
    settings["variants_dir"] = str(ROOT / "var/e2e-variants")
    settings["gateway"] = {"port": free_port("127.0.0.1")}
    settings["engine"]["python"] = str(ROOT / ".venv-engine/bin/python")
    settings["engine"]["base_port"] = free_port("127.0.0.1", together=4)
    for role, count in RECORD_ITEMS.items():
        lines = shipped_items("core" if role == "specialist" else role)[:count]
        if role == "intent_classifier" and CLINC150.exists():
            lines = [json.dumps(item) for item in clinc150_items()]
        settings["roles"][role]["tasks"] = written(directory / f"{role}.jsonl", lines)
    settings["roles"]["core"]["long_context"] = written(
        directory / "long_context.jsonl", shipped_items("long_context")[:LONG_ITEMS]
    )
    for role in ("intent_classifier", "summarizer"):  # wide, so that every variant may be asked for by name
        settings["roles"][role]["budget"] = {"max_accuracy_drop": 0.2, "max_kl": 0.1}
    written(directory / "extractor.jsonl", [json.dumps(item) for item in extraction_items()])
    settings["roles"]["extractor"] = {"tasks": "extractor.jsonl"}
    path = directory / "tiercel.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    tiercel = [sys.executable, "-m", "deploy.cli"]
    subprocess.run([*tiercel, "quantize", "--config", str(path)], check=True, timeout=1200)
    config = load_config(path)
    cards = {
        name: read_card(variant_directory(config.of("assistant").variants_dir, name))
        for name in ("bf16", "int8", "int4", "int4-kv8")
    }
    log = directory / "up.log"
    with log.open("wb") as output:
        up = subprocess.Popen([*tiercel, "up", "--config", str(path)], stderr=output)

    def stop() -> None:
        up.send_signal(signal.SIGTERM)
        try:
            status = up.wait(timeout=90)
        except subprocess.TimeoutExpired:
            up.kill()
            raise
        assert status == 0, log.read_text(encoding="utf-8", errors="replace")

    _running.append(stop)
    try:
        deadline = time.monotonic() + 400
        while b"Tiercel is up" not in log.read_bytes():
            assert up.poll() is None, log.read_text(encoding="utf-8", errors="replace")
            assert time.monotonic() < deadline, log.read_text(encoding="utf-8", errors="replace")
            time.sleep(0.5)
        yield Stack(config, cards, log)
    finally:
        stop_stack()


@pytest.fixture
async def http() -> "Iterator[aiohttp.ClientSession]":
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        yield session
