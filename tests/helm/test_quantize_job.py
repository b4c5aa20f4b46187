"""The job that makes variants: what it runs, what it is given, and what it downloads."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from deploy.cli import parser
from tests.helm.chart import (
    Object,
    changed,
    gateway_config,
    of_kind,
    render,
    scenario,
    without_job,
)

REVISION = "0e9e39f249a16976918f6564b8830bc894c89659"


def jobs(values: dict[str, Any]) -> dict[str, Object]:
    """The job of every model that has one."""
    found = {}
    for job in of_kind(render(values), "Job"):
        (container,) = job["spec"]["template"]["spec"]["containers"]
        (name, *_) = re.findall(r"--model (\S+)", container["command"][2])
        found[name] = job
    return found


def container(values: dict[str, Any], model: str) -> Object:
    (found,) = jobs(values)[model]["spec"]["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def commands(values: dict[str, Any], model: str) -> list[list[str]]:
    """The lines that a model's job runs, one after the other."""
    return [shlex.split(line) for line in container(values, model)["command"][2].splitlines()]


def test_the_jobs_run_commands_that_there_are() -> None:
    values = changed(
        scenario("two-models"),
        {
            "models": {
                "small": {
                    "quantize": {"plan": [{"name": "p", "bits": 4.5}, {"name": "s", "bytes": 5_000_000_000}]}
                }
            }
        },
    )
    assert set(jobs(values)) == {"Qwen/Qwen3-8B", "small"}
    lines = commands(values, "small")
    assert [line[:3] for line in lines] == [
        ["tiercel", "quantize", "make"],
        ["tiercel", "quantize", "plan"],
        ["tiercel", "quantize", "plan"],
        ["tiercel", "variants", "list"],
    ]
    made, plan, sized, _ = (parser().parse_args(line[1:]) for line in lines)
    assert (made.model, made.variants) == ("small", ["bf16"])
    assert (plan.model, plan.name, plan.bits) == ("small", "p", 4.5)
    assert sized.bytes == 5_000_000_000
    large = parser().parse_args(commands(values, "Qwen/Qwen3-8B")[0][1:])
    assert (large.model, large.variants) == ("Qwen/Qwen3-8B", ["bf16", "int8"])


def test_the_job_judges_by_the_roles_that_the_gateway_has() -> None:
    for name in ("two-precisions", "two-models"):
        objects = render(scenario(name))
        job, gateway = gateway_config(objects, "-quantize"), gateway_config(objects)
        assert job.roles == gateway.roles
        assert job.served == gateway.served
        assert job.default_model == gateway.default_model
        assert job.gateway.loopback
        assert not job.keys
        for model in job.models:
            assert job.of(model).variants_dir == gateway.of(model).variants_dir
            assert job.of(model).engine.max_model_len == gateway.of(model).engine.max_model_len


def test_a_checkpoint_is_where_its_job_looks_for_it() -> None:
    """What is configured is under a volume that the container mounts."""
    for name in ("two-precisions", "two-models"):
        config = gateway_config(render(scenario(name)), "-quantize")
        for model, settings in config.models.items():
            mounts = [Path(one["mountPath"]) for one in container(scenario(name), model)["volumeMounts"]]
            if settings.path is not None:
                assert any(settings.path.is_relative_to(mount) for mount in mounts)
            files = [settings.calibration, *(role.tasks for role in config.roles.values())]
            assert {path.parent for path in files if path is not None} == {Path("/tasks")} <= set(mounts)


def test_a_models_job_has_what_that_model_needs() -> None:
    values = changed(
        scenario("two-models"),
        {"models": {"small": {"quantize": {"gpus": 0, "nodeSelector": {"gpu": "no"}, "shm": "1Gi"}}}},
    )
    large, small = container(values, "Qwen/Qwen3-8B"), container(values, "small")
    assert large["resources"]["requests"] == {"cpu": "16", "memory": "96Gi"}
    assert large["resources"]["limits"] == {"nvidia.com/gpu": 1}
    assert small["resources"]["requests"] == {"cpu": "8", "memory": "64Gi"}
    assert "limits" not in small["resources"]
    pods = {model: job["spec"]["template"]["spec"] for model, job in jobs(values).items()}
    assert pods["small"]["nodeSelector"] == {"gpu": "no"}
    assert "nodeSelector" not in pods["Qwen/Qwen3-8B"]


def test_tasks_come_from_a_config_map_a_claim_or_an_image() -> None:
    for tasks, volume, path in (
        ({"configMap": "t"}, {"configMap": {"name": "t"}}, None),
        ({"existingClaim": "t"}, {"persistentVolumeClaim": {"claimName": "t", "readOnly": True}}, None),
        (
            {"existingClaim": "t", "path": "a/b"},
            {"persistentVolumeClaim": {"claimName": "t", "readOnly": True}},
            "a/b",
        ),
        (
            {"image": {"reference": "r/t:1"}},
            {"image": {"reference": "r/t:1", "pullPolicy": "IfNotPresent"}},
            None,
        ),
    ):
        values = changed(scenario("two-precisions"), {"quantize": {"tasks": {"configMap": ""} | tasks}})
        pod = jobs(values)["llama"]["spec"]["template"]["spec"]
        (found,) = (one for one in pod["volumes"] if one["name"] == "tasks")
        assert found == {"name": "tasks"} | volume
        (mount,) = (one for one in pod["containers"][0]["volumeMounts"] if one["name"] == "tasks")
        assert mount["mountPath"] == "/tasks"
        assert mount.get("subPath") == path


def test_another_job_has_another_name() -> None:
    values = scenario("two-precisions")

    def name(changes: dict[str, Any]) -> str:
        found: str = jobs(changed(values, changes))["llama"]["metadata"]["name"]
        return found

    same = name({})
    assert name({}) == same
    assert name({"models": {"llama": {"pools": {"bf16": {"replicas": 3}}}}}) == same, "it would begin anew"
    assert name({"models": {"llama": {"quantize": {"make": ["bf16", "int4-kv8", "int8"]}}}}) != same
    assert name({"models": {"llama": {"revision": "main"}}}) != same
    assert name({"quantize": {"gpus": 2}}) != same
    assert not of_kind(render(without_job(values)), "Job")


def test_the_hub_is_asked_with_the_token_of_a_secret_and_nobody_else_is() -> None:
    environment = {one["name"]: one for one in container(scenario("two-precisions"), "llama")["env"]}
    assert "HF_HUB_OFFLINE" not in environment
    assert environment["HF_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "hub", "key": "token"}
    llama = gateway_config(render(scenario("two-precisions")), "-quantize").models["llama"]
    assert (llama.hub, llama.revision) == ("meta-llama/Llama-3.1-8B-Instruct", REVISION)
    for model in jobs(scenario("two-models")):
        own = container(scenario("two-models"), model)["env"]
        assert {"name": "HF_HUB_OFFLINE", "value": "1"} in own
        assert "HF_TOKEN" not in str(own)
