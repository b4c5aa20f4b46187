"""Writes what the chart takes from elsewhere: ``python -m deploy.chart``.

``values.schema.json``: what the gateway's configuration may hold is taken from the class that reads it, so
that a misspelled field of a role is refused by ``helm install`` already, and not by a pod.
``files/sitecustomize.py`` is the one of engines on CPUs: a chart can read files of its own folder alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gateway.config import Config
from gateway.config.model import MODEL_NAME

_CHART = Path(__file__).parents[1] / "helm" / "tiercel"
SCHEMA = _CHART / "values.schema.json"
ENGINE_SITE = Path(__file__).with_name("engine_site") / "sitecustomize.py"
ENGINE_SITE_COPY = _CHART / "files" / "sitecustomize.py"
WRITTEN_BY_THE_CHART = ("models", "variants_dir", "pools", "run_dir")
"""Fields of the configuration that values must not have: a template refuses them with a sentence."""
OF_ONE_MODEL = ("model", "pools")
"""Values of the time when a release had one model: a template refuses them and shows the new form."""
MAKING_OF_ONE_MODEL = ("model", "models", "make", "plan", "tasksConfigMap")
"""The same, within ``quantize``."""

Schema = dict[str, Any]


def _object(properties: Schema, required: tuple[str, ...] = (), text: str = "") -> Schema:
    found: Schema = {"type": "object", "additionalProperties": False, "properties": properties}
    if required:
        found["required"] = list(required)
    if text:
        found["description"] = text
    return found


def _number(kind: str, least: float, most: float | None = None) -> Schema:
    return {"type": kind, "minimum": least, **({} if most is None else {"maximum": most})}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


TEXT: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
NAME: Schema = {"type": "string", "pattern": "^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$"}
VARIANT: Schema = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]*$"}
SIZE: Schema = {"type": "string", "pattern": "^[0-9]+(\\.[0-9]+)?([KMGTP]i?)?$"}
MAP: Schema = {"type": "object", "additionalProperties": TEXT}
KUBERNETES: Schema = {"type": "object"}
"""What Kubernetes itself checks, or a template."""
ENVIRONMENT = _list(_object({"name": TEXT, "value": TEXT, "valueFrom": KUBERNETES}, ("name",)))
PULL: Schema = {"enum": ["IfNotPresent", "Always", "Never"]}
ACCESS = _list({"enum": ["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"]})
DIGEST: Schema = {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"}
IMAGE = _object(
    {"repository": {"type": "string", "minLength": 1}, "tag": TEXT, "digest": DIGEST, "pullPolicy": PULL}
)
IMAGE_VOLUME = _object({"reference": TEXT, "pullPolicy": PULL})
SECRET = _object({"name": NAME, "key": TEXT})
QUANTITY: Schema = {"type": ["string", "number"]}
RESOURCES = _object(
    {part: {"type": "object", "additionalProperties": QUANTITY} for part in ("requests", "limits")}
)
PLACEMENT: Schema = {"nodeSelector": MAP, "tolerations": _list(KUBERNETES)}
POD: Schema = {
    **PLACEMENT,
    "podLabels": MAP,
    "podAnnotations": MAP,
    "affinity": KUBERNETES,
    "priorityClassName": NAME,
    "extraEnv": ENVIRONMENT,
    "resources": RESOURCES,
}
COUNT = _number("integer", 1)

GPUS: Schema = {
    "gpus": _number("integer", 0, 64),
    "gpuResource": TEXT,
}
CLAIMS = _list(
    {
        **_object(
            {"name": NAME, "resourceClaimName": NAME, "resourceClaimTemplateName": NAME, "request": TEXT},
            ("name",),
        ),
        "oneOf": [{"required": ["resourceClaimName"]}, {"required": ["resourceClaimTemplateName"]}],
    }
)

ENGINE = _object(
    {
        **POD,
        **GPUS,
        "resourceClaims": CLAIMS,
        "image": IMAGE,
        "replicas": _number("integer", 0),
        "tensorParallel": COUNT,
        "pipelineParallel": COUNT,
        "nodes": COUNT,
        "maxModelLen": _number("integer", 64),
        "maxNumSeqs": COUNT,
        "kvCacheDtype": {"type": "string", "pattern": "^[a-z0-9_]+$"},
        "cpuKvCacheGiB": COUNT,
        "extraArgs": _list(TEXT),
        "shm": SIZE,
        "cache": SIZE,
        "cacheClaim": NAME,
        "startupSeconds": _number("integer", 30),
        "runtimeClassName": NAME,
        "autoscaling": _object(
            {
                "enabled": BOOLEAN,
                "minReplicas": _number("integer", 0),
                "maxReplicas": COUNT,
                "queuePerReplica": COUNT,
                "cooldownSeconds": _number("integer", 0),
                "prometheus": {"type": "string", "pattern": "^(https?://.+)?$"},
            }
        ),
        "inferencePool": _object(
            {
                "enabled": BOOLEAN,
                "endpointPicker": NAME,
                "port": _number("integer", 1, 65535),
                "from": _list(KUBERNETES),
            }
        ),
    }
)

PLAN = _list(
    {
        **_object(
            {
                "name": VARIANT,
                "bits": _number("number", 1, 16),
                "bytes": COUNT,
                "loss": {"type": "number", "exclusiveMinimum": 0},
            },
            ("name",),
        ),
        "oneOf": [{"required": [budget]} for budget in ("bits", "bytes", "loss")],
    }
)
JOB: Schema = {
    **PLACEMENT,
    **GPUS,
    "resourceClaims": CLAIMS,
    "image": IMAGE,
    "resources": RESOURCES,
    "shm": SIZE,
    "extraEnv": ENVIRONMENT,
    "runtimeClassName": NAME,
    "backoffLimit": _number("integer", 0),
    "checkpoints": _object({"existingClaim": NAME}),
    "tokenSecret": SECRET,
    "tasks": _object({"configMap": NAME, "existingClaim": NAME, "path": TEXT, "image": IMAGE_VOLUME}),
}
MODEL = _object(
    {
        "hub": {"type": "string", "pattern": "^[\\w.-]+/[\\w.-]+$"},
        "revision": {"type": "string", "minLength": 1},
        "path": {"type": "string", "pattern": "^[^/]"},
        "checkpointImage": IMAGE_VOLUME,
        "reference": VARIANT,
        "calibration": {"type": "string", "pattern": "^/"},
        "pools": {
            "type": "object",
            "propertyNames": VARIANT,
            "additionalProperties": {"$ref": "#/definitions/engine"},
        },
        "engine": {"$ref": "#/definitions/engine"},
        "quantize": _object({"make": _list(VARIANT), "plan": PLAN, **JOB}),
    }
)
QUANTIZE = _object(
    {
        **JOB,
        **{key: {} for key in MAKING_OF_ONE_MODEL},
        "enabled": BOOLEAN,
        "enginePython": {"type": "string", "pattern": "^/"},
    }
)

VALUES: Schema = {
    "global": KUBERNETES,
    "fullnameOverride": {**NAME, "maxLength": 30},
    **dict.fromkeys(OF_ONE_MODEL, KUBERNETES),
    "models": {
        "type": "object",
        "propertyNames": {"pattern": MODEL_NAME},
        "additionalProperties": {"$ref": "#/definitions/model"},
    },
    "defaultModel": TEXT,
    "variants": _object(
        {
            "existingClaim": NAME,
            "size": SIZE,
            "storageClass": NAME,
            "accessModes": ACCESS,
            "image": IMAGE_VOLUME,
        }
    ),
    "quantize": QUANTIZE,
    "gateway": _object(
        {
            **POD,
            "image": IMAGE,
            "replicas": COUNT,
            "config": {},
            "tlsSecret": NAME,
            "service": _object(
                {
                    "type": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
                    "port": _number("integer", 1, 65535),
                    "annotations": MAP,
                }
            ),
            "autoscaling": _object(
                {
                    "enabled": BOOLEAN,
                    "minReplicas": COUNT,
                    "maxReplicas": COUNT,
                    "targetCPUUtilizationPercentage": _number("integer", 1, 100),
                }
            ),
            "longestStreamSeconds": COUNT,
            "podDisruptionBudget": BOOLEAN,
        }
    ),
    "watch": _object({"storeSecret": SECRET}),
    "engine": {"$ref": "#/definitions/engine"},
    "serviceAccount": _object({"annotations": MAP}),
    "networkPolicy": _object({"enabled": BOOLEAN, "prometheusNamespaceLabels": MAP}),
    "ingress": _object(
        {"enabled": BOOLEAN, "className": NAME, "host": TEXT, "tlsSecret": NAME, "annotations": MAP}
    ),
    "httpRoute": _object(
        {
            "enabled": BOOLEAN,
            "parentRefs": _list(KUBERNETES),
            "hostnames": _list(TEXT),
            "annotations": MAP,
        }
    ),
    "monitoring": _object(
        {
            "enabled": BOOLEAN,
            "labels": MAP,
            "interval": {"type": "string", "pattern": "^[0-9]+(ms|s|m)$"},
            "rules": BOOLEAN,
            "runbooks": TEXT,
            "dashboards": _object({"enabled": BOOLEAN, "label": TEXT, "value": TEXT, "annotations": MAP}),
        }
    ),
    "tests": _object({"keySecret": SECRET}),
    "imagePullSecrets": _list(_object({"name": NAME}, ("name",))),
}


def values_schema() -> Schema:
    """JSON Schema (draft 7, which every Helm reads) of the chart's values."""
    config = Config.model_json_schema(ref_template="#/definitions/{model}")
    definitions = {**config.pop("$defs"), "engine": ENGINE, "model": MODEL}
    for field in WRITTEN_BY_THE_CHART:
        config["properties"][field] = {}
    del config["required"]  # what is missing is said by the templates, in a sentence
    gateway = {**VALUES["gateway"], "properties": {**VALUES["gateway"]["properties"], "config": config}}
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        **_object({**VALUES, "gateway": gateway}),
        "definitions": definitions,
    }
    found = _draft_7(schema)
    assert isinstance(found, dict)
    return found


def _draft_7(schema: Any) -> Any:
    """Without what is of later drafts, or of no use to a reader of values."""
    if isinstance(schema, list):
        return [_draft_7(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {
        name: _draft_7(part)
        for name, part in schema.items()
        if not (name == "title" and isinstance(part, str)) and name != "format"
    }
    if "prefixItems" in found:
        found["items"] = found.pop("prefixItems")
    return found


def schema_text() -> str:
    """The file's text."""
    return json.dumps(values_schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(schema_text(), encoding="utf-8")
    ENGINE_SITE_COPY.write_bytes(ENGINE_SITE.read_bytes())
