"""Values that cannot work are refused by a sentence that names the field, the value and the fix."""

from __future__ import annotations

from typing import Any

import pytest

from deploy.chart import WRITTEN_BY_THE_CHART
from tests.helm.chart import changed, refusal, scenario, without_job


def pool(model: str, variant: str, **fields: Any) -> dict[str, Any]:
    """Changes to one pool."""
    return {"models": {model: {"pools": {variant: fields}}}}


@pytest.mark.parametrize(
    ("base", "changes", "sentence"),
    [
        (
            "cpu",
            {"models": {"assistant": {"reference": "fp16"}}},
            'models.assistant.pools: has no pool for the reference "fp16", which the watch asks; add it, set',
        ),
        ("cpu", pool("assistant", "bf16", replica=2), "replica"),
        ("cpu", {"gatway": {}}, "gatway"),
        ("cpu", {"models": {"assistant": {"serve": ["bf16"]}}}, "serve"),
        ("cpu", {"models": {"assistant:v2": {}}}, "assistant:v2"),
        ("cpu", {"fullnameOverride": "a" * 31}, "fullnameOverride"),
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
            pool("assistant", "int8", gpus=1, tensorParallel=2),
            "models.assistant.pools.int8.gpus: is 1, but tensorParallel 2",
        ),
        ("cpu", pool("assistant", "int8", nodes=2), "pools.int8.nodes: is 2, and a CPU engine"),
        (
            "cpu",
            pool("assistant", "int8", image={"repository": "vllm/vllm-openai"}),
            "is vLLM's image for GPUs",
        ),
        ("cpu", pool("assistant", "int8", image={"tag": "latest"}), 'pools.int8.image.tag: "latest"'),
        (
            "cpu",
            {"gateway": {"image": {"tag": "latest"}}},
            'gateway.image.tag: "latest" is another image tomorrow',
        ),
        ("cpu", {"models": None}, "models: is empty; give at least one: { NAME: { reference: bf16"),
        (
            "cpu",
            {"models": {"assistant": None, "other": {}}},
            "models.other.pools: is empty; give a pool per",
        ),
        ("cpu", {"models": {"other": {"pools": {"bf16": {}}}}}, "defaultModel: is empty; name the model of"),
        (
            "cpu",
            {"defaultModel": "asistant"},
            'defaultModel: "asistant" is not a model; use one of: assistant',
        ),
        (
            "cpu",
            {"gateway": {"config": {"roles": None}}},
            "gateway.config.roles: is empty; give at least one",
        ),
        (
            "cpu",
            {"gateway": {"config": {"roles": {"core": {"models": ["big"]}}}}},
            'roles.core.models: "big" is not a model; use some of: assistant',
        ),
        ("cpu", {"ingress": {"enabled": True}}, "ingress.host: is empty"),
        ("cpu", {"httpRoute": {"enabled": True}}, "httpRoute.parentRefs: is empty"),
        (
            "cpu",
            {"variants": {"image": {"reference": "r.example.com/v@sha256:1"}}},
            "both say where the variants are",
        ),
        ("cpu", {"quantize": {"enabled": True}}, "there is nothing to make; name it in models.NAME.quantize"),
        (
            "one-gpu",
            {"httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}]}},
            "let the Gateway end TLS and empty gateway.tlsSecret",
        ),
        ("one-gpu", {"engine": {"gpuResource": ""}}, "nothing asks for the 1 GPUs; give one of them"),
        ("one-gpu", {"engine": {"resourceClaims": [{"name": "gpu"}]}}, "resourceClaims"),
        (
            "multi-node",
            pool("big", "fp8", tensorParallel=4),
            "pools.fp8.gpus: is 8 on each of 2 nodes, but tensorParallel 4 x pipelineParallel 2 are 8 ranks",
        ),
        ("multi-node", pool("big", "w4a16_g128", inferencePool={"endpointPicker": ""}), "endpoint picker"),
        (
            "multi-node",
            pool("big", "w4a16_g128", inferencePool={"from": []}),
            "inferencePool.from: is empty, and the network policy lets nobody but the gateway to the engines",
        ),
        (
            "multi-node",
            {"quantize": {"enabled": True}, "models": {"big": {"hub": "a/b", "quantize": {"make": ["fp8"]}}}},
            "which nobody can write to",
        ),
        (
            "scaled",
            pool("assistant", "int8", replicas=2),
            "models.assistant.pools.int8.replicas: is fixed, and autoscaling is on",
        ),
        ("scaled", pool("assistant", "bf16", autoscaling={"minReplicas": 0}), "what requests go up to"),
        ("scaled", pool("assistant", "int8", autoscaling={"minReplicas": 9}), "9 is above maxReplicas 4"),
        ("scaled", {"engine": {"autoscaling": {"prometheus": ""}}}, "autoscaling.prometheus: is empty"),
        ("scaled", {"gateway": {"autoscaling": {"minReplicas": 20}}}, "20 is above maxReplicas 12"),
        ("scaled", {"watch": {"storeSecret": {"name": ""}}}, "several gateways must share"),
        (
            "scaled",
            {"gateway": {"config": {"responses": {"store": "postgresql://u:p@db/tiercel"}}}},
            "gateway.config.responses.store: may hold a password",
        ),
        (
            "scaled",
            {"gateway": {"config": {"kept": {"store": "postgresql://u:p@db/tiercel"}}}},
            "gateway.config.kept.store: may hold a password",
        ),
        ("one-gpu", {"gateway": {"config": {"kept": {}}}}, "gateway.config.kept.store_env: is empty"),
        (
            "one-gpu",
            {"gateway": {"config": {"kept": {"store_env": "KEPT_STORE"}}}},
            "gateway.config.kept.key_env: is empty, and what a pod has in its own directory is gone with it",
        ),
        (
            "two-precisions",
            {"gateway": {"config": {"roles": {"core": {"canary": {"variant": "int2"}}}}}},
            'roles.core.canary.variant: "int2" has no pool; add one, or use one of: llama:bf16, llama:int',
        ),
        (
            "two-precisions",
            {"models": {"llama": {"quantize": {"make": ["int8", "bf16"]}}}},
            "models.llama.pools.int4-kv8: nobody makes it: the claim is new, and the job makes int8, bf16",
        ),
        (
            "two-precisions",
            {"models": {"llama": {"quantize": {"make": ["int4-kv8"]}}}},
            "models.llama.pools.bf16: nobody makes it",
        ),
        ("two-precisions", {"models": {"llama": {"quantize": {"plan": [{"name": "p"}]}}}}, "plan"),
        (
            "two-precisions",
            {"models": {"llama": {"path": "llama"}}},
            "models.llama: its checkpoint has 2 sources (hub, path); give one of",
        ),
        ("two-precisions", {"models": {"llama": {"hub": None}}}, "its checkpoint has 0 sources; give one of"),
        (
            "two-precisions",
            {"models": {"llama": {"hub": None, "path": "llama"}}},
            'models.llama.path: "llama" lies in no claim; name it in quantize.checkpoints.existingClaim',
        ),
        (
            "two-models",
            {"models": {"small": {"revision": "main"}}},
            'models.small.revision: "main" is of a repository of the hub',
        ),
        (
            "two-precisions",
            {"quantize": {"tasks": {"configMap": ""}}},
            'roles.intent_classifier.tasks: "/tasks/intents.jsonl" is in quantize.tasks, which is empty',
        ),
        (
            "two-precisions",
            {"quantize": {"tasks": {"existingClaim": "claim"}}},
            "quantize.tasks: tiercel-tasks and claim all say where the files are",
        ),
        (
            "two-precisions",
            {"models": {"llama": {"calibration": "/data/calibration.jsonl"}}},
            'models.llama.calibration: "/data/calibration.jsonl" is no file that the job has',
        ),
        (
            "two-precisions",
            {"quantize": {"gpuResource": ""}},
            "models.llama.quantize.gpuResource: is empty, and so",
        ),
        *(
            ("cpu", {"gateway": {"config": {field: "x"}}}, f"gateway.config.{field}: is written by the chart")
            for field in WRITTEN_BY_THE_CHART
        ),
    ],
)
def test_values_that_cannot_be_used(base: str, changes: dict[str, Any], sentence: str) -> None:
    assert refusal(scenario(base)) == "accepted"
    assert sentence in refusal(changed(scenario(base), changes))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"model": {"name": "llama", "reference": "fp16"}, "pools": {"fp16": {}, "int8": {"replicas": 2}}},
            "model: a release has several models now, and this belongs to one of them; write models: "
            '{ llama: { reference: fp16, pools: {"fp16":{},"int8":{"replicas":2}} } }',
        ),
        ({"model": {"name": "llama"}}, 'models: { llama: { reference: bf16, pools: {"bf16":{}} } }'),
        ({"pools": {"int8": {}}}, "pools: a release has several models now, and this belongs to one of them"),
        ({"quantize": {"make": ["int8"]}}, 'write models: { NAME: { quantize: { make: ["int8"] } } }'),
        ({"quantize": {"plan": [{"name": "p", "bits": 4}]}}, "write models: { NAME: { quantize: { plan: "),
        ({"quantize": {"model": {"existingClaim": "m"}}}, "write models: { NAME: { hub: OWNER/NAME"),
        ({"quantize": {"models": {"size": "1Ti"}}}, "quantize.models: is gone: a checkpoint of the hub is"),
        ({"quantize": {"tasksConfigMap": "t"}}, "write quantize: { tasks: { configMap: t } }"),
    ],
)
def test_values_of_the_time_of_one_model_are_shown_in_their_new_form(
    changes: dict[str, Any], sentence: str
) -> None:
    for models in ({}, {"models": None}):
        assert sentence in refusal(changed(scenario("cpu"), changes | models))


def test_a_claim_is_new_at_the_first_install_alone() -> None:
    """Later the reference is there, and the job is not asked for it again."""
    values = changed(scenario("two-precisions"), {"models": {"llama": {"quantize": {"make": ["int4-kv8"]}}}})
    assert "pools.bf16: nobody makes it" in refusal(values)
    assert refusal(values, upgrade=True) == "accepted"


def test_a_reference_that_nobody_asks_need_not_be_served() -> None:
    values = without_job(scenario("two-models"))
    assert refusal(values) == "accepted"
    watched = changed(values, {"gateway": {"config": {"watch": {"reference": "live"}}}})
    assert 'models.Qwen/Qwen3-8B.pools: has no pool for the reference "bf16"' in refusal(watched)
    assert "set gateway.config.watch.reference to none" in refusal(watched)
