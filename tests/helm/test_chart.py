"""The chart's objects: accepted by Kubernetes' own schemas in every version, and true to each other."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from helm_python import lint

from deploy.chart import SCHEMA, WRITTEN_BY_THE_CHART, schema_text
from deploy.cli import parser
from gateway.config import Config, parse_config
from tests.gateway.gateway_stack import running_gateway
from tests.helm.chart import (
    CHART,
    NAMESPACE,
    RELEASE,
    SCENARIOS,
    Object,
    changed,
    containers,
    labels,
    notes,
    of_kind,
    parsed_by_vllm,
    pods,
    refusal,
    render,
    scenario,
    selects,
)
from tests.helm.crds import SPECS

# Each call reads megabytes of schemas, always the same.
kubernetes_validate.utils.schema_contents = cache(kubernetes_validate.utils.schema_contents)

VERSIONS = ["1.25", "1.28", "1.31", "1.34", "1.37"]
IMAGE_VOLUMES_SINCE = 31

# whole


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_accepts_every_object(name: str, version: str) -> None:
    values = scenario(name)
    if "image" in values.get("variants", {}) and int(version.partition(".")[2]) < IMAGE_VOLUMES_SINCE:
        pytest.skip("the chart refuses image volumes there")
    for found in render(values):
        if (schema := SPECS.get((found["apiVersion"], found["kind"]))) is not None:
            jsonschema.validate(found["spec"], schema)
            assert found.keys() == {"apiVersion", "kind", "metadata", "spec"}
            for _, pod in pods([found]):
                whole = {
                    "apiVersion": "v1",
                    "kind": "Pod",
                    **pod,
                    "metadata": {"name": "p", **pod["metadata"]},
                }
                kubernetes_validate.validate(whole, version, strict=True)
        else:
            kubernetes_validate.validate(found, version, strict=True)


@pytest.mark.parametrize("name", SCENARIOS)
def test_helm_finds_nothing_to_say(name: str) -> None:
    result = lint(str(CHART), scenario(name), strict=True, kube_version="1.36")
    assert [said["error"] for said in result["messages"]] == ["icon is recommended"]
    assert not result["errors"]


def test_image_volumes_need_a_kubernetes_that_has_them(capfd: pytest.CaptureFixture[str]) -> None:
    """Helm's linter alone can be told a version; a template's refusal is a line of its log."""
    lint(str(CHART), scenario("multi-node"), kube_version="1.29")
    assert "image volumes need Kubernetes 1.31, and this is v1.29; use a claim" in capfd.readouterr().err
    lint(str(CHART), scenario("multi-node"), kube_version="1.31")
    assert "image volumes" not in capfd.readouterr().err


def test_the_scenarios_are_what_is_promised() -> None:
    assert {"cpu", "one-gpu", "two-precisions", "multi-node", "scaled"} <= set(SCENARIOS)


def test_the_schema_is_the_written_one() -> None:
    assert SCHEMA.read_text(encoding="utf-8") == schema_text(), "run python -m deploy.chart"


def test_schema_and_default_values_know_the_same_fields() -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))

    def compare(values: Any, part: Any, where: str) -> None:
        part = schema["definitions"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part
        properties = part.get("properties")
        if properties is None or where in ("gateway.config", "quantize.plan"):
            return
        if where != "":
            assert part["additionalProperties"] is False, where
        assert set(properties) - {"global"} == set(values), where
        for name, value in values.items():
            if isinstance(value, dict):
                compare(value, properties[name], f"{where}.{name}".strip("."))

    compare(yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8")), schema, "")


# what belongs together


@pytest.mark.parametrize("name", SCENARIOS)
def test_selectors_select_and_ports_exist(name: str) -> None:
    objects = render(scenario(name))
    all_pods = [pod for _, pod in pods(objects)]
    for service in of_kind(objects, "Service"):
        selected = [pod for pod in all_pods if selects(service["spec"]["selector"], pod)]
        assert selected, service["metadata"]["name"]
        for port in service["spec"]["ports"]:
            for pod in selected:
                names = {p["name"] for c in pod["spec"]["containers"] for p in c.get("ports", ())}
                assert port["targetPort"] in names
    for kind in ("PodDisruptionBudget", "ServiceMonitor", "PodMonitor", "InferencePool"):
        for found in of_kind(objects, kind):
            wanted = found["spec"]["selector"]["matchLabels"]
            targets = of_kind(objects, "Service") if kind == "ServiceMonitor" else all_pods
            assert any(selects(wanted, target) for target in targets), (kind, found["metadata"]["name"])
    for policy in of_kind(objects, "NetworkPolicy"):
        wanted = policy["spec"]["podSelector"]["matchLabels"]
        assert any(selects(wanted, pod) for pod in all_pods)
        for rule in policy["spec"]["ingress"]:
            for peer in rule["from"]:
                if "podSelector" in peer:
                    assert any(selects(peer["podSelector"]["matchLabels"], pod) for pod in all_pods)
            assert {port["port"] for port in rule.get("ports", ())} <= {8000}
    workloads = [*of_kind(objects, "Deployment"), *of_kind(objects, "LeaderWorkerSet")]
    targets = {(found["kind"], found["metadata"]["name"]) for found in workloads}
    for found in [*of_kind(objects, "HorizontalPodAutoscaler"), *of_kind(objects, "ScaledObject")]:
        target = found["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) in targets
        (scaled,) = (w for w in workloads if w["metadata"]["name"] == target["name"])
        assert "replicas" not in scaled["spec"], "two would set it"
    for found in of_kind(objects, "Deployment"):
        assert selects(found["spec"]["selector"]["matchLabels"], found["spec"]["template"])
    services = {found["metadata"]["name"]: found for found in of_kind(objects, "Service")}
    for found in [*of_kind(objects, "Ingress"), *of_kind(objects, "HTTPRoute")]:
        text = json.dumps(found)
        assert RELEASE in services
        assert f'"name": "{RELEASE}"' in text


@pytest.mark.parametrize("name", SCENARIOS)
def test_what_is_mounted_is_there(name: str) -> None:
    objects = render(scenario(name))
    maps = {found["metadata"]["name"] for found in of_kind(objects, "ConfigMap")}
    claims = {found["metadata"]["name"] for found in of_kind(objects, "PersistentVolumeClaim")}
    values = scenario(name)
    given = {values.get("variants", {}).get("existingClaim")}
    for owner, pod in pods(objects):
        volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", ())}
        used = {mount["name"] for c in containers(pod) for mount in c.get("volumeMounts", ())}
        assert used == set(volumes), owner["metadata"]["name"]
        for volume in volumes.values():
            if "configMap" in volume and volume["name"] != "tasks":
                assert volume["configMap"]["name"] in maps
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims | given


@pytest.mark.parametrize("name", SCENARIOS)
def test_names_are_unique_and_labelled(name: str) -> None:
    objects = render(scenario(name))
    names = [(found["kind"], found["metadata"]["name"]) for found in objects]
    assert len(set(names)) == len(names)
    for found in objects:
        assert labels(found)["app.kubernetes.io/instance"] == RELEASE
        assert len(found["metadata"]["name"]) <= 63


@pytest.mark.parametrize("name", SCENARIOS)
def test_pods_are_restricted(name: str) -> None:
    """Kubernetes' restricted profile, and more."""
    for owner, pod in pods(render(scenario(name))):
        where, spec = owner["metadata"]["name"], pod["spec"]
        assert spec["automountServiceAccountToken"] is False, where
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        allowed = {"configMap", "emptyDir", "persistentVolumeClaim", "secret", "image"}
        assert all((volume.keys() - {"name"}) <= allowed for volume in spec.get("volumes", ()))
        for container in containers(pod):
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert security["readOnlyRootFilesystem"] is True
            assert container["resources"]["requests"]["memory"]
            image = container["image"]
            assert "@sha256:" in image or not image.endswith((":latest", ":")), image
            for port in container.get("ports", ()):
                assert "hostPort" not in port


@pytest.mark.parametrize("name", SCENARIOS)
def test_streams_are_finished_and_loading_is_waited_for(name: str) -> None:
    for owner, pod in pods(render(scenario(name))):
        (first, *_) = pod["spec"]["containers"]
        if "startupProbe" not in first:
            continue
        slept = int(first["lifecycle"]["preStop"]["exec"]["command"][1])
        assert pod["spec"]["terminationGracePeriodSeconds"] > 600 + slept
        startup, live, ready = (first[f"{kind}Probe"] for kind in ("startup", "liveness", "readiness"))
        assert live != ready
        if first["name"] == "engine":
            values = scenario(name)
            variant = labels(pod)["tiercel.dev/variant"]
            pool = changed({"startupSeconds": 900}, values["pools"][variant])
            assert startup["periodSeconds"] * startup["failureThreshold"] >= pool["startupSeconds"]
            if owner["kind"] == "Deployment":
                assert owner["spec"]["progressDeadlineSeconds"] > pool["startupSeconds"]


# what the pods are told


def gateway_config(objects: list[Object], name: str = RELEASE) -> Config:
    (found,) = (m for m in of_kind(objects, "ConfigMap") if m["metadata"]["name"] == name)
    return parse_config(found["data"]["tiercel.yaml"], f"ConfigMap {name}", Path("/etc/tiercel"))


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_gateway_reads_its_configuration(name: str) -> None:
    values = scenario(name)
    config = gateway_config(render(values))
    assert set(config.serve) == set(config.pools) == set(values["pools"])
    assert config.gateway.host == "0.0.0.0"
    assert config.gateway.shutdown_timeout_s == 600
    assert set(config.roles) == set(values["gateway"]["config"]["roles"])
    services = {found["metadata"]["name"] for found in of_kind(render(values), "Service")}
    for urls in config.pools.values():
        (url,) = urls
        service, namespace = re.fullmatch(r"dns\+http://([^.]+)\.([^.]+)\.svc:8000", url).groups()
        assert service in services
        assert namespace == NAMESPACE


def test_large_numbers_stay_numbers() -> None:
    objects = render(scenario("two-precisions"))
    assert gateway_config(objects).gateway.max_body_bytes == 10_000_000
    assert "--max-num-seqs=1000000" in engine_arguments(objects)["int4-kv8"]


def test_the_store_and_providers_come_from_secrets() -> None:
    objects = render(scenario("scaled"))
    assert gateway_config(objects).watch.store_env == "TIERCEL_WATCH_STORE"
    assert gateway_config(objects).responses.store_env == "TIERCEL_WATCH_STORE"
    (gateway,) = (pod for owner, pod in pods(objects) if owner["metadata"]["name"] == RELEASE)
    environment = {entry["name"]: entry for entry in gateway["spec"]["containers"][0]["env"]}
    assert environment["TIERCEL_WATCH_STORE"]["valueFrom"]["secretKeyRef"] == {
        "name": "tiercel-store",
        "key": "url",
    }
    assert environment["OPENAI_API_KEY"]["valueFrom"]["secretKeyRef"]["name"] == "providers"


def test_tls() -> None:
    objects = render(scenario("one-gpu"))
    config = gateway_config(objects)
    (pod,) = (pod for owner, pod in pods(objects) if owner["metadata"]["name"] == RELEASE)
    (container,) = pod["spec"]["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert mounts[str(config.gateway.tls_certificate.parent)] == "tls"
    assert {
        container[f"{kind}Probe"]["httpGet"]["scheme"] for kind in ("startup", "liveness", "readiness")
    } == {"HTTPS"}


def engine_arguments(objects: list[Object]) -> dict[str, list[str]]:
    """Command line of each pool's engine after ``vllm serve``; of several pods both kinds."""
    injected = {"LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "10.0.0.1"}
    found: dict[str, list[str]] = {}
    for _, pod in pods(objects):
        for container in pod["spec"]["containers"]:
            if container["name"] == "engine":
                rank = labels(pod).get("tiercel.dev/rank", "leader")
                name = labels(pod)["tiercel.dev/variant"] + (" worker" if rank == "worker" else "")
                assert container["command"][:2] == ["vllm", "serve"]
                found[name] = [container["command"][2]] + [
                    re.sub(r"\$\((\w+)\)", lambda match: injected[match[1]], argument)
                    for argument in container["args"]
                ]
    return found


def test_ranks() -> None:
    arguments = engine_arguments(render(scenario("multi-node")))
    assert {"--tensor-parallel-size=8", "--pipeline-parallel-size=2", "--nnodes=2"} <= set(arguments["fp8"])
    assert "--headless" not in arguments["fp8"]
    assert "--headless" in arguments["fp8 worker"]
    assert "--tensor-parallel-size=4" in arguments["w4a16_g128"]


@pytest.mark.engine
def test_vllm_understands_the_arguments() -> None:
    lines = {
        f"{name} {variant}": arguments
        for name in SCENARIOS
        for variant, arguments in engine_arguments(render(scenario(name))).items()
    }
    parsed = parsed_by_vllm(lines)
    assert parsed["two-precisions int4-kv8"]["max_num_seqs"] == 1_000_000
    assert parsed["two-precisions int4-kv8"]["kv_cache_dtype"] == "fp8_e4m3"
    assert parsed["multi-node fp8 worker"]["headless"] is True
    assert parsed["multi-node fp8"]["nnodes"] == 2
    assert all(line["scheduling_policy"] == "priority" for line in parsed.values())


def quantize_job(values: dict[str, Any]) -> Object:
    (found,) = of_kind(render(values), "Job")
    return found


def test_the_job_runs_commands_that_there_are() -> None:
    values = changed(
        scenario("two-precisions"),
        {"quantize": {"plan": [{"name": "planned", "bits": 4.5}, {"name": "small", "bytes": 5_000_000_000}]}},
    )
    job = quantize_job(values)
    script = job["spec"]["template"]["spec"]["containers"][0]["command"][2]
    lines = [line.split() for line in script.splitlines() if line.strip()]
    assert [line[:3] for line in lines] == [
        ["tiercel", "quantize", "make"],
        ["tiercel", "quantize", "plan"],
        ["tiercel", "quantize", "plan"],
        ["tiercel", "variants", "list"],
    ]
    parsed = [parser().parse_args(line[1:]) for line in lines]
    assert parsed[0].variants == ["int4-kv8"]
    assert (parsed[1].name, parsed[1].bits) == ("planned", 4.5)
    assert parsed[2].bytes == 5_000_000_000
    config = gateway_config(render(values), f"{RELEASE}-quantize")
    assert str(config.model.path) == "/models/meta-llama--Llama-3.1-8B-Instruct"
    assert config.gateway.loopback
    assert not config.keys
    assert set(config.roles) == {"intent_classifier", "core"}, "the same budgets that the gateway has"


def test_another_job_has_another_name() -> None:
    values = scenario("two-precisions")
    names = {
        quantize_job(changed(values, changes))["metadata"]["name"]
        for changes in ({}, {"quantize": {"make": ["int4-kv8", "int8"]}}, {"model": {"name": "other"}})
    }
    assert len(names) == 3
    assert quantize_job(values)["metadata"]["name"] in names, "and the same one the same"


def test_another_configuration_is_another_pod() -> None:
    def checksum(changes: dict[str, Any]) -> str:
        objects = render(changed(scenario("cpu"), changes))
        (gateway,) = (pod for owner, pod in pods(objects) if owner["metadata"]["name"] == RELEASE)
        found: str = gateway["metadata"]["annotations"]["checksum/config"]
        return found

    assert checksum({}) == checksum({"gateway": {"service": {"port": 8080}}})
    assert checksum({}) != checksum({"gateway": {"config": {"roles": {"core": {"wait_s": 3}}}}})
    assert checksum({}) != checksum({"pools": {"int4": {}}})


def test_scaling_is_by_single_numbers() -> None:
    objects = render(scenario("scaled"))
    found = {scaled["metadata"]["name"]: scaled["spec"] for scaled in of_kind(objects, "ScaledObject")}
    assert found[f"{RELEASE}-int8"]["minReplicaCount"] == 0
    for spec in found.values():
        for trigger in spec["triggers"]:
            query = trigger["metadata"]["query"]
            assert query.startswith("sum("), query
            assert query.endswith("or vector(0)"), "no engine is no series, and that is a zero"
            assert f'namespace="{NAMESPACE}"' in query
    (monitor,) = of_kind(objects, "PodMonitor")
    assert monitor["spec"]["podTargetLabels"] == ["tiercel.dev/variant"], "what the queries select by"


def test_runbooks_are_linked() -> None:
    (rules,) = of_kind(render(scenario("scaled")), "PrometheusRule")
    alerts = [rule for group in rules["spec"]["groups"] for rule in group["rules"] if "alert" in rule]
    assert alerts
    for alert in alerts:
        assert (
            alert["annotations"]["runbook_url"] == f"https://runbooks.example.com/tiercel/{alert['alert']}.md"
        )


def test_notes_say_what_to_do_next() -> None:
    assert "copy what" not in notes(scenario("cpu")).lower()
    assert "the claim variants" in notes(scenario("cpu"))
    assert "pods wait for their cards" in notes(scenario("two-precisions"))
    assert "https://127.0.0.1:8080" in notes(scenario("one-gpu"))


# scripts within


def test_pods_wait_for_their_cards(tmp_path: Path) -> None:
    (pod,) = (p for o, p in pods(render(scenario("cpu"))) if o["metadata"]["name"] == RELEASE)
    (wait,) = pod["spec"]["initContainers"]
    script = wait["command"][2].replace("/variants", str(tmp_path)).replace("sleep 5", "sleep 0.1")
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().endswith("bf16/current/card.json\n")
        for variant in ("bf16", "int8"):
            assert process.poll() is None
            card = tmp_path / variant / "current" / "card.json"
            card.parent.mkdir(parents=True)
            card.touch()
        assert process.wait(timeout=10) == 0


async def test_helm_test_sends_a_real_request() -> None:
    (pod,) = of_kind(render(scenario("one-gpu")), "Pod")
    (container,) = pod["spec"]["containers"]
    async with running_gateway() as stack:
        environment = {
            **os.environ,
            "TIERCEL_URL": stack.url,
            "TIERCEL_MODEL": "assistant",
            "TIERCEL_KEY": "k",
        }
        run = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", container["args"][0]),
            env=environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await run.communicate()
    assert run.returncode == 0, said.decode()
    assert b"completion_tokens" in said


# what is refused


@pytest.mark.parametrize(
    ("base", "changes", "sentence"),
    [
        (
            "cpu",
            {"model": {"reference": "fp16"}},
            'pools: has no pool for the reference "fp16"; add it, or set',
        ),
        ("cpu", {"pools": {"bf16": {"replica": 2}}}, "replica"),
        ("cpu", {"gatway": {}}, "gatway"),
        ("cpu", {"gateway": {"replicas": "two"}}, "replicas"),
        ("cpu", {"gateway": {"config": {"roles": {"core": {"bugdet": {}}}}}}, "bugdet"),
        ("cpu", {"gateway": {"config": {"keys": []}}}, "gateway.config.keys: is empty"),
        ("cpu", {"gateway": {"config": {"keys": [{"name": "a", "sha256": "secret"}]}}}, "sha256"),
        (
            "cpu",
            {"gateway": {"config": {"default_role": "kern"}}},
            '"kern" is not a role; use one of: core, intent',
        ),
        ("cpu", {"gateway": {"config": {"default_role": ""}}}, "gateway.config.default_role: is empty"),
        (
            "cpu",
            {"gateway": {"config": {"watch": {"store": "postgresql://u:p@h/d"}}}},
            "put the URL into a secret",
        ),
        (
            "cpu",
            {"gateway": {"replicas": 3}},
            "gateway.replicas: several gateways must share what the watch knows",
        ),
        (
            "cpu",
            {"pools": {"int8": {"gpus": 1, "tensorParallel": 2}}},
            "pools.int8.gpus: is 1, but tensorParallel 2",
        ),
        ("cpu", {"pools": {"int8": {"nodes": 2}}}, "pools.int8.nodes: is 2, and a CPU engine"),
        (
            "cpu",
            {"pools": {"int8": {"image": {"repository": "vllm/vllm-openai"}}}},
            "is vLLM's image for GPUs",
        ),
        ("cpu", {"pools": {"int8": {"image": {"tag": "latest"}}}}, 'pools.int8.image.tag: "latest"'),
        (
            "cpu",
            {"gateway": {"image": {"tag": "latest"}}},
            'gateway.image.tag: "latest" is another image tomorrow',
        ),
        (
            "cpu",
            {"pools": None},
            "pools: is empty; give a pool per variant, at least the reference's: { bf16: {} }",
        ),
        (
            "cpu",
            {"gateway": {"config": {"roles": None}}},
            "gateway.config.roles: is empty; give at least one",
        ),
        ("cpu", {"pools": {"INT8": {}}}, "pools.int8: would be called prod-int8 as pools.INT8 is"),
        ("cpu", {"ingress": {"enabled": True}}, "ingress.host: is empty"),
        ("cpu", {"httpRoute": {"enabled": True}}, "httpRoute.parentRefs: is empty"),
        (
            "cpu",
            {"variants": {"image": {"reference": "r.example.com/v@sha256:1"}}},
            "both say where the variants are",
        ),
        ("cpu", {"quantize": {"enabled": True}}, "quantize.model: has 0 sources; give one of"),
        (
            "one-gpu",
            {"httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}]}},
            "let the Gateway end TLS and empty gateway.tlsSecret",
        ),
        (
            "multi-node",
            {"pools": {"fp8": {"tensorParallel": 4}}},
            "pools.fp8.gpus: is 8 on each of 2 nodes, but tensorParallel 4 x pipelineParallel 2 are 8 ranks",
        ),
        (
            "multi-node",
            {"pools": {"w4a16_g128": {"inferencePool": {"endpointPicker": ""}}}},
            "endpoint picker",
        ),
        (
            "multi-node",
            {"quantize": {"enabled": True, "model": {"existingClaim": "m"}}},
            "which nobody can write to",
        ),
        (
            "scaled",
            {"pools": {"int8": {"replicas": 2}}},
            "pools.int8.replicas: is fixed, and autoscaling is on",
        ),
        ("scaled", {"pools": {"bf16": {"autoscaling": {"minReplicas": 0}}}}, "what requests go up to"),
        ("scaled", {"pools": {"int8": {"autoscaling": {"minReplicas": 9}}}}, "9 is above maxReplicas 4"),
        ("scaled", {"engine": {"autoscaling": {"prometheus": ""}}}, "autoscaling.prometheus: is empty"),
        ("scaled", {"gateway": {"autoscaling": {"minReplicas": 20}}}, "20 is above maxReplicas 12"),
        ("scaled", {"watch": {"storeSecret": {"name": ""}}}, "several gateways must share"),
        (
            "scaled",
            {"gateway": {"config": {"responses": {"store": "postgresql://u:p@db/tiercel"}}}},
            "gateway.config.responses.store: may hold a password",
        ),
        (
            "two-precisions",
            {"gateway": {"config": {"roles": {"core": {"canary": {"variant": "int2"}}}}}},
            'roles.core.canary.variant: "int2" has no pool; add one, or use one of: bf16, int4-kv8',
        ),
        ("two-precisions", {"quantize": {"make": ["int8"]}}, "pools.int4-kv8: nobody makes it"),
        ("two-precisions", {"quantize": {"make": [], "plan": []}}, "name what the job is to make"),
        ("two-precisions", {"quantize": {"plan": [{"name": "p"}]}}, "plan"),
        ("two-precisions", {"quantize": {"model": {"existingClaim": "m"}}}, "has 2 sources"),
        *(
            ("cpu", {"gateway": {"config": {field: "x"}}}, f"gateway.config.{field}: is written by the chart")
            for field in WRITTEN_BY_THE_CHART
        ),
    ],
)
def test_values_that_cannot_be_used(base: str, changes: dict[str, Any], sentence: str) -> None:
    assert refusal(scenario(base)) == "accepted"
    assert sentence in refusal(changed(scenario(base), changes))
