"""Are requests answered, how fast, and what are the engines doing?"""

from __future__ import annotations

from deploy.dashboards.model import BOTH, ENGINE, RATE, ROLE, VARIANT, Dashboard, Panel, Row, quantile, small

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
                    f"sum(model_variant:tiercel_queue_depth:sum{{{VARIANT}}})",
                    limits=(16, 32),
                ),
                small(
                    "Replicas reached",
                    "Share of replicas that every gateway reaches.",
                    f"avg(min by (model, variant, replica) (tiercel_replica_reachable{{{VARIANT}}}))",
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
                    [
                        (
                            quantile(0.95, "tiercel_inter_token_latency_seconds", "model, variant"),
                            "{{model}}:{{variant}}",
                        )
                    ],
                    "s",
                ),
                Panel(
                    "Asked for, and served by",
                    "What clients named as the model, and what answered.",
                    [
                        (
                            "sum by (requested, model, variant) "
                            f"(rate(tiercel_requests_total{{{BOTH}}}[{RATE}]))",
                            "{{requested}} → {{model}}:{{variant}}",
                        )
                    ],
                    "reqps",
                    width=24,
                    stacked=True,
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
                    [(f"model_variant:tiercel_queue_depth:sum{{{VARIANT}}}", "{{model}}:{{variant}}")],
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
                    [
                        (
                            f"sum by (model_name, instance) (vllm:num_requests_running{{{ENGINE}}})",
                            "{{model_name}} {{instance}}",
                        )
                    ],
                ),
                Panel(
                    "Preemptions",
                    "Requests thrown out of a full cache, per second. They begin again.",
                    [
                        (
                            "sum by (model_name, instance) "
                            f"(rate(vllm:num_preemptions_total{{{ENGINE}}}[{RATE}]))",
                            "{{model_name}} {{instance}}",
                        )
                    ],
                    "ops",
                    limits=(0.02, 0.1),
                ),
                Panel(
                    "In the engine's queue",
                    "Seconds until an engine begins with a request, 95 % wait less.",
                    [
                        (
                            "histogram_quantile(0.95, sum by (le, model_name, instance) "
                            f"(rate(vllm:request_queue_time_seconds_bucket{{{ENGINE}}}[{RATE}])))",
                            "{{model_name}} {{instance}}",
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
