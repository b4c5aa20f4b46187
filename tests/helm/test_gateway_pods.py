"""What the chart tells the gateway: its configuration as it reads it, secrets, when it starts."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.config import slug
from tests.gateway.gateway_stack import running_gateway
from tests.helm.chart import (
    CHART,
    NAMESPACE,
    RELEASE,
    SCENARIOS,
    Object,
    changed,
    fullname,
    gateway_config,
    labels,
    notes,
    of_kind,
    pods,
    pools,
    refusal,
    render,
    scenario,
    without_job,
)


def gateway_pod(objects: list[Object]) -> Object:
    (found,) = (
        pod for owner, pod in pods(objects) if labels(pod).get("app.kubernetes.io/component") == "gateway"
    )
    return found


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_gateway_reads_its_configuration(name: str) -> None:
    values = scenario(name)
    objects = render(values)
    config = gateway_config(objects)
    ids = {f"{model}:{variant}" for model, given in values["models"].items() for variant in given["pools"]}
    assert set(config.served) == set(config.pools) == ids == set(pools(objects))
    assert config.default_model == values.get("defaultModel", next(iter(values["models"])))
    assert config.gateway.host == "0.0.0.0"
    assert config.gateway.shutdown_timeout_s == 600
    assert set(config.roles) == set(values["gateway"]["config"]["roles"])
    services = {found["metadata"]["name"]: found for found in of_kind(objects, "Service")}
    for served, urls in config.pools.items():
        (url,) = urls
        found = re.fullmatch(r"dns\+http://([^.]+)\.([^.]+)\.svc:8000", url)
        assert found is not None
        assert found[1] == pools(objects)[served][0]["metadata"]["name"]
        assert found[1] in services
        assert found[2] == NAMESPACE


@pytest.mark.parametrize("name", SCENARIOS)
def test_what_is_said_of_a_models_context_every_pool_of_it_takes(name: str) -> None:
    objects = render(scenario(name))
    config = gateway_config(objects)
    for served, (_, pod) in pools(objects).items():
        (longest,) = (
            int(argument.partition("=")[2])
            for argument in pod["spec"]["containers"][0]["args"]
            if argument.startswith("--max-model-len=")
        )
        said = config.of(served.rpartition(":")[0]).engine.max_model_len
        assert said is not None
        assert said <= longest


def test_the_first_model_is_the_one_that_was_named() -> None:
    """A map of Helm's has no order."""
    for first in ("Qwen/Qwen3-8B", "small"):
        config = gateway_config(render(changed(scenario("two-models"), {"defaultModel": first})))
        assert config.default_model == first


def test_large_numbers_stay_numbers() -> None:
    assert gateway_config(render(scenario("two-precisions"))).gateway.max_body_bytes == 10_000_000


def test_the_store_and_providers_come_from_secrets() -> None:
    objects = render(scenario("scaled"))
    assert gateway_config(objects).watch.store_env == "TIERCEL_WATCH_STORE"
    assert gateway_config(objects).responses.store_env == "TIERCEL_WATCH_STORE"
    environment = {entry["name"]: entry for entry in gateway_pod(objects)["spec"]["containers"][0]["env"]}
    assert environment["TIERCEL_WATCH_STORE"]["valueFrom"]["secretKeyRef"] == {
        "name": "tiercel-store",
        "key": "url",
    }
    assert environment["OPENAI_API_KEY"]["valueFrom"]["secretKeyRef"]["name"] == "providers"


def test_a_variable_that_the_values_give_is_given_once() -> None:
    """Server-side apply refuses a list that names one twice."""
    other = {"name": "TIERCEL_WATCH_STORE", "value": "sqlite://"}
    values = changed(scenario("scaled"), {"gateway": {"extraEnv": [other]}})
    (container,) = gateway_pod(render(values))["spec"]["containers"]
    assert container["env"] == [other]
    engine = changed(scenario("cpu"), {"engine": {"extraEnv": [{"name": "OMP_NUM_THREADS", "value": "3"}]}})
    for _, pod in pools(render(engine)).values():
        given = [entry for entry in pod["spec"]["containers"][0]["env"] if entry["name"] == "OMP_NUM_THREADS"]
        assert given == [{"name": "OMP_NUM_THREADS", "value": "3"}]


def test_tls() -> None:
    objects = render(scenario("one-gpu"))
    config = gateway_config(objects)
    (container,) = gateway_pod(objects)["spec"]["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert config.gateway.tls_certificate is not None
    assert mounts[str(config.gateway.tls_certificate.parent)] == "tls"
    assert {
        container[f"{kind}Probe"]["httpGet"]["scheme"] for kind in ("startup", "liveness", "readiness")
    } == {"HTTPS"}


def test_another_configuration_is_another_pod() -> None:
    def checksum(changes: dict[str, Any]) -> str:
        pod = gateway_pod(render(changed(scenario("cpu"), changes)))
        found: str = pod["metadata"]["annotations"]["checksum/config"]
        return found

    assert checksum({}) == checksum({"gateway": {"service": {"port": 8080}}})
    assert checksum({}) != checksum({"gateway": {"config": {"roles": {"core": {"wait_s": 3}}}}})
    assert checksum({}) != checksum({"models": {"assistant": {"pools": {"int4": {}}}}})


def test_objects_are_called_after_the_release_or_as_the_values_say() -> None:
    values = scenario("cpu")
    assert {found["metadata"]["name"] for found in of_kind(render(values), "Deployment")} == {
        "prod",
        "prod-assistant-bf16",
        "prod-assistant-int8",
    }
    other = render(changed(values, {"fullnameOverride": "door"}))
    assert all(found["metadata"]["name"].startswith("door") for found in other)
    assert all(labels(found)["app.kubernetes.io/instance"] == RELEASE for found in other)
    long = [f"a-release-with-a-name-of-forty-characters-{end}" for end in ("one", "two")]
    names = [fullname(render(values, name=name)) for name in long]
    assert names[0] != names[1]
    assert all(len(name) <= 30 for name in names)


def test_notes_say_what_to_do_next() -> None:
    assert "copy what" not in notes(scenario("cpu")).lower()
    assert "the claim variants" in notes(scenario("cpu"))
    assert "https://127.0.0.1:8080" in notes(scenario("one-gpu"))
    held = notes(scenario("two-precisions"))
    assert "llama:bf16, llama:int4-kv8" in held
    assert "--set quantize.enabled=false" in held
    assert "these pools have no pods" not in notes(without_job(scenario("two-precisions")))


# scripts within


def test_the_gateway_waits_for_the_cards_of_all_that_it_serves(tmp_path: Path) -> None:
    (wait,) = gateway_pod(render(without_job(scenario("two-models"))))["spec"]["initContainers"]
    script = wait["command"][2].replace("/variants", str(tmp_path)).replace("sleep 5", "sleep 0.1")
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().endswith("Qwen--Qwen3-8B/int8/current/card.json\n")
        for model, variant in (("Qwen/Qwen3-8B", "int8"), ("small", "bf16")):
            assert process.poll() is None
            card = tmp_path / slug(model) / variant / "current" / "card.json"
            card.parent.mkdir(parents=True)
            card.touch()
        assert process.wait(timeout=10) == 0


async def test_helm_test_sends_a_real_request_to_every_model_that_the_key_may_use() -> None:
    (pod,) = of_kind(render(scenario("one-gpu")), "Pod")
    (container,) = pod["spec"]["containers"]
    (names,) = (one["value"] for one in container["env"] if one["name"] == "TIERCEL_MODELS")
    assert names == "assistant"
    async with running_gateway() as stack:
        for models, status in ((f"{names} other", 0), ("other", 1)):
            environment = {
                **os.environ,
                "TIERCEL_URL": stack.url,
                "TIERCEL_MODELS": models,
                "TIERCEL_KEY": "k",
            }
            run = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", container["args"][0]),
                env=environment,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            said, _ = await run.communicate()
            assert run.returncode == status, said.decode()
            assert (b"completion_tokens" in said) == (status == 0)


def test_the_values_that_the_page_gives_can_be_used() -> None:
    page = (CHART.parents[1] / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml values\n(.*?)```", page, re.DOTALL)
    values = yaml.safe_load(text.replace("…", "0" * 64))
    assert refusal(values) == "accepted"
    assert "prod-assistant-int8" in {
        found["metadata"]["name"] for found in of_kind(render(values), "Deployment")
    }


def test_an_ingress_cuts_nothing_that_the_gateway_would_answer() -> None:
    """NGINX ends an answer after 60 s of silence and refuses bodies of more than 1 MiB, unless told."""
    values = changed(scenario("two-precisions"), {"gateway": {"longestStreamSeconds": 900}})
    prefix = "nginx.ingress.kubernetes.io/proxy-"

    def annotations(more: Object) -> dict[str, str]:
        (found,) = of_kind(render(changed(values, {"ingress": {"annotations": more}})), "Ingress")
        return {name.removeprefix(prefix): value for name, value in found["metadata"]["annotations"].items()}

    own = {"read-timeout": "900", "send-timeout": "900", "body-size": "0", "buffering": "off"}
    assert annotations({}) == own
    assert annotations({f"{prefix}body-size": "8m"}) == own | {"body-size": "8m"}
