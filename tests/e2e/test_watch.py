"""The watch on real engines: healthy variants stay, a harmed one goes, and comes back when it is healed.

Runs last of the tests that need engines (by its name): it stops the session's stack and starts its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections import Counter
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
from quantize.card import variant_directory
from tests.e2e.conftest import ROOT, stop_stack

pytestmark = pytest.mark.engine

ROLES = ("intent_classifier", "summarizer")
VARIANT = "int4-kv8"
QUANTIZED, REFERENCE = f"assistant:{VARIANT}", "assistant:bf16"
HEALTHY = 260
"""Answers per role: from the first 200 the signals' usual range is learned."""


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    """The reference and INT4, and a watch that looks at every answer."""
    stop_stack()
    settings = yaml.safe_load((ROOT / "tiercel.yaml").read_text(encoding="utf-8"))
    model = settings["models"]["assistant"]
    model["path"], model["serve"] = str(ROOT / "deploy/assistant/model"), ["bf16", VARIANT]
    settings["variants_dir"] = str(ROOT / "var/e2e-variants")
    settings["gateway"] = {"port": free_port("127.0.0.1")}
    settings["engine"]["python"] = str(ROOT / ".venv-engine/bin/python")
    settings["engine"]["base_port"] = free_port("127.0.0.1", together=4)
    settings["watch"] = {"rate": 1.0, "probation_after_s": 2.0, "probation_rate": 1.0, "queue": 500}
    for role in settings["roles"].values():
        for name in ("tasks", "long_context"):
            role.pop(name, None)
    for role in ROLES:  # wide, as the session's stack has them: the cards were judged by it
        settings["roles"][role]["budget"] = {"max_accuracy_drop": 0.2, "max_kl": 0.1}
    path = tmp_path / "tiercel.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    async with Stack(load_config(path), path, print) as running:
        yield running


def items(role: str) -> list[dict[str, Any]]:
    lines = (ROOT / f"deploy/assistant/data/{role}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


class Traffic:
    """Items of both roles in turn, over and over."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url, self._session = url, session
        both = zip(itertools.cycle(items(ROLES[0])), itertools.cycle(items(ROLES[1])), strict=False)
        self._pairs = ((role, item) for pair in both for role, item in zip(ROLES, pair, strict=True))

    async def send(self, count: int) -> Counter[tuple[str, str]]:
        """Answers by role and variant."""
        slots = asyncio.Semaphore(6)

        async def ask(role: str, item: dict[str, Any]) -> tuple[str, str]:
            body = {
                "model": "assistant",
                "messages": item["messages"],
                "max_tokens": item.get("max_tokens", 64),
                "temperature": 0,
            }
            async with slots:
                post = self._session.post(
                    self._url + "/v1/chat/completions", json=body, headers={"x-agent-role": role}
                )
                async with post as response:
                    assert response.status == 200, await response.text()
                    await response.read()
                    return role, response.headers["x-tiercel-variant"]

        return Counter(await asyncio.gather(*(ask(*pair) for pair in itertools.islice(self._pairs, count))))

    async def watch(self) -> dict[str, Any]:
        async with self._session.get(self._url + "/admin/watch?events=1000") as response:
            return dict(await response.json())

    async def until(self, serves: bool, most: int) -> dict[str, Any]:
        """Send until both roles have the variant back, or have lost it; then what the watch says."""
        for _ in range(0, most, 12):
            await self.send(12)
            report = await self.watch()
            if all(cell["serves"] is serves for cell in cells(report).values()):
                return report
        raise AssertionError(f"not within {most} answers: {json.dumps(report, indent=1)}")

    async def digested(self) -> dict[str, Any]:
        """What the watch says once it has looked at nearly all that it was sent, or after a while."""
        report = await self.watch()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(180):
                while not all(enough(cell["checks"]) for cell in cells(report).values()):
                    await asyncio.sleep(0.5)
                    report = await self.watch()
        return report


def enough(checks: dict[str, Any]) -> bool:
    seen = {name: checks.get(name, {}).get("answers", 0) for name in ("shadow", "signals")}
    return bool(seen["shadow"] > HEALTHY / 4 and seen["signals"] >= HEALTHY - 200)


def cells(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {c["role"]: c for c in report["cells"] if c["variant"] == QUANTIZED and c["role"] in ROLES}


async def test_a_harmed_variant_is_demoted_and_a_healed_one_comes_back(stack: Stack, tmp_path: Path) -> None:
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        traffic = Traffic(stack.url, session)
        given = await traffic.send(2 * HEALTHY)
        assert set(given) == {(role, QUANTIZED) for role in ROLES}
        report = await traffic.digested()
        assert report["events"] == []
        for role, cell in cells(report).items():
            checks = cell["checks"]
            assert cell["verdict"] in ("healthy", "suspected"), (role, cell)
            assert checks["shadow"]["answers"] > HEALTHY / 4, (role, checks)
            assert checks["shadow"]["bad"] <= 0.05 * checks["shadow"]["answers"], (role, checks)
            assert checks["signals"]["answers"] >= HEALTHY - 200, (role, checks)
        async with session.get(stack.url + "/metrics") as response:
            metrics = await response.text()
        assert 'tiercel_shadow_compared_total{result="error"' not in metrics

        spec = stack.engines[QUANTIZED].spec
        healthy = variant_directory(stack.config.of("assistant").variants_dir, VARIANT, spec.card.version)
        await stack.swap(QUANTIZED, damaged(healthy, tmp_path / "harmed", "two-bits"))
        report = await traffic.until(serves=False, most=1200)
        for event in report["events"]:
            assert event["kind"] != "demoted" or " and " in event["why"], event  # two checks agreed
        given = await traffic.send(24)
        assert set(given) == {(role, REFERENCE) for role in ROLES}

        await stack.swap(QUANTIZED, healthy)
        report = await traffic.until(serves=True, most=4000)
        kinds = Counter(event["kind"] for event in report["events"])
        assert kinds["demoted"] == kinds["restored"] == len(ROLES)
        given = await traffic.send(24)
        assert set(given) == {(role, QUANTIZED) for role in ROLES}
