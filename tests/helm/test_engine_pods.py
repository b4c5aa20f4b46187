"""What the chart tells the engines: arguments that vLLM knows, names, devices, who may ask them."""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.helm.chart import (
    NAMESPACE,
    RELEASE,
    SCENARIOS,
    Object,
    changed,
    labels,
    of_kind,
    parsed_by_vllm,
    pods,
    pools,
    render,
    scenario,
    selects,
    without_job,
)

MODELS = ("a", "a-b", "A-b", "a.b", "a/b", "meta-llama/Llama-3.1-8B-Instruct", "m" * 90, "m" * 89 + "n", "x-")
VARIANTS = ("b-c", "c", "b_c", "B-C", "int4-kv8", "v" * 70)


def engine_arguments(objects: list[Object]) -> dict[str, list[str]]:
    """Command line of each pool's engine after ``vllm serve``; of several pods both kinds."""
    injected = {"LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "10.0.0.1"}
    found: dict[str, list[str]] = {}
    for _, pod in pods(objects):
        for container in pod["spec"]["containers"]:
            if container["name"] == "engine":
                rank = labels(pod).get("tiercel.dev/rank", "leader")
                name = labels(pod)["tiercel.dev/pool"] + (" worker" if rank == "worker" else "")
                assert container["command"][:2] == ["vllm", "serve"]
                found[name] = [container["command"][2]] + [
                    re.sub(r"\$\((\w+)\)", lambda match: injected[match[1]], argument)
                    for argument in container["args"]
                ]
    return found


def test_ranks() -> None:
    arguments = engine_arguments(render(scenario("multi-node")))
    leader, worker = arguments["prod-big-fp8"], arguments["prod-big-fp8 worker"]
    assert {"--tensor-parallel-size=8", "--pipeline-parallel-size=2", "--nnodes=2"} <= set(leader)
    assert "--headless" not in leader
    assert "--headless" in worker
    (small,) = (found for name, found in arguments.items() if "w4a16" in name)
    assert "--tensor-parallel-size=4" in small


@pytest.mark.engine
def test_vllm_understands_the_arguments() -> None:
    lines = {
        f"{name} {pool}": arguments
        for name in SCENARIOS
        for pool, arguments in engine_arguments(render(scenario(name))).items()
    }
    parsed = parsed_by_vllm(lines)
    assert parsed["two-precisions prod-llama-int4-kv8"]["max_num_seqs"] == 256
    assert parsed["two-precisions prod-llama-int4-kv8"]["kv_cache_dtype"] == "fp8_e4m3"
    assert parsed["multi-node prod-big-fp8 worker"]["headless"] is True
    assert parsed["multi-node prod-big-fp8"]["nnodes"] == 2
    assert all(line["scheduling_policy"] == "priority" for line in parsed.values())
    assert all(line["shutdown_timeout"] == 600 for line in parsed.values())


def test_what_engines_compile_is_kept_while_a_pod_lives_or_in_a_claim() -> None:
    def caches(values: dict[str, Any]) -> list[dict[str, Any]]:
        found = [pod["spec"] for _, pod in pods(render(changed(scenario("multi-node"), values)))]
        volumes = [one for spec in found for one in spec.get("volumes", ()) if one["name"] == "cache"]
        return [{key: found for key, found in volume.items() if key != "name"} for volume in volumes]

    own, kept = caches({}), caches({"engine": {"cacheClaim": "engine-cache"}})
    assert len(own) == len(kept) == 3
    assert own == [{"emptyDir": {"sizeLimit": "10Gi"}}] * 3
    assert kept == [{"persistentVolumeClaim": {"claimName": "engine-cache"}}] * 3


def test_large_numbers_stay_numbers() -> None:
    """Helm's are floats, and its own way of writing a million is 1e+06."""
    large = {"engine": {"maxNumSeqs": 1_000_000, "maxModelLen": 1_048_576}}
    for arguments in engine_arguments(render(changed(scenario("cpu"), large))).values():
        assert {"--max-num-seqs=1000000", "--max-model-len=1048576"} <= set(arguments)


def test_what_a_pool_leaves_out_is_its_models_and_then_the_charts() -> None:
    values = changed(
        scenario("cpu"),
        {
            "models": {
                "assistant": {"engine": {"maxNumSeqs": 7, "gpus": 0}, "pools": {"int8": {"maxNumSeqs": 9}}}
            }
        },
    )
    arguments = engine_arguments(render(values))
    assert "--max-num-seqs=7" in arguments["prod-assistant-bf16"]
    assert "--max-num-seqs=9" in arguments["prod-assistant-int8"]
    assert "--max-model-len=8192" in arguments["prod-assistant-int8"]


def test_pools_of_any_models_and_variants_have_names_of_their_own() -> None:
    """Objects and labels are named by what a cluster takes: 63 characters, no slash, no capitals."""
    names, selectors = set(), set()
    for model, variant in itertools.product(MODELS, VARIANTS):
        values = changed(scenario("cpu"), {"models": None})
        values["models"] = {model: {"reference": variant, "pools": {variant: {}}}}
        values["gateway"]["config"]["roles"] = {"core": {}}
        objects = render(values)
        ((owner, pod),) = pools(objects).values()
        (service,) = (s for s in of_kind(objects, "Service") if s["metadata"]["name"] != RELEASE)
        assert service["metadata"]["name"] == owner["metadata"]["name"]
        assert selects(service["spec"]["selector"], pod)
        names.add(owner["metadata"]["name"])
        selectors.add(labels(pod)["tiercel.dev/pool"])
        for value in labels(pod).values():
            assert re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", value), value
    assert len(names) == len(selectors) == len(MODELS) * len(VARIANTS)
    for name in names:
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name)
        assert len(name) <= 48, "LeaderWorkerSet adds to it, and a label holds 63"


def test_gpus_come_by_the_device_plugin_or_by_claims() -> None:
    objects = render(scenario("multi-node"))
    found = {name: pod["spec"] for name, (_, pod) in pools(objects).items()}
    plain, claimed = found["big:fp8"], found["big:w4a16_g128"]
    assert plain["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert "resourceClaims" not in plain
    assert "nvidia.com/gpu" not in str(claimed)
    assert claimed["resourceClaims"] == [
        {"name": "gpus", "resourceClaimTemplateName": "four-gpus"},
        {"name": "fabric", "resourceClaimName": "rdma"},
    ]
    assert claimed["containers"][0]["resources"]["claims"] == [
        {"name": "gpus", "request": "gpus"},
        {"name": "fabric"},
    ]
    beside = changed(
        scenario("one-gpu"),
        {
            "engine": {
                "resourceClaims": [
                    {"name": "nic", "resourceClaimName": "nic", "request": request} for request in ("a", "b")
                ]
            }
        },
    )
    ((_, pod),) = pools(render(beside)).values()
    assert pod["spec"]["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 1}
    assert pod["spec"]["resourceClaims"] == [{"name": "nic", "resourceClaimName": "nic"}]
    assert [one["request"] for one in pod["spec"]["containers"][0]["resources"]["claims"]] == ["a", "b"]


def test_an_engine_on_cpus_computes_on_what_it_asks_for() -> None:
    for _, pod in pools(render(scenario("cpu"))).values():
        (engine,) = pod["spec"]["containers"]
        environment = {entry["name"]: entry for entry in engine["env"]}
        threads = environment["OMP_NUM_THREADS"]["valueFrom"]["resourceFieldRef"]
        assert threads == {"containerName": "engine", "resource": "requests.cpu", "divisor": "1"}
        (mount,) = (
            mount
            for mount in engine["volumeMounts"]
            if mount["mountPath"] == environment["PYTHONPATH"]["value"]
        )
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        (site,) = (
            found
            for found in of_kind(render(scenario("cpu")), "ConfigMap")
            if found["metadata"]["name"] == volumes[mount["name"]]["configMap"]["name"]
        )
        assert "ARCH_REQ_XCOMP_PERM" in site["data"]["sitecustomize.py"]


def may_ask(objects: list[Object], engine: Object, peer: dict[str, str], namespace: dict[str, str]) -> bool:
    """Whether a policy lets pods of those labels, in a namespace of those, to an engine's port."""
    policies = [
        policy
        for policy in of_kind(objects, "NetworkPolicy")
        if selects(policy["spec"]["podSelector"]["matchLabels"], engine)
    ]
    own = {"kubernetes.io/metadata.name": NAMESPACE}
    for rule in (rule for policy in policies for rule in policy["spec"]["ingress"]):
        for given in rule["from"]:
            there = given.get("namespaceSelector", {}).get("matchLabels", own)
            labelled = given.get("podSelector", {}).get("matchLabels", {})
            if there.items() <= namespace.items() and labelled.items() <= peer.items():
                return True
    return not policies


def test_the_endpoint_picker_and_the_gateway_api_reach_the_engines_of_an_inference_pool() -> None:
    objects = render(scenario("multi-node"))
    here, gateways = ({"kubernetes.io/metadata.name": name} for name in (NAMESPACE, "gateways"))
    engines = {name: pod for name, (_, pod) in pools(objects).items()}
    assert may_ask(objects, engines["big:w4a16_g128"], {"app": "picker"}, here)
    assert may_ask(objects, engines["big:w4a16_g128"], {"app": "envoy"}, gateways)
    assert not may_ask(objects, engines["big:fp8"], {"app": "picker"}, here), "it is in no inference pool"
    for engine in engines.values():
        assert not may_ask(objects, engine, {"app": "anything"}, here)
        (gateway,) = (
            p for o, p in pods(objects) if o["metadata"]["name"] == RELEASE and o["kind"] == "Deployment"
        )
        assert may_ask(objects, engine, labels(gateway), here)


def test_scaling_is_by_single_numbers() -> None:
    objects = render(scenario("scaled"))
    found = {scaled["metadata"]["name"]: scaled["spec"] for scaled in of_kind(objects, "ScaledObject")}
    assert found["prod-assistant-int8"]["minReplicaCount"] == 0
    for name, spec in found.items():
        for trigger in spec["triggers"]:
            query = trigger["metadata"]["query"]
            assert query.startswith("sum("), query
            assert query.endswith("or vector(0)"), "no engine is no series, and that is a zero"
            assert f'namespace="{NAMESPACE}"' in query
            variant = name.rpartition("-")[2]
            own = f'tiercel_dev_pool="{name}"', f'model="assistant",variant="{variant}"'
            assert any(labels in query for labels in own), "another pool's traffic is no reason"
    (monitor,) = of_kind(objects, "PodMonitor")
    assert "tiercel.dev/pool" in monitor["spec"]["podTargetLabels"], "what the queries select by"


def test_a_pod_does_not_wait_for_a_variant(tmp_path: Path) -> None:
    """It would hold its GPUs meanwhile, and who makes the variant may need them."""
    for name in SCENARIOS:
        for served, (_, pod) in pools(render(without_job(scenario(name)))).items():
            (looks,) = pod["spec"]["initContainers"]
            script = looks["command"][2].replace("/variants", str(tmp_path / name))
            run = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=10)
            assert run.returncode == 1
            assert f"make {served} first" in run.stderr
            directory = pod["spec"]["containers"][0]["command"][2].replace("/variants", str(tmp_path / name))
            Path(directory).mkdir(parents=True)
            (Path(directory) / "card.json").touch()
            assert subprocess.run(["sh", "-c", script], timeout=10).returncode == 0


def replicas(values: dict[str, Any]) -> dict[str, int | None]:
    return {name: owner["spec"].get("replicas") for name, (owner, _) in pools(render(values)).items()}


def test_pools_of_what_the_job_makes_have_no_pods_until_it_has_ended() -> None:
    for name in ("two-precisions", "two-models"):
        values = scenario(name)
        assert set(replicas(values).values()) == {0}
        assert 0 not in replicas(without_job(values)).values()
    # One variant more of a model that is served: the others go on.
    more = changed(
        scenario("two-precisions"),
        {
            "variants": {"existingClaim": "variants"},
            "models": {"llama": {"pools": {"int8": {"replicas": 2}}, "quantize": {"make": ["int8"]}}},
        },
    )
    assert replicas(more) == {"llama:bf16": 1, "llama:int4-kv8": 1, "llama:int8": 0}
    assert replicas(without_job(more))["llama:int8"] == 2
    scaling = changed(
        more,
        {"engine": {"autoscaling": {"enabled": True, "prometheus": "http://p"}}},
    )
    scaling["models"]["llama"]["pools"]["int8"] = {}
    scaled = {found["metadata"]["name"] for found in of_kind(render(scaling), "ScaledObject")}
    assert scaled == {"prod-llama-bf16", "prod-llama-int4-kv8"}, "nobody wakes a pool that the job holds back"
