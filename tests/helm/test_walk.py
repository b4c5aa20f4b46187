"""Every scenario is walked through as an operator would: the job, the cards, the gateway, the pools, and a
question of every role. What is rendered is run, on this machine and with a small model: a flow that can never
succeed fails here."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from deploy.engine import free_port
from gateway.config import Config, slug
from quantize.card import read_card
from tests.helm.chart import (
    SCENARIOS,
    changed,
    fullname,
    gateway_config,
    pools,
    render,
    scenario,
    without_job,
)
from tests.helm.local_cluster import (
    ROOT,
    Cluster,
    Given,
    Process,
    gateway_pod,
    helm_test_pod,
    job_pods,
    started,
)
from tests.hub import Hub, serving

MODEL = ROOT / "deploy" / "assistant" / "model"
DATA = ROOT / "deploy" / "assistant" / "data"
KEY = "a key of the operator"
ITEMS = 100
"""Of each role, that its gate asks: by 87 faultless ones three gates could pass at the scenarios' 5 %."""
TOKENS = 300
"""Of the answer that an engine is to finish after it was told to stop."""
WITHIN_S = 240.0

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    """A hub where every repository is the demo model."""
    made = Hub(None, {})
    made.files["c" * 40] = {file.name: file.read_bytes() for file in MODEL.iterdir() if file.is_file()}
    with serving(made) as url:
        yield url


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a person's own, under the names that the scenarios give them."""
    place = tmp_path_factory.mktemp("tasks")
    for name, source in (
        ("intents", "intent_classifier"),
        ("intent_classifier", "intent_classifier"),
        ("core", "core"),
        ("calibration", "calibration"),
    ):
        lines = (DATA / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()
        (place / f"{name}.jsonl").write_text("\n".join(lines[:ITEMS]) + "\n", encoding="utf-8")
    return place


def fill(directory: Path, config: Config) -> None:
    """What `tiercel quantize` does elsewhere, before a claim or an image with its variants is used here."""
    source = {"path": str(MODEL), "calibration": str(DATA / "calibration.jsonl")}
    for name, model in config.models.items():
        settings = {
            "models": {name: {**source, "reference": model.reference, "serve": list(model.serve)}},
            "variants_dir": str(directory),
            "roles": {"core": {}},
            "default_role": "core",
            "watch": {"reference": "none"},
        }
        written = directory.parent / "filling.yaml"
        written.write_text(yaml.safe_dump(settings), encoding="utf-8")
        tiercel = [
            sys.executable,
            "-m",
            "deploy.cli",
            "quantize",
            "make",
            "--config",
            str(written),
            "--no-evaluate",
        ]
        lines = [
            [*tiercel, "--scheme", one.replace("_", "-"), "--method", "rtn", "--name", one]
            for one in model.serve
            if one.startswith("w4a16")
        ]
        if "int8" in model.serve or not lines:  # of which each makes the reference as well
            lines.append([*tiercel, model.reference, *(one for one in model.serve if one == "int8")])
        for line in lines:
            done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=WITHIN_S)
            assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the engines of all scenarios found out about the model's class."""
    return tmp_path_factory.mktemp("seen")


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> dict[frozenset[str], Path]:
    """Claims that were filled already, by what is in them."""
    return {}


def certificate(place: Path) -> Path:
    """A secret with tls.crt and tls.key."""
    place.mkdir()
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=llm.example.com"
    files = ["-keyout", str(place / "tls.key"), "-out", str(place / "tls.crt")]
    subprocess.run([*command.split(), *files], check=True, capture_output=True, timeout=60)
    return place


def values_of(name: str) -> dict[str, Any]:
    """A scenario's values with a key that is known here."""
    values = scenario(name)
    (key, *_) = values["gateway"]["config"]["keys"]
    key |= {"sha256": hashlib.sha256(KEY.encode()).hexdigest()}
    return values


def run_jobs(cluster: Cluster) -> None:
    """Each to its end, one after the other."""
    for name, pod in job_pods(cluster.objects).items():
        (container,) = pod["spec"]["containers"]
        done = cluster.run(name, pod, container, 3 * WITHIN_S)
        assert done.returncode == 0, f"{name}: {done.stdout[-3000:]}{done.stderr[-5000:]}"
    config = gateway_config(cluster.objects)
    variants = cluster.claim(f"{fullname(cluster.objects)}-variants")
    for model, settings in config.models.items():
        for variant in settings.serve:
            card = read_card(variants / slug(model) / variant / "current")
            assert card.evaluation is not None, f"{model}:{variant} was made, and not measured"
            assert card.state == "ready"


class Door:
    """The gateway, as a client reaches it."""

    def __init__(self, url: str, http: aiohttp.ClientSession, gateway: Process) -> None:
        self.url, self._http, self._gateway = url, http, gateway
        self._headers = {"authorization": f"Bearer {KEY}"}

    async def until(self, path: str, processes: list[Process]) -> None:
        """The path answers 200, and no pool is out of reach: a role is served at a higher precision where one
        is, and nobody would notice. Fails when one of the processes ends before."""
        async with asyncio.timeout(WITHIN_S):
            while True:
                for process in (self._gateway, *processes):
                    assert process.ended is None, process.said()
                with contextlib.suppress(aiohttp.ClientError):
                    async with self._http.get(self.url + path, ssl=False) as answer:
                        if answer.status == 200 and not (await answer.json()).get("not_reachable"):
                            return
                await asyncio.sleep(0.2)

    async def ask(self, model: str) -> str:
        """A question; the variant that has answered."""
        message = {"role": "user", "content": "Where is my order?"}
        body = {"model": model, "max_tokens": 4, "messages": [message]}
        path = "/v1/chat/completions"
        async with self._http.post(self.url + path, json=body, headers=self._headers, ssl=False) as answer:
            assert answer.status == 200, (await answer.text(), self._gateway.said())
            assert (await answer.json())["usage"]["completion_tokens"] > 0
            return answer.headers["x-tiercel-variant"]

    async def stream(self, model: str, engines: dict[str, Process]) -> str:
        """A long answer, whose engine is told to stop when it has begun; the variant of that engine."""
        body = {"model": model, "prompt": "Hello", "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
        body["stream_options"] = {"include_usage": True}
        path = "/v1/completions"
        async with self._http.post(self.url + path, json=body, headers=self._headers, ssl=False) as answer:
            assert answer.status == 200, await answer.text()
            variant = answer.headers["x-tiercel-variant"]
            events = []
            async for line in answer.content:
                if line.startswith(b"data: "):
                    events.append(line.removeprefix(b"data: ").strip())
                    if len(events) == 1:
                        engines[variant].terminate()
        assert events[-1] == b"[DONE]", engines[variant].said()
        assert json.loads(events[-2])["usage"]["completion_tokens"] == TOKENS, "it was cut"
        return variant


def given_for(values: dict[str, Any], place: Path, hub: str, tasks: Path, seen: Path) -> Given:
    """What a person has put into the cluster before they install a scenario."""
    (place / "checkpoints").mkdir()
    given = Given(world={"HF_ENDPOINT": hub}, seen=seen)
    given.directories = {"tiercel-tasks": tasks, "tasks": tasks, "checkpoints": place / "checkpoints"}
    if (dated := values.get("quantize", {}).get("tasks", {}).get("path")) is not None:
        given.directories["tasks"] = place / "dated"
        shutil.copytree(tasks, place / "dated" / dated)
    for settings in values["models"].values():
        if "path" in settings:
            (place / "checkpoints" / settings["path"]).symlink_to(MODEL)
        if "checkpointImage" in settings:
            given.directories[settings["checkpointImage"]["reference"]] = MODEL
    given.directories["tiercel-tls"] = certificate(place / "tls")
    given.secrets = {
        ("hub", "token"): "hf_of-the-operator",
        ("product-key", "key"): KEY,
        ("providers", "openai"): "sk-of-the-operator",
        ("tiercel-store", "url"): f"sqlite:///{place / 'store.db'}",
    }
    return given


def cluster_for(values: dict[str, Any], place: Path, given: Given) -> Cluster:
    """A cluster where a scenario is installed."""
    objects = render(values)
    names = [fullname(objects), *(owner["metadata"]["name"] for owner, _ in pools(objects).values())]
    cluster = Cluster(place, given, {one: free_port("127.0.0.1") for one in names})
    cluster.apply(objects)
    return cluster


def test_a_job_that_cannot_succeed_fails_here(tmp_path: Path, hub: str, tasks: Path, seen: Path) -> None:
    making = {"make": ["bf16", "int4-kv8", "int2"]}
    values = changed(values_of("two-precisions"), {"models": {"llama": {"quantize": making}}})
    cluster = cluster_for(values, tmp_path, given_for(values, tmp_path, hub, tasks, seen))
    with pytest.raises(AssertionError, match="unknown variant 'int2'"):
        run_jobs(cluster)


@pytest.mark.parametrize("name", SCENARIOS)
async def test_a_scenario_from_its_job_to_an_answer_for_every_role(
    name: str, tmp_path: Path, hub: str, tasks: Path, seen: Path, filled: dict[frozenset[str], Path]
) -> None:
    values = values_of(name)
    given = given_for(values, tmp_path, hub, tasks, seen)
    cluster = cluster_for(values, tmp_path, given)
    config = gateway_config(cluster.objects)
    if "quantize" in values:
        assert started(cluster.objects) == {}, "they would hold what the job needs"
        run_jobs(cluster)
        cluster.apply(render(without_job(values), upgrade=True))
    else:
        place = values["variants"]
        claim = place.get("existingClaim") or place["image"]["reference"]
        wanted = {*config.served, *config.references.values()}
        if not (there := [place for held, place in filled.items() if wanted <= held]):
            fill(tmp_path / "filled", config)
            there = [filled.setdefault(frozenset(wanted), tmp_path / "filled")]
        given.directories[claim] = there[0]
    await serve(cluster, config)


async def serve(cluster: Cluster, config: Config) -> None:
    """The gateway comes up, then its pools; every role is answered, and an engine that stops finishes."""
    objects = cluster.objects
    scheme = "https" if config.gateway.tls_certificate is not None else "http"
    url = f"{scheme}://127.0.0.1:{cluster.ports[fullname(objects)]}"
    async with contextlib.AsyncExitStack() as stack:
        gateway = stack.enter_context(cluster.process(fullname(objects), gateway_pod(objects)))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        door = Door(url, http, gateway)
        await door.until("/health", [])
        engines = {
            served: stack.enter_context(cluster.process(pool, pod))
            for served, (pool, pod) in started(objects).items()
        }
        assert set(engines) == set(config.served)
        await door.until("/readiness", list(engines.values()))
        answered = {role: await door.ask(role) for role in config.roles}
        assert set(answered.values()) <= set(engines)
        pod = helm_test_pod(objects)
        (container,) = pod["spec"]["containers"]
        done = cluster.run("helm-test", pod, container, WITHIN_S)
        assert done.returncode == 0, done.stdout + done.stderr
        stopped = engines[await door.stream(config.default_role, engines)]
        assert await asyncio.to_thread(stopped.wait, WITHIN_S) == 0, stopped.said()
        gateway.terminate()
        assert await asyncio.to_thread(gateway.wait, WITHIN_S) == 0, gateway.said()
