"""The chart's objects: accepted by Kubernetes' own schemas in every version, and true to each other."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from helm_python import lint

from deploy.chart import (
    ENGINE_SITE,
    ENGINE_SITE_COPY,
    MAKING_OF_ONE_MODEL,
    OF_ONE_MODEL,
    SCHEMA,
    schema_text,
)
from tests.helm.chart import (
    CHART,
    RELEASE,
    SCENARIOS,
    containers,
    labels,
    of_kind,
    pods,
    pools,
    render,
    scenario,
    selects,
)
from tests.helm.crds import SPECS

# Each call reads megabytes of schemas, always the same.
kubernetes_validate.utils.schema_contents = cache(kubernetes_validate.utils.schema_contents)

VERSIONS = ["1.25", "1.28", "1.31", "1.34", "1.37"]
SINCE = {"multi-node": 34, "two-models": 31}
"""Minor version of Kubernetes that has all a scenario asks for; the chart refuses it before."""

# whole


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_accepts_every_object(name: str, version: str) -> None:
    if int(version.partition(".")[2]) < SINCE.get(name, 0):
        pytest.skip("the chart refuses what that version does not have")
    for found in render(scenario(name)):
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


@pytest.mark.parametrize(
    ("name", "version", "sentence"),
    [
        ("multi-node", "1.29", "image volumes need Kubernetes 1.31, and this is v1.29; use a claim"),
        ("two-models", "1.30", "image volumes need Kubernetes 1.31, and this is v1.30; use a claim"),
        ("multi-node", "1.33", "resourceClaims: need Kubernetes 1.34, and this is v1.33; use gpuResource"),
    ],
)
def test_what_a_kubernetes_does_not_have_is_refused(
    name: str, version: str, sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Helm's linter alone can be told a version; a template's refusal is a line of its log."""
    lint(str(CHART), scenario(name), kube_version=version)
    assert sentence in capfd.readouterr().err
    lint(str(CHART), scenario(name), kube_version="1.34")
    assert "Kubernetes 1." not in capfd.readouterr().err


def test_the_scenarios_are_what_is_promised() -> None:
    promised = {"cpu", "one-gpu", "two-precisions", "two-models", "multi-node", "scaled"}
    assert promised <= set(SCENARIOS)


def test_the_schema_is_the_written_one() -> None:
    assert SCHEMA.read_text(encoding="utf-8") == schema_text(), "run python -m deploy.chart"
    assert ENGINE_SITE_COPY.read_bytes() == ENGINE_SITE.read_bytes(), "run python -m deploy.chart"


def test_schema_and_default_values_know_the_same_fields() -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    gone = {"": {"global", *OF_ONE_MODEL}, "quantize": set(MAKING_OF_ONE_MODEL)}

    def compare(values: Any, part: Any, where: str) -> None:
        part = schema["definitions"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part
        properties = part.get("properties")
        if properties is None or where == "gateway.config":
            return
        if where != "":
            assert part["additionalProperties"] is False, where
        assert set(properties) - gone.get(where, set()) == set(values), where
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
                ours = "app.kubernetes.io/name" in peer.get("podSelector", {}).get("matchLabels", {})
                if ours:
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
        assert RELEASE in services
        assert f'"name": "{RELEASE}"' in json.dumps(found)


@pytest.mark.parametrize("name", SCENARIOS)
def test_what_is_mounted_is_there(name: str) -> None:
    objects = render(scenario(name))
    maps = {found["metadata"]["name"] for found in of_kind(objects, "ConfigMap")}
    claims = {found["metadata"]["name"] for found in of_kind(objects, "PersistentVolumeClaim")}
    values = scenario(name)
    quantize = values.get("quantize", {})
    places = [values.get("variants", {}), *(one for one in quantize.values() if isinstance(one, dict))]
    given = {place["existingClaim"] for place in places if "existingClaim" in place}
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
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", found["metadata"]["name"])
        assert len(found["metadata"]["name"]) <= 63


@pytest.mark.parametrize("name", SCENARIOS)
def test_pods_are_restricted(name: str) -> None:
    """Kubernetes' restricted profile, and more."""
    for owner, pod in pods(render(scenario(name))):
        where, spec = owner["metadata"]["name"], pod["spec"]
        assert spec["automountServiceAccountToken"] is False, where
        assert spec["enableServiceLinks"] is False, where
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
    for _, pod in pods(render(scenario(name))):
        (first, *_) = pod["spec"]["containers"]
        if "startupProbe" not in first:
            continue
        slept = int(first["lifecycle"]["preStop"]["exec"]["command"][1])
        assert pod["spec"]["terminationGracePeriodSeconds"] > 600 + slept
        assert first["livenessProbe"] != first["readinessProbe"]
        assert (first["name"] == "engine") == ("tiercel.dev/pool" in labels(pod))
        if first["name"] == "engine":
            grace = pod["spec"]["terminationGracePeriodSeconds"]
            assert "--shutdown-timeout=600" in first["args"], "or it cuts the streams that it is writing"
            assert grace >= slept + 600 + 30, "a process needs time to end as well"
    for name_of, (owner, pod) in pools(render(scenario(name))).items():
        model, _, variant = name_of.rpartition(":")
        given = scenario(name)["models"][model]["pools"][variant]
        seconds = given.get("startupSeconds", 900)
        startup = pod["spec"]["containers"][0]["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= seconds
        if owner["kind"] == "Deployment":
            assert owner["spec"]["progressDeadlineSeconds"] > seconds
