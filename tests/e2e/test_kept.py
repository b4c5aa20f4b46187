"""Kept traffic on real engines: with no reference served a harmed variant is demoted by what waited for it,
and what a role was asked becomes items that judge a variant."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from deploy.damage import damaged
from deploy.engine import free_port
from deploy.supervisor import Stack
from gateway.config import load_config
from quantize.card import read_card, variant_directory
from tests.deploy.kept import changed, tiercel
from tests.e2e.conftest import ROOT, stop_stack

pytestmark = pytest.mark.engine

ROLE, VARIANT = "intent_classifier", "int4-kv8"
QUANTIZED = f"assistant:{VARIANT}"
ANSWERS = 90
"""Enough for a verdict, and a few that are redacted or there twice."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """INT4 alone is served. The variants are copied, since this judges them."""
    stop_stack()
    settings = yaml.safe_load((ROOT / "tiercel.yaml").read_text(encoding="utf-8"))
    for name in ("bf16", VARIANT):
        place = Path("assistant") / name
        shutil.copytree(ROOT / "var/e2e-variants" / place, tmp_path / "variants" / place, symlinks=True)
    model = settings["models"]["assistant"]
    model["path"], model["serve"] = str(ROOT / "deploy/assistant/model"), [VARIANT]
    model["calibration"] = str(ROOT / "deploy/assistant/data/calibration.jsonl")
    budget = {"max_accuracy_drop": 0.2, "max_kl": 0.1}  # wide, as the session's stack has it
    settings |= {
        "variants_dir": "variants",
        "run_dir": "run",
        "gateway": {"port": free_port("127.0.0.1")},
        "roles": {ROLE: {"budget": budget, "record": {"rate": 1.0}, "wait_s": 60}},
        "default_role": ROLE,
        "quality": {"sample_rate": 1.0},
        "watch": {"reference": "batch", "rate": 1.0},
        "kept": {},
    }
    settings["engine"]["python"] = str(ROOT / ".venv-engine/bin/python")
    settings["engine"]["base_port"] = free_port("127.0.0.1", together=4)
    found = tmp_path / "tiercel.yaml"
    found.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return found


@pytest.fixture
async def stack(path: Path, tmp_path: Path) -> AsyncIterator[Stack]:
    """The variant's files are harmed after they were compared with its card, and before they are loaded."""
    stack = Stack(load_config(path), path, print)
    served = stack.engines[QUANTIZED].spec.directory
    served.rename(tmp_path / "healthy")
    damaged(tmp_path / "healthy", served, "two-bits")
    async with stack as running:
        yield running


async def done(path: Path, *words: str) -> str:
    status, found, said = await tiercel(path, *words)
    assert status == 0, said
    return found


async def send(url: str, session: aiohttp.ClientSession, items: list[dict[str, Any]]) -> None:
    slots = asyncio.Semaphore(6)

    async def ask(item: dict[str, Any]) -> None:
        body = {"model": "assistant", "messages": item["messages"], "max_tokens": 16, "temperature": 0}
        async with slots, session.post(f"{url}/v1/chat/completions", json=body) as response:
            assert response.status == 200, await response.text()
            await response.read()

    await asyncio.gather(*map(ask, items))


async def until(condition: Any) -> None:
    async with asyncio.timeout(180):
        while not await condition():
            await asyncio.sleep(0.2)


async def test_what_was_kept_demotes_a_harmed_variant_and_judges_it(
    path: Path, stack: Stack, tmp_path: Path
) -> None:
    lines = (ROOT / f"deploy/assistant/data/{ROLE}.jsonl").read_text(encoding="utf-8").splitlines()
    items = [json.loads(line) for line in itertools.islice(lines, ANSWERS)]
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(timeout=timeout) as session:

        async def watch() -> dict[str, Any]:
            async with session.get(stack.url + "/admin/watch?events=100") as response:
                return dict(await response.json())

        async def written() -> bool:
            async with session.get(stack.url + "/metrics") as response:
                text = await response.text()
            counts = [
                float(line.rpartition(" ")[2])
                for line in text.splitlines()
                if line.startswith("tiercel_kept_conversations_total{") and 'kind="answer"' in line
            ]
            return sum(counts) >= ANSWERS

        async def demoted() -> bool:
            return "demoted" in [event["kind"] for event in (await watch())["events"]]

        await send(stack.url, session, items)
        await until(written)
        assert not await demoted()
        print(await done(path, "watch", "score"))
        await until(demoted)
        (event,) = [event for event in (await watch())["events"] if event["kind"] == "demoted"]
        assert (event["variant"], event["role"]) == (QUANTIZED, ROLE)
        assert "shadow" in event["why"]
    kept = json.loads(await done(path, "tasks", "show", "--json"))
    assert {one["kind"] for one in kept} == {"request"}, "what was scored is gone"
    await stack.stop()
    shutil.rmtree(served := stack.engines[QUANTIZED].spec.directory)
    (tmp_path / "healthy").rename(served)

    out = tmp_path / "items.jsonl"
    await done(path, "tasks", "record", ROLE, "--out", str(out))
    recorded = len(out.read_text(encoding="utf-8").splitlines())
    assert recorded == sum(one["number"] for one in kept) > ANSWERS / 2
    changed(path, lambda settings: settings["roles"][ROLE].update(tasks=str(out)))
    await done(path, "quantize", "measure", VARIANT)
    card = read_card(variant_directory(tmp_path / "variants/assistant", VARIANT))
    assert card.evaluation is not None
    figures = card.evaluation.roles[ROLE]
    assert (figures.evidence, figures.items) == ("reference", recorded)
    assert f"{recorded} conversations" in " ".join(card.gate[ROLE].reasons)
