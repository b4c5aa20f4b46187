"""Strict schemas of the custom resources that the chart makes: the fields it uses, with their types.

The definitions themselves come with their operators and not with Kubernetes. A field that is not here is an
error, so that a misspelled one, which a server would drop without a word, cannot pass.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
TEXT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
LABELS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
SELECTOR: Schema = {
    "type": "object",
    "additionalProperties": False,
    "required": ["matchLabels"],
    "properties": {"matchLabels": LABELS},
}
DURATION: Schema = {"type": "string", "pattern": "^([0-9]+(ms|s|m|h))+$"}


def _object(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(required),
        "properties": {**required, **(optional or {})},
    }


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1}


ENDPOINT = _object(
    {"port": TEXT, "path": TEXT, "interval": DURATION},
    {
        "scheme": {"enum": ["http", "https"]},
        "tlsConfig": _object({"insecureSkipVerify": {"type": "boolean"}}),
    },
)
RULE = _object(
    {"expr": TEXT},
    {"alert": TEXT, "record": TEXT, "for": DURATION, "labels": LABELS, "annotations": LABELS},
)
SPECS: dict[tuple[str, str], Schema] = {
    ("monitoring.coreos.com/v1", "ServiceMonitor"): _object(
        {"selector": SELECTOR, "endpoints": _list(ENDPOINT)}
    ),
    ("monitoring.coreos.com/v1", "PodMonitor"): _object(
        {"selector": SELECTOR, "podMetricsEndpoints": _list(ENDPOINT)}, {"podTargetLabels": _list(TEXT)}
    ),
    ("monitoring.coreos.com/v1", "PrometheusRule"): _object(
        {"groups": _list(_object({"name": TEXT, "rules": _list(RULE)}, {"interval": DURATION}))}
    ),
    ("keda.sh/v1alpha1", "ScaledObject"): _object(
        {
            "scaleTargetRef": _object({"name": TEXT}, {"apiVersion": TEXT, "kind": TEXT}),
            "triggers": _list(
                _object(
                    {
                        "type": {"const": "prometheus"},
                        "metadata": _object(
                            {"serverAddress": TEXT, "query": TEXT, "threshold": TEXT},
                            {"activationThreshold": TEXT},
                        ),
                    },
                    {"name": TEXT},
                )
            ),
        },
        {"minReplicaCount": COUNT, "maxReplicaCount": COUNT, "cooldownPeriod": COUNT},
    ),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): _object(
        {
            "parentRefs": _list(_object({"name": TEXT}, {"namespace": TEXT, "sectionName": TEXT})),
            "rules": _list(
                _object(
                    {
                        "matches": _list(
                            _object({"path": _object({"type": {"const": "PathPrefix"}, "value": TEXT})})
                        ),
                        "backendRefs": _list(_object({"name": TEXT, "port": COUNT})),
                    },
                    {"timeouts": _object({"request": DURATION})},
                )
            ),
        },
        {"hostnames": _list(TEXT)},
    ),
    ("inference.networking.k8s.io/v1", "InferencePool"): _object(
        {
            "selector": SELECTOR,
            "targetPorts": _list(_object({"number": COUNT})),
            "endpointPickerRef": _object({"name": TEXT, "port": _object({"number": COUNT})}),
        }
    ),
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): _object(
        {
            "leaderWorkerTemplate": _object(
                {
                    "size": COUNT,
                    "restartPolicy": {"enum": ["RecreateGroupOnPodRestart", "None"]},
                    "leaderTemplate": {"type": "object"},
                    "workerTemplate": {"type": "object"},
                }
            )
        },
        {"replicas": COUNT},
    ),
}
