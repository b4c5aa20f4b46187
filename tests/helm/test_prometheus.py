"""A real Prometheus reads a running gateway: it understands the metrics, the rules and the dashboards."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from aiohttp import web
from prometheus_client import CollectorRegistry

from deploy.dashboards import DASHBOARDS, render
from gateway.routing.replicas import Replica
from gateway.telemetry.engines import EngineReader
from gateway.telemetry.metrics import Metrics
from gateway.upstream.fake import FakeEngine, listen
from tests.helm.metric_names import RULES, filled

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gateway"))

from gateway_stack import OTHERS, Stack, addresses, eventually, free_port, running_gateway

EVERY_S = 0.25
"""Between two scrapes, and between two evaluations."""
WITHIN_S = 20.0
WATCHED = {"rate": 1.0, "probation_after_s": 3600.0}
FAILING = 2
"""Requests of a wave that fail: three in a row would close the replica."""


class Prometheus:
    """A running server's API."""

    def __init__(self, url: str, http: aiohttp.ClientSession) -> None:
        self.url = url
        self._http = http

    async def get(self, path: str, **params: str) -> Any:
        async with self._http.get(f"{self.url}/api/v1/{path}", params=params) as response:
            body = await response.json()
        assert body["status"] == "success", (params, body)
        return body["data"]

    async def query(self, expression: str) -> dict[str, float]:
        """Values by their labels, name left out, in the order of the labels' names."""
        found = await self.get("query", query=expression)
        if found["resultType"] == "scalar":
            return {"": float(found["result"][1])}
        return {
            ",".join(value for name, value in sorted(one["metric"].items()) if name != "__name__"): float(
                one["value"][1]
            )
            for one in found["result"]
        }

    async def rules(self) -> list[dict[str, Any]]:
        groups = (await self.get("rules"))["groups"]
        return [rule for group in groups for rule in group["rules"]]

    async def alert(self, name: str) -> list[dict[str, Any]]:
        alerts = (await self.get("alerts"))["alerts"]
        return [one for one in alerts if one["labels"]["alertname"] == name]


@contextlib.asynccontextmanager
async def scraping(stack: Stack, directory: Path) -> AsyncIterator[Prometheus]:
    """Prometheus on loopback, with the gateway as its target and the rules without their waiting times."""
    if shutil.which("prometheus") is None:
        pytest.skip("Prometheus is not installed; tests/servers.sh installs it where it may")
    rules = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    for group in rules["groups"]:
        group.pop("interval", None)
        for rule in group["rules"]:
            rule.pop("for", None)
    (directory / "rules.yaml").write_text(yaml.safe_dump(rules), encoding="utf-8")
    target = stack.url.removeprefix("http://")
    every = f"{round(1000 * EVERY_S)}ms"
    settings = {
        "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [{"job_name": "gateway", "static_configs": [{"targets": [target]}]}],
    }
    (directory / "prometheus.yml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    address = f"127.0.0.1:{free_port()}"
    process = await asyncio.create_subprocess_exec(
        "prometheus",
        f"--config.file={directory / 'prometheus.yml'}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address={address}",
        "--log.level=error",
    )
    try:
        prometheus = Prometheus(f"http://{address}", stack.http)

        async def up() -> bool:
            with contextlib.suppress(aiohttp.ClientError):
                return await prometheus.query("up") == {f"{target},gateway": 1.0}
            return False

        await eventually(up, within_s=WITHIN_S)
        yield prometheus
    finally:
        process.terminate()
        await process.wait()


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[tuple[Stack, Prometheus]]:
    async with running_gateway(watch=WATCHED) as stack, scraping(stack, tmp_path) as prometheus:
        yield stack, prometheus


async def wave(stack: Stack, core: int = 5, failing: int = FAILING, streams: int = 8) -> None:
    """Requests of two roles, streamed and not, of which some fail."""
    for _ in range(core):
        async with stack.post(headers={"x-agent-role": "core"}) as response:
            assert response.status == 200
            await response.read()
    stack.engines["bf16"].script.status = 500
    for _ in range(failing):
        async with stack.post(headers={"x-agent-role": "core"}) as response:
            assert response.status == 502
    stack.engines["bf16"].script.status = 200
    for _ in range(streams):
        async with stack.post({"stream": True}, headers={"x-agent-role": "intent_classifier"}) as response:
            assert response.status == 200
            await response.read()


async def counted(prometheus: Prometheus, requests: float) -> None:
    """Prometheus has heard of so many requests."""

    async def there() -> bool:
        return await prometheus.query("sum(tiercel_requests_total)") == {"": requests}

    await eventually(there, within_s=WITHIN_S)


async def looked_at(prometheus: Prometheus) -> None:
    """Prometheus has heard of what was found in answers: what comes later is an increase then."""

    async def there() -> bool:
        found = [f"tiercel_{name}_total" for name in ("quality_sentences", "shadow_compared")]
        return all([await prometheus.query(name) for name in found])

    await eventually(there, within_s=WITHIN_S)


async def test_the_rules_are_evaluated_on_what_the_gateway_says(served: tuple[Stack, Prometheus]) -> None:
    stack, prometheus = served
    targets = (await prometheus.get("targets"))["activeTargets"]
    assert [target["health"] for target in targets] == ["up"]
    # One request of each kind first: an increase is counted from the first value that was read.
    await wave(stack, core=1, failing=1, streams=1)
    await counted(prometheus, 3)
    await looked_at(prometheus)
    for _ in range(2):
        await asyncio.sleep(1)
        await wave(stack)
    await counted(prometheus, 33)
    sent = {"core": 2 * (5 + FAILING), "intent_classifier": 2 * 8}

    async def rates() -> dict[str, float]:
        found = await prometheus.query("role:tiercel_requests:rate5m")
        return {role: 300 * rate for role, rate in found.items()}

    async def seen() -> bool:
        found = await rates()
        return all(found.get(role, 0) >= number - 0.001 for role, number in sent.items())

    await eventually(seen, within_s=WITHIN_S)
    for role, requests in (await rates()).items():
        # Prometheus extends an increase by up to half a scrape's time at either end.
        assert requests <= 1.4 * sent[role], role
    failed = await prometheus.query("role:tiercel_requests_failed:ratio_rate5m")
    assert failed["core"] == pytest.approx(FAILING / (5 + FAILING), rel=0.3)
    assert failed["intent_classifier"] == 0

    for rule in await prometheus.rules():
        assert rule["health"] == "ok", rule
        assert rule.get("lastError", "") == "", rule
        if rule["type"] == "recording":
            assert await prometheus.query(rule["name"]), f"{rule['name']} says nothing of all that traffic"


async def test_a_demotion_becomes_an_alert(served: tuple[Stack, Prometheus]) -> None:
    stack, prometheus = served

    async def order(action: str) -> None:
        body = {"action": action, "variant": "assistant:int8", "role": "summarizer"}
        async with stack.http.post(stack.url + "/admin/watch", json=body) as response:
            assert response.status == 200, await response.text()

    async def firing() -> bool:
        return [one["state"] for one in await prometheus.alert("TiercelVariantDemoted")] == ["firing"]

    async def quiet() -> bool:
        return not await prometheus.alert("TiercelVariantDemoted")

    assert await quiet()
    await order("demote")
    await eventually(firing, within_s=WITHIN_S)
    (alert,) = await prometheus.alert("TiercelVariantDemoted")
    assert alert["labels"]["severity"] == "warning"
    assert alert["annotations"]["summary"] == "assistant:int8 is out of summarizer's choice"
    await order("restore")
    await eventually(quiet, within_s=WITHIN_S)


async def test_a_pool_that_goes_and_is_wanted_becomes_an_alert(served: tuple[Stack, Prometheus]) -> None:
    stack, prometheus = served

    async def firing() -> bool:
        return [one["labels"]["variant"] for one in await prometheus.alert("TiercelPoolDown")] == ["int8"]

    async def unreached() -> bool:
        return await prometheus.query("tiercel_replica_reachable == 0") != {}

    stack.engines["int8"].script.healthy = False
    await eventually(unreached, within_s=WITHIN_S)
    assert not await firing(), "nobody has asked for it"
    async with asyncio.timeout(WITHIN_S):
        while not await firing():
            async with stack.post(headers={"x-agent-role": "summarizer"}) as response:
                assert response.headers["x-tiercel-variant"] == "assistant:bf16"
                await response.read()
            await asyncio.sleep(EVERY_S)
    for other in ("TiercelReplicaDown", "TiercelGatewayAbsent"):
        assert not await prometheus.alert(other)


async def test_an_engine_whose_metrics_cannot_be_read_is_told_from_one_that_is_down() -> None:
    async def well(_: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.router.add_get("/health", well)  # and no /metrics
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        pools = addresses(await listen(runner, also=OTHERS))
        async with running_gateway(pools=pools) as stack:
            labels = {"model": "assistant", "variant": "int8", "replica": "assistant:int8-0"}
            await eventually(lambda: stack.sample("tiercel_replica_reachable", **labels) == 1)
            assert stack.registry.get_sample_value("tiercel_engine_metrics_read", labels) == 0
            assert stack.registry.get_sample_value("tiercel_queue_depth", labels) is None
    finally:
        await runner.cleanup()


async def test_a_replica_that_goes_while_it_is_asked_leaves_no_figures(tmp_path: Path) -> None:
    """They would be of a replica that is down, for ever."""
    metrics = Metrics(CollectorRegistry(), ())
    labels = {"model": "assistant", "variant": "int8", "replica": "assistant:int8-0"}
    async with FakeEngine().serving() as url, aiohttp.ClientSession() as http:
        replica = Replica("assistant:int8", "assistant:int8-0", url, time.monotonic)
        asked = [[], [replica]]
        reader = EngineReader(http, metrics, tmp_path, time.monotonic)
        await reader.read(asked.pop)
    assert asked == []
    assert replica.reading.running == 0, "it was read"
    assert metrics.registry.get_sample_value("tiercel_engine_metrics_read", labels) is None


async def test_prometheus_answers_every_query_of_the_dashboards(served: tuple[Stack, Prometheus]) -> None:
    stack, prometheus = served
    await wave(stack)
    await counted(prometheus, 15)
    await looked_at(prometheus)
    await wave(stack)
    await counted(prometheus, 30)
    deadline = time.monotonic() + 60
    while (silent := await silent_panels(prometheus) - SILENT) and time.monotonic() < deadline:
        await asyncio.sleep(EVERY_S)  # a rate needs two scrapes
    assert not silent


async def silent_panels(prometheus: Prometheus) -> set[tuple[str, str]]:
    """Dashboards and titles of panels a query of which has no answer."""
    silent = set()
    for dashboard in DASHBOARDS:
        for panel in render(dashboard)["panels"]:
            for target in panel.get("targets", ()):
                if not await prometheus.query(filled(target["expr"])):
                    silent.add((dashboard.name, panel["title"]))
    return silent


SILENT = {
    # Engines are not scraped here, and none has a process of its own.
    ("operators", "Running"),
    ("operators", "Preemptions"),
    ("operators", "In the engine's queue"),
    ("operators", "Memory"),
    ("cost", "From the prefix cache"),
    # Nothing was hedged, kept, asked again or counted on a key, no check broke, and the watch said nothing.
    ("operators", "Hedges"),
    ("quality", "Asked again"),
    ("quality", "Kept by consent"),
    ("quality", "Events"),
    ("quality", "Checks that broke"),
    ("cost", "Answered twice"),
    ("cost", "By key"),
    ("cost", "Why requests were raised"),
    # One process without workers, conversations or troubles.
    ("gateways", "Workers' heartbeats"),
    ("gateways", "Workers started anew"),
    ("gateways", "Conversations"),
    ("gateways", "Pools missed"),
    ("gateways", "Requests not counted to their end"),
    ("gateways", "Prompts asked for afterwards"),
    ("gateways", "Answers not looked at"),
    ("gateways", "Defects and lost processes"),
}
"""Panels that may have nothing to show after plain traffic; every other one has."""
