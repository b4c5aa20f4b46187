"""How are the gateways themselves, and what did they not manage to do?"""

from __future__ import annotations

from deploy.dashboards.model import BOTH, RATE, Dashboard, Panel, Row


def _rate(metric: str, by: str, labels: str = "") -> str:
    return f"sum by ({by}) (rate({metric}{{{labels}}}[{RATE}]))"


GATEWAYS = Dashboard(
    "gateways",
    "Tiercel / Gateways",
    "How are the gateways themselves, and what did they not manage to do?",
    [
        Row(
            "Processes",
            [
                Panel(
                    "How late event loops wake",
                    "99 % of the wakes are earlier. Whoever holds a loop holds every request of its process.",
                    [
                        (
                            "histogram_quantile(0.99, sum by (le) "
                            f"(rate(tiercel_event_loop_lag_seconds_bucket[{RATE}])))",
                            "p99",
                        )
                    ],
                    "s",
                    limits=(0.05, 0.25),
                ),
                Panel(
                    "Workers' heartbeats",
                    "Seconds since the loop of a worker was last seen to run, of the slowest gateway.",
                    [("max by (worker) (tiercel_worker_heartbeat_age_seconds)", "worker {{worker}}")],
                    "s",
                    limits=(5, 30),
                ),
                Panel(
                    "Workers started anew",
                    "Per second. One that ends takes the requests with it that it was answering.",
                    [(_rate("tiercel_worker_restarts_total", "worker"), "worker {{worker}}")],
                    "ops",
                    limits=(0.001, 0.02),
                ),
                Panel(
                    "Background jobs",
                    "Whether they run in every process that was asked.",
                    [("min by (task) (tiercel_background_job_up)", "{{task}}")],
                    kind="state-timeline",
                    width=12,
                    words={"0": ("failed", "red"), "1": ("runs", "green")},
                ),
                Panel(
                    "Background jobs begun anew",
                    "Per second, because they failed. The log says why.",
                    [(_rate("tiercel_background_job_restarts_total", "task"), "{{task}}")],
                    "ops",
                    width=6,
                    limits=(0.001, 0.1),
                ),
                Panel(
                    "Log lines lost",
                    "Per second: whoever reads the log is too slow, or gone.",
                    [(f"sum(rate(tiercel_log_lines_dropped_total[{RATE}]))", "lines")],
                    "ops",
                    width=6,
                    limits=(0.001, 1),
                ),
            ],
        ),
        Row(
            "Books",
            [
                Panel(
                    "Pools missed",
                    "Per second: no replica could take a request of the variant that it should have had.",
                    [(_rate("tiercel_pool_missed_total", "model, variant", BOTH), "{{model}}:{{variant}}")],
                    "ops",
                ),
                Panel(
                    "Prompt tokens from a cache",
                    "Per second, as engines count them.",
                    [(_rate("tiercel_cached_tokens_total", "model, variant", BOTH), "{{model}}:{{variant}}")],
                    "ops",
                ),
                Panel(
                    "Requests not counted to their end",
                    "Per second: an engine began with them and never said what they took.",
                    [
                        (
                            _rate("tiercel_usage_unreported_total", "model, variant", BOTH),
                            "{{model}}:{{variant}}",
                        )
                    ],
                    "ops",
                ),
                Panel(
                    "Prompts asked for afterwards",
                    "Per second, by what came of it.",
                    [(_rate("tiercel_usage_settled_total", "outcome", BOTH), "{{outcome}}")],
                    "ops",
                    width=12,
                    stacked=True,
                ),
                Panel(
                    "Conversations",
                    "Responses kept for clients to go on from, per second, and by why they were not kept.",
                    [
                        (f"sum(rate(tiercel_responses_stored_total[{RATE}]))", "kept"),
                        (_rate("tiercel_responses_dropped_total", "reason"), "{{reason}}"),
                    ],
                    "ops",
                    width=12,
                ),
            ],
        ),
        Row(
            "What looks at answers",
            [
                Panel(
                    "Answers not looked at",
                    "Per second, by why: too many at once, too long, or not in time.",
                    [(_rate("tiercel_quality_dropped_total", "reason"), "{{reason}}")],
                    "ops",
                    width=12,
                    stacked=True,
                ),
                Panel(
                    "Defects and lost processes",
                    "Per second, by part. It has gone on since.",
                    [(_rate("tiercel_quality_errors_total", "part"), "{{part}}")],
                    "ops",
                    width=12,
                    limits=(0.001, 0.1),
                ),
            ],
        ),
    ],
)
