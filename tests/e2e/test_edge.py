"""Engines other than vLLM as ``tiercel`` starts them, beside vLLM's and in its place: llama.cpp's and
classifiers', measured, judged, served behind the gateway."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from deploy.assistant.prompts import SYSTEM_PROMPTS
from deploy.engine import EngineSpec, free_port, running
from deploy.engine_account import checked_account
from deploy.evaluation import evaluate_models
from deploy.models import registry_of
from deploy.supervisor import Stack
from gateway.config import Engine as EngineSettings
from gateway.config import load_config
from quantize.card import Card, read_card
from quantize.core.checkpoint import open_checkpoint
from quantize.evaluate.client import EngineClient
from quantize.evaluate.tasks import read_items
from quantize.export.classifier import train_classifier
from quantize.export.encoder import DYNAMIC, FLOAT, open_encoder
from quantize.export.encoder_variant import add_classifier
from quantize.export.variant import add_gguf
from quantize.registry import Registry
from tests.e2e.conftest import ROOT
from tests.e2e.test_stack import metric
from tests.quantize.small_encoder import make_encoder
from tests.quantize.tiny import MODEL, without_added_words

pytestmark = pytest.mark.engine

ROLE, ITEMS = "intent_classifier", ROOT / "deploy/assistant/data/intent_classifier.jsonl"
CLASSIFIER, REFERENCE = "intents:int8-dynamic", "assistant:bf16"
ENGINE = {"max_model_len": 512, "kv_cache_gib": 1, "env": {"OMP_NUM_THREADS": "1"}}


def test_tiercel_starts_llama_cpp_and_it_serves_what_the_card_says(tmp_path: Path) -> None:
    directory = without_added_words(shutil.copytree(MODEL, tmp_path / "model"))
    checkpoint = open_checkpoint(directory)
    registry = Registry(tmp_path / "variants", "demo", "bf16")
    registry.add_reference(checkpoint)
    card = add_gguf(registry, checkpoint, "gguf-q8_0", "q8_0")
    spec = EngineSpec(
        card=card,
        directory=registry.path("gguf-q8_0"),
        settings=EngineSettings.model_validate(ENGINE),
        port=free_port("127.0.0.1"),
        log=tmp_path / "engine.log",
    )
    asyncio.run(_serves(spec))


async def _serves(spec: EngineSpec) -> None:
    messages = asked("when is my credit card bill due")["messages"]
    async with running(spec, print) as engine, EngineClient(spec.url, "demo") as client:
        account = await checked_account(spec.card, spec.url)
        assert account is not None
        assert (account.quantization, set(account.kernels)) == ("gguf", {"Q8_0"})
        assert await client.answer(messages, 8) == "bill_due"
        assert (await client.version()).startswith("b")
        assert await engine.drain()
        assert await engine.until_idle(10)
        assert engine.exit_code is None
    assert engine.exit_code is not None


def asked(text: str) -> dict[str, Any]:
    system = {"role": "system", "content": SYSTEM_PROMPTS[ROLE]}
    return {"messages": [system, {"role": "user", "content": text}], "temperature": 0, "max_tokens": 8}


def settings(directory: Path, models: Mapping[str, Any], role: Mapping[str, Any], **more: Any) -> Path:
    """A file with one role, and with ports that are free."""
    path = directory / "tiercel.yaml"
    content = {
        "models": dict(models),
        "variants_dir": "variants",
        "run_dir": "run",
        "roles": {ROLE: dict(role)},
        "default_role": ROLE,
        "gateway": {"port": free_port("127.0.0.1"), "health_interval_s": 0.5, "scrape_interval_s": 0.5},
        "engine": {
            **ENGINE,
            "python": str(ROOT / ".venv-engine/bin/python"),
            "base_port": free_port("127.0.0.1", together=4),
        },
        "quality": {"sample_rate": 1.0},
        **more,
    }
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_a_classifier_serves_its_role_beside_a_model_that_stands_in_for_it(tmp_path: Path) -> None:
    rows = [(str(item.messages[-1]["content"]), item.expected) for item in read_items(ITEMS, ROLE)]
    encoder = make_encoder(tmp_path / "encoder", [text for text, _ in rows], width=256)
    train_classifier(open_encoder(encoder), rows, tmp_path / "intents")
    models = {
        "assistant": {"path": str(MODEL), "serve": ["bf16"]},
        "intents": {"path": "intents", "reference": FLOAT, "serve": [FLOAT, DYNAMIC]},
    }
    role = {"models": ["assistant", "intents"], "tasks": str(ITEMS), "budget": {"max_accuracy_drop": 0.03}}
    path = settings(tmp_path, models, role, watch={"rate": 1.0})
    asyncio.run(_fleet(path, [text for text, _ in rows[:8]]))


async def _fleet(path: Path, texts: list[str]) -> None:
    config = load_config(path)
    intents, checkpoint = registry_of(config.of("intents")), open_checkpoint(path.parent / "intents")
    cards = {
        "assistant": [registry_of(config.of("assistant")).add_reference(open_checkpoint(MODEL))],
        "intents": [
            add_classifier(intents, checkpoint, FLOAT, FLOAT),
            add_classifier(intents, checkpoint, DYNAMIC, DYNAMIC),
        ],
    }
    judged: list[Card] = []

    async def measure(specs: dict[str, EngineSpec]) -> None:
        judged.extend(await evaluate_models(config, cards, print, specs))

    async with (
        Stack(config, path, print, measure) as stack,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as http,
    ):
        card = next(card for card in judged if card.id == CLASSIFIER)
        assert card.gate[ROLE].outcome == "passed", card.gate[ROLE].reasons
        assert card.speed is not None
        await _plain_chats_go_to_the_classifier(http, stack.url, texts)
        await _others_go_up(http, stack.url, texts[0])
        for variant in (CLASSIFIER, f"intents:{FLOAT}"):
            pid = stack.engines[variant].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await stack.engines[variant].wait()
        headers, _ = await ask(http, stack.url, asked(texts[0]))
        assert (headers["x-tiercel-variant"], headers["x-tiercel-route-reason"]) == (
            REFERENCE,
            "raised_pool_down",
        )


async def _plain_chats_go_to_the_classifier(http: aiohttp.ClientSession, url: str, texts: list[str]) -> None:
    for number, text in enumerate(texts):
        headers, answer = await ask(http, url, asked(text) | {"stream": number % 2 == 1})
        assert headers["x-tiercel-variant"] == CLASSIFIER
        assert headers["x-tiercel-route-reason"] == "cheapest_in_budget"
        assert answer
    labels = {"role": ROLE, "model": "intents", "variant": DYNAMIC}
    assert await metric(http, url, "tiercel_requests_total", outcome="200", **labels) == len(texts)
    assert await metric(http, url, "tiercel_tokens_total", kind="completion", **labels) == len(texts)
    async with asyncio.timeout(180):  # the reference is asked when there is time
        while await metric(http, url, "tiercel_shadow_compared_total", **labels) < len(texts):
            await asyncio.sleep(0.1)
    assert await metric(http, url, "tiercel_shadow_compared_total", result="error", **labels) == 0
    assert await metric(http, url, "tiercel_shadow_compared_total", result="agreed", **labels) > 0
    async with http.post(url + "/v1/classify", json={"model": ROLE, "input": texts}) as response:
        assert len((await response.json())["data"]) == len(texts)
    async with http.get(url + "/v1/models") as response:
        longest = {one["id"]: one["max_model_len"] for one in (await response.json())["data"]}
    assert longest["assistant"] == 512, "the classifier's 64 tokens are of its last message alone"


async def _others_go_up(http: aiohttp.ClientSession, url: str, text: str) -> None:
    headers, _ = await ask(http, url, asked(text) | {"n": 2, "temperature": 1})
    assert (headers["x-tiercel-variant"], headers["x-tiercel-route-reason"]) == (
        REFERENCE,
        "raised_not_served",
    )
    prompt = {"model": ROLE, "prompt": text, "max_tokens": 1}
    async with http.post(url + "/v1/completions", json=prompt) as response:
        assert (response.status, response.headers["x-tiercel-variant"]) == (200, REFERENCE)
    async with http.post(url + "/v1/completions", json=prompt | {"model": "intents"}) as response:
        assert (response.status, (await response.json())["error"]["param"]) == (400, "prompt")


async def ask(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[Mapping[str, str], str]:
    """The headers of a chat's answer, and its text."""
    async with http.post(url + "/v1/chat/completions", json={"model": ROLE, **body}) as response:
        text = await response.text()
        assert response.status == 200, text
    if not body.get("stream"):
        return response.headers, str(json.loads(text)["choices"][0]["message"]["content"])
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    said = [one["choices"][0]["delta"].get("content") or "" for one in events if one["choices"]]
    return response.headers, "".join(said)


def test_a_gguf_file_goes_from_the_command_line_through_the_gate_behind_the_gateway(tmp_path: Path) -> None:
    without_added_words(shutil.copytree(MODEL, tmp_path / "model"))
    lines = ITEMS.read_text(encoding="utf-8").splitlines()[::3]
    (tmp_path / "items.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    calibration = str(ROOT / "deploy/assistant/data/calibration.jsonl")
    model = {"path": "model", "serve": ["gguf-q4_k_m"], "calibration": calibration}
    role = {"tasks": "items.jsonl", "budget": {"max_accuracy_drop": 0.2, "max_kl": 0.2}}
    path = settings(tmp_path, {"assistant": model}, role, watch={"reference": "none"})
    tiercel = [sys.executable, "-m", "deploy.cli"]
    made = subprocess.run(
        [*tiercel, "export", "gguf", "--type", "q4_k_m", "--config", str(path), "--json"],
        check=True,
        capture_output=True,
        timeout=240,
    )
    reference, gguf = json.loads(made.stdout)
    assert (reference["variant"], gguf["variant"], gguf["target"]) == ("bf16", "gguf-q4_k_m", "llama.cpp")
    card = read_card(registry_of(load_config(path).of("assistant")).path("gguf-q4_k_m"))
    assert card.evaluation is not None
    figures = card.evaluation.roles[ROLE]
    assert figures.text.kl_exact
    assert 0 < figures.text.kl_mean < 0.2
    assert figures.items == len(lines)
    assert card.gate[ROLE].outcome == "passed", card.gate[ROLE].reasons
    assert card.account is not None
    assert card.account.engine.startswith("llama.cpp b")
    asyncio.run(_through_the_gateway(path, tiercel))


async def _through_the_gateway(path: Path, tiercel: list[str]) -> None:
    async with up(path, tiercel) as url, aiohttp.ClientSession() as http:
        headers, answer = await ask(http, url, asked("when is my credit card bill due"))
        assert (headers["x-tiercel-variant"], answer) == ("assistant:gguf-q4_k_m", "bill_due")
        headers, again = await ask(http, url, asked("when is my credit card bill due") | {"stream": True})
        assert again == answer


@asynccontextmanager
async def up(path: Path, tiercel: list[str]) -> AsyncIterator[str]:
    """``tiercel up``, ready inside the block; it has to end well."""
    log = path.with_name("up.log")
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: ASYNC220
            [*tiercel, "up", "--config", str(path)], stdout=output, stderr=output
        )
    try:
        async with asyncio.timeout(300):
            while b"Tiercel is up" not in log.read_bytes():
                assert process.poll() is None, log.read_text(encoding="utf-8")
                await asyncio.sleep(0.2)
        yield f"http://127.0.0.1:{load_config(path).gateway.port}"
    finally:
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 60) == 0, log.read_text(encoding="utf-8")
