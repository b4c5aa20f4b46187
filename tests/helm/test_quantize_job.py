"""The job that makes variants: what it runs, what it is given, and what it downloads."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from deploy.cli import parser
from tests.helm.chart import (
    Object,
    changed,
    containers,
    gateway_config,
    of_kind,
    render,
    scenario,
    without_job,
)

REVISION = "0e9e39f249a16976918f6564b8830bc894c89659"
BOTH = changed(
    scenario("two-models"),
    {"models": {"small": {"quantize": {"make": ["bf16"], "plan": [{"name": "planned", "bits": 4.5}]}}}},
)


def quantize_job(values: dict[str, Any]) -> Object:
    (found,) = of_kind(render(values), "Job")
    return found


def steps(values: dict[str, Any]) -> dict[str, Object]:
    """The job's containers by name, in the order in which they run."""
    return {one["name"]: one for one in containers(quantize_job(values)["spec"]["template"])}


def commands(values: dict[str, Any]) -> list[list[str]]:
    """The lines that its containers run, one after the other."""
    scripts = [one["command"][2] for one in steps(values).values() if one["command"][0] == "sh"]
    return [shlex.split(line) for script in scripts for line in script.splitlines() if line.strip()]


def test_the_job_runs_commands_that_there_are() -> None:
    lines = commands(BOTH)
    assert [line[:3] for line in lines] == [
        ["tiercel", "quantize", "make"],
        ["tiercel", "quantize", "make"],
        ["tiercel", "quantize", "plan"],
        ["tiercel", "quantize", "measure"],
        ["tiercel", "variants", "list"],
    ]
    large, small, plan, again, _ = (parser().parse_args(line[1:]) for line in lines)
    assert (large.model, large.variants) == ("Qwen/Qwen3-8B", ["bf16", "int8"])
    assert (small.model, small.variants) == ("small", ["bf16"])
    assert (plan.model, plan.name, plan.bits) == ("small", "planned", 4.5)
    assert again.model == "Qwen/Qwen3-8B", "what it is compared with may have been measured after it"
    alone = changed(
        scenario("two-precisions"),
        {"models": {"llama": {"quantize": {"plan": [{"name": "s", "bytes": 5_000_000_000}]}}}},
    )
    (sized,) = (parser().parse_args(line[1:]) for line in commands(alone) if "plan" in line)
    assert sized.bytes == 5_000_000_000
    assert "measure" not in str(commands(alone)), "one model is judged once"


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


def test_a_checkpoint_is_where_the_job_looks_for_it() -> None:
    """What is configured is under a volume that the container mounts."""
    for name in ("two-precisions", "two-models"):
        config = gateway_config(render(scenario(name)), "-quantize")
        made = {f"quantize-{model}" for model in ("llama", "small", "qwen-qwen3-8")}
        ran = [one for called, one in steps(scenario(name)).items() if called.startswith(tuple(made))]
        assert len(ran) == len(config.models)
        for model, settings in config.models.items():
            mounts = [mount["mountPath"] for one in ran for mount in one["volumeMounts"]]
            assert settings.hub or any(
                str(settings.path).startswith(mount + "/") or str(settings.path) == mount for mount in mounts
            )
            for path in filter(None, (settings.calibration, *(role.tasks for role in config.roles.values()))):
                assert path.parent == Path("/tasks"), model
                assert "/tasks" in mounts


def test_models_are_made_one_after_the_other_with_what_each_needs() -> None:
    values = changed(
        BOTH, {"models": {"small": {"quantize": {"gpus": 0}}, "Qwen/Qwen3-8B": {"quantize": {"gpus": 4}}}}
    )
    job = quantize_job(values)["spec"]["template"]["spec"]
    large, small = job["initContainers"][0], job["containers"][0]
    assert large["resources"]["requests"] == {"cpu": "16", "memory": "96Gi"}
    assert large["resources"]["limits"] == {"nvidia.com/gpu": 4}
    assert small["resources"]["requests"] == {"cpu": "8", "memory": "64Gi"}
    assert "limits" not in small["resources"]


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
        pod = quantize_job(values)["spec"]["template"]["spec"]
        (found,) = (one for one in pod["volumes"] if one["name"] == "tasks")
        assert found == {"name": "tasks"} | volume
        (mount,) = (one for one in pod["containers"][0]["volumeMounts"] if one["name"] == "tasks")
        assert mount["mountPath"] == "/tasks"
        assert mount.get("subPath") == path


def test_another_job_has_another_name() -> None:
    values = scenario("two-precisions")

    def name(changes: dict[str, Any]) -> str:
        found: str = quantize_job(changed(values, changes))["metadata"]["name"]
        return found

    same = name({})
    assert name({}) == same
    assert name({"models": {"llama": {"pools": {"bf16": {"replicas": 3}}}}}) == same, "it would begin anew"
    assert name({"models": {"llama": {"quantize": {"make": ["bf16", "int4-kv8", "int8"]}}}}) != same
    assert name({"models": {"llama": {"revision": "main"}}}) != same
    assert name({"quantize": {"gpus": 2}}) != same
    assert not of_kind(render(without_job(values)), "Job")


def test_the_hub_is_asked_with_the_token_of_a_secret_and_nobody_else_is() -> None:
    environment = {one["name"]: one for one in steps(scenario("two-precisions"))["quantize-llama"]["env"]}
    assert "HF_HUB_OFFLINE" not in environment
    assert environment["HF_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "hub", "key": "token"}
    llama = gateway_config(render(scenario("two-precisions")), "-quantize").models["llama"]
    assert (llama.hub, llama.revision) == ("meta-llama/Llama-3.1-8B-Instruct", REVISION)
    for one in steps(scenario("two-models")).values():
        assert {"name": "HF_HUB_OFFLINE", "value": "1"} in one["env"]
        assert "HF_TOKEN" not in str(one["env"])
