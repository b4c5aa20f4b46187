"""Grafana's dashboards, written from what is said here: ``python -m deploy.dashboards``.

The JSON files are what Grafana and the chart take; they are made, so that a change can be read here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).resolve().parents[1] / "helm" / "tiercel" / "files" / "dashboards"
COLUMNS = 24
"""Of Grafana's grid."""
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
ROLE, VARIANT = 'role=~"$role"', 'variant=~"$variant"'
BOTH = f"{ROLE}, {VARIANT}"
RATE = "$__rate_interval"

Query = tuple[str, str]
"""PromQL, and the legend of its series."""


@dataclass(frozen=True)
class Panel:
    """One panel. ``limits``: values from which on it is yellow, and red. ``unit``: one of Grafana's ids."""

    title: str
    text: str
    queries: Sequence[Query]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    limits: tuple[float, float] | None = None
    good_is_high: bool = False
    stacked: bool = False
    words: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Value to the word that stands for it, and its colour."""


@dataclass(frozen=True)
class Row:
    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Dashboard:
    name: str
    title: str
    text: str
    rows: Sequence[Row]
    variables: Sequence[Mapping[str, Any]] = ()


def quantile(q: float, metric: str, by: str, labels: str = BOTH) -> str:
    return f"histogram_quantile({q}, sum by (le, {by}) (rate({metric}_bucket{{{labels}}}[{RATE}])))"


def mean(metric: str, by: str, labels: str = BOTH) -> str:
    total, count = (f"sum by ({by}) (rate({metric}_{part}{{{labels}}}[{RATE}]))" for part in ("sum", "count"))
    return f"{total} / {count}"


def small(title: str, text: str, query: str, unit: str = "short", **more: Any) -> Panel:
    """One number."""
    return Panel(title, text, [(query, "")], unit, kind="stat", width=4, height=4, **more)


OPERATORS = Dashboard(
    "operators",
    "Tiercel / Operators",
    "Are requests answered, how fast, and what are the engines doing?",
    [
        Row(
            "Now",
            [
                small(
                    "Requests",
                    "Per second, over five minutes.",
                    f"sum(role:tiercel_requests:rate5m{{{ROLE}}})",
                    "reqps",
                ),
                small(
                    "Failed, 1 h",
                    "Share of requests that ended with 5xx, of the worst role. The objective is 0.5 %.",
                    f"max(role:tiercel_requests_failed:ratio_rate1h{{{ROLE}}})",
                    "percentunit",
                    limits=(0.005, 0.072),
                ),
                small(
                    "First token, p95",
                    "Of streamed answers, of the slowest role, over ten minutes.",
                    f"max(role:tiercel_time_to_first_token_seconds:p95_rate10m{{{ROLE}}})",
                    "s",
                    limits=(2.5, 5),
                ),
                small(
                    "Waiting",
                    "Requests in the engines' queues.",
                    f"sum(variant:tiercel_queue_depth:sum{{{VARIANT}}})",
                    limits=(16, 32),
                ),
                small(
                    "Replicas reached",
                    "Share of replicas that every gateway reaches.",
                    f"avg(min by (variant, replica) (tiercel_replica_reachable{{{VARIANT}}}))",
                    "percentunit",
                    limits=(0.5, 1),
                    good_is_high=True,
                ),
                small(
                    "Gateways",
                    "That Prometheus reads.",
                    "count(count by (job, instance) (tiercel_replica_reachable))",
                ),
            ],
        ),
        Row(
            "Requests",
            [
                Panel(
                    "By role",
                    "Requests per second.",
                    [(f"role:tiercel_requests:rate5m{{{ROLE}}}", "{{role}}")],
                    "reqps",
                ),
                Panel(
                    "Failed",
                    "Share of requests that ended with 5xx, five minutes.",
                    [(f"role:tiercel_requests_failed:ratio_rate5m{{{ROLE}}}", "{{role}}")],
                    "percentunit",
                    limits=(0.005, 0.072),
                ),
                Panel(
                    "By outcome",
                    "The status of the answer; 499 is a client that left.",
                    [(f"sum by (outcome) (rate(tiercel_requests_total{{{BOTH}}}[{RATE}]))", "{{outcome}}")],
                    "reqps",
                    stacked=True,
                ),
                Panel(
                    "Duration",
                    "From a request's last byte in to its end: the median, and the 95th percentile.",
                    [
                        (quantile(0.5, "tiercel_request_duration_seconds", "role"), "{{role}} p50"),
                        (f"role:tiercel_request_duration_seconds:p95_rate10m{{{ROLE}}}", "{{role}} p95"),
                    ],
                    "s",
                ),
                Panel(
                    "First token",
                    "Of streamed answers.",
                    [
                        (quantile(0.5, "tiercel_time_to_first_token_seconds", "role"), "{{role}} p50"),
                        (f"role:tiercel_time_to_first_token_seconds:p95_rate10m{{{ROLE}}}", "{{role}} p95"),
                    ],
                    "s",
                    limits=(2.5, 5),
                ),
                Panel(
                    "Between tokens",
                    "Between the chunks of a stream, 95 % are faster.",
                    [(quantile(0.95, "tiercel_inter_token_latency_seconds", "variant"), "{{variant}}")],
                    "s",
                ),
                Panel(
                    "Routes",
                    "Why requests went where they went. raised_…: to more precision than needed.",
                    [(f"sum by (reason) (rate(tiercel_route_total{{{BOTH}}}[{RATE}]))", "{{reason}}")],
                    "reqps",
                    stacked=True,
                ),
                Panel(
                    "Hedges",
                    "Requests sent to a second replica, by whose answer came first.",
                    [
                        (
                            f"sum by (role, winner) (rate(tiercel_hedges_total{{{BOTH}}}[{RATE}]))",
                            "{{role}} {{winner}}",
                        )
                    ],
                    "reqps",
                ),
                Panel(
                    "The gateway itself",
                    "Its own time per request, without waiting for an engine or a client.",
                    [
                        (quantile(0.5, "tiercel_gateway_overhead_seconds", "instance"), "{{instance}} p50"),
                        (quantile(0.99, "tiercel_gateway_overhead_seconds", "instance"), "{{instance}} p99"),
                    ],
                    "s",
                    limits=(0.01, 0.05),
                ),
            ],
        ),
        Row(
            "Engines",
            [
                Panel(
                    "Queue",
                    "Requests that wait within the engines of a variant.",
                    [(f"variant:tiercel_queue_depth:sum{{{VARIANT}}}", "{{variant}}")],
                    limits=(16, 32),
                ),
                Panel(
                    "KV cache",
                    "Share of a replica's cache in use.",
                    [(f"max by (replica) (tiercel_kv_cache_usage_ratio{{{VARIANT}}})", "{{replica}}")],
                    "percentunit",
                    limits=(0.8, 0.95),
                ),
                Panel(
                    "Memory",
                    "Of an engine's processes; known of engines on the gateway's machine.",
                    [(f"max by (replica) (tiercel_engine_memory_bytes{{{VARIANT}}})", "{{replica}}")],
                    "bytes",
                ),
                Panel(
                    "Running",
                    "Requests that an engine works on, by its own metrics.",
                    [("sum by (instance) (vllm:num_requests_running)", "{{instance}}")],
                ),
                Panel(
                    "Preemptions",
                    "Requests thrown out of a full cache, per second. They begin again.",
                    [(f"sum by (instance) (rate(vllm:num_preemptions_total[{RATE}]))", "{{instance}}")],
                    "ops",
                    limits=(0.02, 0.1),
                ),
                Panel(
                    "In the engine's queue",
                    "Seconds until an engine begins with a request, 95 % wait less.",
                    [
                        (
                            "histogram_quantile(0.95, sum by (le, instance) "
                            f"(rate(vllm:request_queue_time_seconds_bucket[{RATE}])))",
                            "{{instance}}",
                        )
                    ],
                    "s",
                ),
                Panel(
                    "Replicas",
                    "Whether the last health probe of any gateway failed.",
                    [(f"min by (replica) (tiercel_replica_reachable{{{VARIANT}}})", "{{replica}}")],
                    kind="state-timeline",
                    width=12,
                    words={"0": ("down", "red"), "1": ("up", "green")},
                ),
                Panel(
                    "Engines' metrics",
                    "Whether the gateway could read them the last time.",
                    [(f"max by (replica) (tiercel_engine_metrics_read{{{VARIANT}}})", "{{replica}}")],
                    kind="state-timeline",
                    width=12,
                    words={"0": ("stale", "orange"), "1": ("read", "green")},
                ),
            ],
        ),
    ],
)

_CHECKS = "tiercel_quality_checks_total"
_SHADOW = "tiercel_shadow_compared_total"

QUALITY = Dashboard(
    "quality",
    "Tiercel / Quality",
    "Do the quantized agents still tell the truth?",
    [
        Row(
            "Now",
            [
                small(
                    "Demoted",
                    "Variants that are out of a role's choice.",
                    f"sum(max by (variant, role) (tiercel_variant_demoted{{{BOTH}}}))",
                    limits=(1, 2),
                ),
                small(
                    "Made up, 1 h",
                    "Of the sentences that claim something. The worst role and variant.",
                    f"max(role_variant:tiercel_sentences_made_up:ratio_rate1h{{{BOTH}}})",
                    "percentunit",
                    limits=(0.05, 0.1),
                ),
                small(
                    "Disputed, 1 h",
                    "Of the answers put before the reference. The worst role and variant.",
                    f"max(role_variant:tiercel_shadow_disputed:ratio_rate1h{{{BOTH}}})",
                    "percentunit",
                    limits=(0.05, 0.2),
                ),
                small(
                    "Evidence",
                    "The highest of all checks, nats. With the default settings 15.4 are an alarm.",
                    f"max(tiercel_quality_cusum{{{BOTH}}})",
                    limits=(5.1, 15.4),
                ),
                small(
                    "Compared, 1 h",
                    "Of the answers meant for the reference, those that it has judged.",
                    f'sum(rate({_SHADOW}{{{BOTH}, result=~"agreed|disputed"}}[1h])) '
                    f"/ sum(rate({_SHADOW}{{{BOTH}}}[1h]))",
                    "percentunit",
                    limits=(0.1, 0.5),
                    good_is_high=True,
                ),
                small(
                    "Outcomes lost, 1 h",
                    "While the watch's store did not answer.",
                    "sum(increase(tiercel_watch_outcomes_dropped_total[1h])) or vector(0)",
                    limits=(1, 1000),
                ),
            ],
        ),
        Row(
            "The watch",
            [
                Panel(
                    "In and out of service",
                    "Whether a variant may serve a role.",
                    [
                        (
                            f"max by (variant, role) (tiercel_variant_demoted{{{BOTH}}})",
                            "{{variant}} as {{role}}",
                        )
                    ],
                    kind="state-timeline",
                    width=12,
                    words={"0": ("serves", "green"), "1": ("demoted", "red")},
                ),
                Panel(
                    "Evidence",
                    "That a check has changed for the worse, nats. 15.4 are an alarm.",
                    [
                        (
                            f"max by (role, variant, check) (tiercel_quality_cusum{{{BOTH}}})",
                            "{{variant}} as {{role}}: {{check}}",
                        )
                    ],
                    width=12,
                    limits=(5.1, 15.4),
                ),
                Panel(
                    "Disputed by the reference",
                    "Share of the compared answers, over an hour.",
                    [
                        (
                            f"role_variant:tiercel_shadow_disputed:ratio_rate1h{{{BOTH}}}",
                            "{{variant}} as {{role}}",
                        )
                    ],
                    "percentunit",
                    limits=(0.05, 0.2),
                ),
                Panel(
                    "What came of asking the reference",
                    "shed: given up for users' requests. no_logprobs, incomparable: nothing to compare.",
                    [(f"sum by (result) (rate({_SHADOW}{{{BOTH}}}[{RATE}]))", "{{result}}")],
                    "ops",
                    stacked=True,
                ),
                Panel(
                    "Events",
                    "What the watch did and said, per hour.",
                    [
                        (
                            "sum by (kind) (increase(tiercel_watch_events_total"
                            f'{{role=~"$role|\\\\(engine\\\\)", {VARIANT}}}[1h]))',
                            "{{kind}}",
                        )
                    ],
                ),
                Panel(
                    "Divergence from the reference",
                    "Log-ratio per token of the median answer, nats: at temperature 1 the KL divergence.",
                    [
                        (
                            quantile(0.5, "tiercel_shadow_divergence_nats", "role, variant"),
                            "{{variant}} as {{role}}",
                        )
                    ],
                ),
                Panel(
                    "Other favourites",
                    "Share of an answer's tokens that are not the reference's first choice, mean.",
                    [
                        (
                            mean("tiercel_shadow_token_disagreement_ratio", "role, variant"),
                            "{{variant}} as {{role}}",
                        )
                    ],
                    "percentunit",
                ),
                Panel(
                    "Asked again",
                    "Answers that failed a check before the client saw them, and went to a higher precision.",
                    [
                        (
                            f"sum by (role, check) (rate(tiercel_escalations_total{{{BOTH}}}[{RATE}]))",
                            "{{role}}: {{check}}",
                        )
                    ],
                    "ops",
                ),
            ],
        ),
        Row(
            "Answers",
            [
                Panel(
                    "Made up",
                    "Share of the sentences that claim something, over an hour.",
                    [
                        (
                            f"role_variant:tiercel_sentences_made_up:ratio_rate1h{{{BOTH}}}",
                            "{{variant}} as {{role}}",
                        )
                    ],
                    "percentunit",
                    limits=(0.05, 0.1),
                ),
                Panel(
                    "Sentences",
                    "By label.",
                    [
                        (
                            f"sum by (label) (rate(tiercel_quality_sentences_total{{{BOTH}}}[{RATE}]))",
                            "{{label}}",
                        )
                    ],
                    "ops",
                    stacked=True,
                ),
                Panel(
                    "Failed checks",
                    "Share of the answers that a check has looked at.",
                    [
                        (
                            f'(sum by (check) (rate({_CHECKS}{{{BOTH}, outcome="failed"}}[{RATE}])) '
                            f"or 0 * sum by (check) (rate({_CHECKS}{{{BOTH}}}[{RATE}]))) / "
                            f'sum by (check) (rate({_CHECKS}{{{BOTH}, outcome=~"passed|failed"}}[{RATE}]))',
                            "{{check}}",
                        )
                    ],
                    "percentunit",
                ),
                Panel(
                    "Scores",
                    "Mean of an answer's score, 1 is best.",
                    [(mean("tiercel_quality_score", "variant, check"), "{{variant}}: {{check}}")],
                    "percentunit",
                ),
                Panel(
                    "Surprise",
                    "Mean -log p of an answer's tokens, nats: the median answer.",
                    [(quantile(0.5, "tiercel_token_nll_mean", "role, variant"), "{{variant}} as {{role}}")],
                ),
                Panel(
                    "Highest entropy",
                    "Of an answer's tokens, nats: 95 % of the answers stay below.",
                    [
                        (
                            quantile(0.95, "tiercel_token_entropy_max", "role, variant"),
                            "{{variant}} as {{role}}",
                        )
                    ],
                ),
                Panel(
                    "Checks that broke",
                    "Errors of the checks themselves, the judge's among them.",
                    [(f'sum by (check) (rate({_CHECKS}{{{BOTH}, outcome="error"}}[{RATE}]))', "{{check}}")],
                    "ops",
                ),
            ],
        ),
    ],
)

_TOKENS = f"tiercel_tokens_total{{{BOTH}}}"
_RAISED = f'tiercel_route_total{{{BOTH}, reason=~"raised_.*|escalated"}}'
_COMPLETION = f'tiercel_tokens_total{{{BOTH}, kind="completion"}}'
_WEIGHTS = "max by (variant) (tiercel_variant_weight_bytes)"
_READ = (
    f"sum(sum by (variant) (rate({_COMPLETION}[{RATE}])) * on (variant) {_WEIGHTS}) "
    f"/ sum(rate({_COMPLETION}[{RATE}]))"
)
_REPLICAS = f"sum by (variant) (max by (variant, replica) (tiercel_replica_reachable{{{VARIANT}}}))"

COST = Dashboard(
    "cost",
    "Tiercel / Cost",
    "What do the answers cost, and what does quantization save?",
    [
        Row(
            "Now",
            [
                small("Tokens", "Per second, prompts and answers.", f"sum(rate({_TOKENS}[{RATE}]))"),
                small(
                    "Weights behind a token",
                    "Bytes of weights that an answer's token is computed with, as a share of the largest "
                    "variant's. 1: everything is served by the reference.",
                    f"{_READ} / scalar(max(tiercel_variant_weight_bytes))",
                    "percentunit",
                ),
                small("Replicas", "That can be reached.", f"sum({_REPLICAS})"),
                small("Replicas, per hour", "At the price given above.", f"sum({_REPLICAS}) * $replica_hour"),
                small(
                    "Per million tokens",
                    "Price of all replicas for the tokens of prompts and answers that they handle now.",
                    f"1e6 * sum({_REPLICAS}) * $replica_hour / (3600 * sum(rate({_TOKENS}[{RATE}])))",
                ),
                small(
                    "Raised, 1 h",
                    "Share of requests that went to a higher precision than the cheapest that would do.",
                    f"sum(rate({_RAISED}[1h])) / sum(rate(tiercel_route_total{{{BOTH}}}[1h])) or vector(0)",
                    "percentunit",
                    limits=(0.05, 0.2),
                ),
            ],
        ),
        Row(
            "Tokens",
            [
                Panel(
                    "By variant",
                    "Tokens of answers per second.",
                    [(f"sum by (variant) (rate({_COMPLETION}[{RATE}]))", "{{variant}}")],
                    stacked=True,
                ),
                Panel(
                    "By role",
                    "Tokens per second.",
                    [(f"sum by (role, kind) (rate({_TOKENS}[{RATE}]))", "{{role}} {{kind}}")],
                    stacked=True,
                ),
                Panel(
                    "By key",
                    "Tokens in the time shown.",
                    [(f"sum by (key) (increase(tiercel_key_tokens_total{{{BOTH}}}[$__range]))", "{{key}}")],
                    kind="bargauge",
                ),
                Panel(
                    "From the prefix cache",
                    "Share of prompt tokens that an engine did not compute again.",
                    [
                        (
                            f"sum by (instance) (rate(vllm:prefix_cache_hits_total[{RATE}])) "
                            f"/ sum by (instance) (rate(vllm:prefix_cache_queries_total[{RATE}]))",
                            "{{instance}}",
                        )
                    ],
                    "percentunit",
                ),
                Panel(
                    "Answered twice",
                    "Requests that cost double: hedged, or asked again of a higher precision.",
                    [
                        (f"sum by (role) (rate(tiercel_hedges_total{{{BOTH}}}[{RATE}]))", "{{role}} hedged"),
                        (
                            f"sum by (role) (rate(tiercel_escalations_total{{{BOTH}}}[{RATE}]))",
                            "{{role}} escalated",
                        ),
                    ],
                    "reqps",
                ),
                Panel(
                    "Served by",
                    "Share of a role's requests that each variant has answered.",
                    [
                        (
                            f"sum by (role, variant) (rate(tiercel_requests_total{{{BOTH}}}[{RATE}])) "
                            "/ on (role) group_left () "
                            f"sum by (role) (rate(tiercel_requests_total{{{ROLE}}}[{RATE}]))",
                            "{{role}}: {{variant}}",
                        )
                    ],
                    "percentunit",
                ),
            ],
        ),
        Row(
            "Engines",
            [
                Panel(
                    "Weights",
                    "Bytes of each variant's weights.",
                    [(f"max by (variant) (tiercel_variant_weight_bytes{{{VARIANT}}})", "{{variant}}")],
                    "bytes",
                    kind="bargauge",
                ),
                Panel("Replicas", "That can be reached.", [(_REPLICAS, "{{variant}}")], stacked=True),
                Panel(
                    "Per million tokens",
                    "Price of a variant's replicas for their tokens: a pool that idles is dear.",
                    [
                        (
                            f"1e6 * $replica_hour * {_REPLICAS} "
                            f"/ (3600 * sum by (variant) (rate({_TOKENS}[{RATE}])))",
                            "{{variant}}",
                        )
                    ],
                ),
                Panel(
                    "Weights behind a token",
                    "Mean bytes that an answer's token is computed with, and the largest variant's.",
                    [(_READ, "served"), ("max(tiercel_variant_weight_bytes)", "largest variant")],
                    "bytes",
                    width=12,
                ),
                Panel(
                    "Why requests were raised",
                    "To a higher precision than the cheapest that would do.",
                    [
                        (
                            f"sum by (reason) (rate({_RAISED}[{RATE}]))",
                            "{{reason}}",
                        )
                    ],
                    "reqps",
                    width=12,
                    stacked=True,
                ),
            ],
        ),
    ],
    variables=[
        {
            "name": "replica_hour",
            "label": "Price of a replica's hour",
            "type": "textbox",
            "query": "1.00",
            "current": {"text": "1.00", "value": "1.00"},
            "hide": 0,
        }
    ],
)

DASHBOARDS = (OPERATORS, QUALITY, COST)


def render(dashboard: Dashboard) -> dict[str, Any]:
    """As Grafana reads it."""
    return {
        "uid": f"tiercel-{dashboard.name}",
        "title": dashboard.title,
        "description": dashboard.text,
        "tags": ["tiercel"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "",
        "fiscalYearStartMonth": 0,
        "links": [
            {
                "title": "Tiercel",
                "type": "dashboards",
                "tags": ["tiercel"],
                "asDropdown": False,
                "includeVars": True,
                "keepTime": True,
                "targetBlank": False,
                "icon": "external link",
                "tooltip": "",
                "url": "",
            }
        ],
        "annotations": {"list": []},
        "templating": {
            "list": [
                {
                    "name": "datasource",
                    "label": "Prometheus",
                    "type": "datasource",
                    "query": "prometheus",
                    "regex": "",
                    "refresh": 1,
                    "hide": 0,
                    "multi": False,
                    "includeAll": False,
                    "options": [],
                    "current": {},
                },
                _labels("role", "Role", "label_values(tiercel_requests_total, role)"),
                _labels("variant", "Variant", "label_values(tiercel_variant_weight_bytes, variant)"),
                *dashboard.variables,
            ]
        },
        "panels": list(_placed(dashboard.rows)),
    }


def _labels(name: str, label: str, query: str) -> dict[str, Any]:
    """A variable of label values; all of them unless some are chosen."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": "variable"},
        "refresh": 2,
        "sort": 1,
        "regex": "",
        "hide": 0,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "options": [],
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _placed(rows: Sequence[Row]) -> Iterable[dict[str, Any]]:
    """Panels from left to right, row by row."""
    number, top = 0, 0
    for row in rows:
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": row.title,
            "collapsed": False,
            "panels": [],
            "gridPos": {"x": 0, "y": top, "w": COLUMNS, "h": 1},
        }
        left, line, top = 0, 0, top + 1
        for panel in row.panels:
            if left + panel.width > COLUMNS:
                left, line, top = 0, 0, top + line
            number += 1
            place = {"x": left, "y": top, "w": panel.width, "h": panel.height}
            yield {"id": number, "gridPos": place, **_panel(panel)}
            left, line = left + panel.width, max(line, panel.height)
        top += line


def _panel(panel: Panel) -> dict[str, Any]:
    shown: dict[str, Any] = {"unit": panel.unit, "color": {"mode": "palette-classic"}, "mappings": []}
    if panel.limits is not None:
        low, high = panel.limits
        colours = ("red", "yellow", "green") if panel.good_is_high else ("green", "yellow", "red")
        steps = zip(colours, (None, low, high), strict=True)
        shown["thresholds"] = {
            "mode": "absolute",
            "steps": [{"color": colour, "value": value} for colour, value in steps],
        }
    else:
        shown["thresholds"] = {"mode": "absolute", "steps": [{"color": "blue", "value": None}]}
    if panel.words:
        options = {
            value: {"text": word, "color": colour, "index": index}
            for index, (value, (word, colour)) in enumerate(panel.words.items())
        }
        shown["mappings"] = [{"type": "value", "options": options}]
    options, custom = _LOOKS[panel.kind]
    if panel.kind != "timeseries":
        shown["color"] = {"mode": "thresholds"}
    elif panel.stacked:
        custom = custom | {"stacking": {"mode": "normal", "group": "A"}, "fillOpacity": 30}
    elif panel.limits is not None:
        custom = custom | {"thresholdsStyle": {"mode": "dashed"}}
    if panel.unit == "percentunit":
        shown["min"] = 0
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": {**shown, "custom": custom}, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": SOURCE,
                "expr": query,
                "legendFormat": legend or "__auto",
                "instant": panel.kind in ("stat", "bargauge"),
                "range": panel.kind not in ("stat", "bargauge"),
            }
            for index, (query, legend) in enumerate(panel.queries)
        ],
    }


_LAST = {"calcs": ["lastNotNull"], "fields": "", "values": False}
_LOOKS: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "timeseries": (
        {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 8, "showPoints": "never", "spanNulls": False},
    ),
    "stat": ({"reduceOptions": _LAST, "colorMode": "value", "graphMode": "none", "textMode": "auto"}, {}),
    "bargauge": ({"reduceOptions": _LAST, "displayMode": "basic", "orientation": "horizontal"}, {}),
    "state-timeline": (
        {
            "showValue": "auto",
            "mergeValues": True,
            "rowHeight": 0.9,
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": False},
        },
        {"fillOpacity": 70, "lineWidth": 0},
    ),
}
"""Kind of panel to its options, and the custom part of its fields."""


def text_of(dashboard: Dashboard) -> str:
    """The file's text."""
    return json.dumps(render(dashboard), indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    for dashboard in DASHBOARDS:
        (DIRECTORY / f"{dashboard.name}.json").write_text(text_of(dashboard), encoding="utf-8")


if __name__ == "__main__":
    main()
