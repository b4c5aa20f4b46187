"""The chart, rendered by Helm itself without a cluster."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from helm_python import Chart, HelmRenderError, HelmValuesError

from gateway.config import Config, parse_config

CHART = Path(__file__).parents[2] / "helm" / "tiercel"
ENGINE_PYTHON = Path(__file__).parents[2] / ".venv-engine" / "bin" / "python"
SCENARIOS = tuple(sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").iterdir()))
RELEASE, NAMESPACE = "prod", "agents"

Object = dict[str, Any]


def scenario(name: str) -> dict[str, Any]:
    """A scenario's values, anew each time."""
    found: dict[str, Any] = yaml.safe_load((CHART / "ci" / f"{name}-values.yaml").read_text(encoding="utf-8"))
    return found


def changed(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Values with others laid over them, as Helm does; None removes."""
    found = dict(values)
    for name, value in changes.items():
        if value is None:
            found.pop(name, None)
        elif isinstance(value, Mapping) and isinstance(found.get(name), Mapping):
            found[name] = changed(found[name], value)
        else:
            found[name] = value
    return found


@cache
def chart() -> Chart:
    return Chart.load(str(CHART))


def render(values: Mapping[str, Any], name: str = RELEASE, upgrade: bool = False) -> list[Object]:
    """Every object that would be applied. Raises HelmRenderError (templates), HelmValuesError (schema)."""
    return _rendered(json.dumps(values), name, upgrade)


@cache
def _rendered(values: str, name: str, upgrade: bool) -> list[Object]:
    texts = chart().render(
        json.loads(values), name=name, namespace=NAMESPACE, is_install=not upgrade, is_upgrade=upgrade
    )
    return [
        found
        for path, text in texts.items()
        if not path.endswith("NOTES.txt")
        for found in yaml.load_all(text, yaml.CSafeLoader)
        if found
    ]


def notes(values: Mapping[str, Any]) -> str:
    texts = chart().render(dict(values), name=RELEASE, namespace=NAMESPACE)
    return next(text for path, text in texts.items() if path.endswith("NOTES.txt"))


def refusal(values: Mapping[str, Any], upgrade: bool = False) -> str:
    """What Helm says of values that cannot be used."""
    try:
        render(values, upgrade=upgrade)
    except (HelmRenderError, HelmValuesError) as error:
        return str(error)
    return "accepted"


def parsed_by_vllm(lines: Mapping[str, list[str]]) -> dict[str, dict[str, Any]]:
    """What vLLM's own parser makes of arguments of ``vllm serve``, by name."""
    run = subprocess.run(
        [str(ENGINE_PYTHON), str(Path(__file__).with_name("parse_serve.py"))],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore", "VLLM_LOGGING_LEVEL": "ERROR"},
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(run.stdout.splitlines()[-1])
    assert set(found) == set(lines)
    return found


def of_kind(objects: Iterable[Object], kind: str) -> list[Object]:
    return [found for found in objects if found["kind"] == kind]


def pods(objects: Iterable[Object]) -> Iterator[tuple[Object, Object]]:
    """Every pod template, with its labels and its spec, beside the object that it is of."""
    for found in objects:
        spec = found.get("spec", {})
        if found["kind"] == "Pod":
            yield found, found
        elif found["kind"] in ("Deployment", "Job"):
            yield found, spec["template"]
        elif found["kind"] == "LeaderWorkerSet":
            yield found, spec["leaderWorkerTemplate"]["leaderTemplate"]
            yield found, spec["leaderWorkerTemplate"]["workerTemplate"]


def pools(objects: Iterable[Object]) -> dict[str, tuple[Object, Object]]:
    """The pool of every ``model:variant``: its Deployment or LeaderWorkerSet, and the pod that answers."""
    found = {}
    for owner, pod in pods(objects):
        (first, *_) = pod["spec"]["containers"]
        if first["name"] == "engine" and labels(pod).get("tiercel.dev/rank") != "worker":
            (model,) = (arg.partition("=")[2] for arg in first["args"] if arg.startswith("--served-model"))
            found[f"{model}:{first['command'][2].split('/')[-2]}"] = (owner, pod)
    return found


def fullname(objects: Iterable[Object]) -> str:
    """What the gateway's objects are called."""
    (service,) = (
        found
        for found in of_kind(objects, "Service")
        if labels(found)["app.kubernetes.io/component"] == "gateway"
    )
    name: str = service["metadata"]["name"]
    return name


def gateway_config(objects: Iterable[Object], part: str = "") -> Config:
    """The configuration of the gateway, or (``-quantize``) of the job, as its own class reads it."""
    name = fullname(objects) + part
    (found,) = (one for one in of_kind(objects, "ConfigMap") if one["metadata"]["name"] == name)
    return parse_config(found["data"]["tiercel.yaml"], f"ConfigMap {name}", Path("/etc/tiercel"))


def without_job(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values after the job has ended: what is made is served."""
    return changed(values, {"quantize": {"enabled": False}})


def containers(pod: Object) -> list[Object]:
    return [*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]]


def labels(pod: Object) -> dict[str, str]:
    found: dict[str, str] = pod["metadata"]["labels"]
    return found


def selects(selector: Mapping[str, str], pod: Object) -> bool:
    return selector.items() <= labels(pod).items()
