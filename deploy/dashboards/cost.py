"""What is saved, and what it costs."""

from __future__ import annotations

from deploy.dashboards.model import BOTH, ENGINE, MODEL, RATE, ROLE, VARIANT, Dashboard, Panel, Row, small

_TOKENS = f"tiercel_tokens_total{{{BOTH}}}"
_RAISED = f'tiercel_route_total{{{BOTH}, reason=~"raised_.*|escalated"}}'
_COMPLETION = f'tiercel_tokens_total{{{BOTH}, kind="completion"}}'
_WEIGHTS = f"max by (model, variant) (tiercel_variant_weight_bytes{{{MODEL}}})"
_LARGEST = f"max(tiercel_variant_weight_bytes{{{MODEL}}})"
_READ = (
    f"sum(sum by (model, variant) (rate({_COMPLETION}[{RATE}])) * on (model, variant) {_WEIGHTS}) "
    f"/ (sum(rate({_COMPLETION}[{RATE}]) and on (model, variant) {_WEIGHTS}) > 0)"
)
_REPLICAS = (
    f"sum by (model, variant) (max by (model, variant, replica) (tiercel_replica_reachable{{{VARIANT}}}))"
)

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
                    "variant's. 1: everything is served by the largest model's reference.",
                    f"{_READ} / scalar({_LARGEST})",
                    "percentunit",
                ),
                small("Replicas", "That can be reached.", f"sum({_REPLICAS})"),
                small("Replicas, per hour", "At the price given above.", f"sum({_REPLICAS}) * $replica_hour"),
                small(
                    "Per million tokens",
                    "Price of all replicas for the tokens of prompts and answers that they handle now.",
                    f"1e6 * sum({_REPLICAS}) * $replica_hour / (3600 * sum(rate({_TOKENS}[{RATE}])) > 0)",
                ),
                small(
                    "Raised, 1 h",
                    "Share of requests that went to a higher precision than the cheapest that would do.",
                    f"sum(rate({_RAISED}[1h])) / (sum(rate(tiercel_route_total{{{BOTH}}}[1h])) > 0) "
                    "or vector(0)",
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
                    [(f"sum by (model, variant) (rate({_COMPLETION}[{RATE}]))", "{{model}}:{{variant}}")],
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
                            "sum by (model_name, instance) "
                            f"(rate(vllm:prefix_cache_hits_total{{{ENGINE}}}[{RATE}])) "
                            "/ sum by (model_name, instance) "
                            f"(rate(vllm:prefix_cache_queries_total{{{ENGINE}}}[{RATE}]))",
                            "{{model_name}} {{instance}}",
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
                            f"sum by (role, model, variant) (rate(tiercel_requests_total{{{BOTH}}}[{RATE}])) "
                            "/ on (role) group_left () "
                            f"sum by (role) (rate(tiercel_requests_total{{{ROLE}}}[{RATE}]))",
                            "{{role}}: {{model}}:{{variant}}",
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
                    [
                        (
                            f"max by (model, variant) (tiercel_variant_weight_bytes{{{VARIANT}}})",
                            "{{model}}:{{variant}}",
                        )
                    ],
                    "bytes",
                    kind="bargauge",
                ),
                Panel(
                    "Replicas", "That can be reached.", [(_REPLICAS, "{{model}}:{{variant}}")], stacked=True
                ),
                Panel(
                    "Per million tokens",
                    "Price of a variant's replicas for their tokens: a pool that idles is dear.",
                    [
                        (
                            f"1e6 * $replica_hour * {_REPLICAS} "
                            f"/ (3600 * sum by (model, variant) (rate({_TOKENS}[{RATE}])) > 0)",
                            "{{model}}:{{variant}}",
                        )
                    ],
                ),
                Panel(
                    "Weights behind a token",
                    "Mean bytes that an answer's token is computed with, and the largest variant's.",
                    [(_READ, "served"), (_LARGEST, "largest variant")],
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
