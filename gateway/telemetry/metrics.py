"""Every metric of the gateway. The registry is passed in; labels come from bounded sets only, and none is
named like one that Prometheus adds itself (``job``, ``instance``).

Roles, models, variants and replicas come from the configuration, so what clients invent never becomes a label
value. ``outcome`` of a request is its status as a number in words of HTTP: 200, 400 …, 499 for a client
that left, and 502 or 504 also for a stream that broke off after its 200 had been sent.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector

from gateway.telemetry.counters import Cells, CounterFamily, Family, GaugeFamily, HistogramFamily

OTHER = "other"

_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKEN_GAP_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5, 10)
_OVERHEAD_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)
_NLL_NATS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.45, 0.65, 0.9, 1.25, 1.75, 2.5, 4, 8)
_ENTROPY_NATS = (0.05, 0.1, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 6)
_SHARE = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1)
_DIVERGENCE_NATS = (-0.1, -0.01, 0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_LAG_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_SCORE = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)


ASKED = ("role", "model", "variant")
PLACED = ("model", "variant", "replica")


class _Families:
    """Makes families, registers them, and puts them into ``families``."""

    def __init__(
        self, families: dict[str, Family[Any]], registry: CollectorRegistry, cells: Cells | None
    ) -> None:
        self._families, self._registry, self._cells = families, registry, cells

    def counter(self, name: str, text: str, *labels: str) -> CounterFamily:
        family = self._families[name] = CounterFamily(name, text, labels, self._registry, self._cells)
        return family

    def gauge(self, name: str, text: str, *labels: str) -> GaugeFamily:
        family = self._families[name] = GaugeFamily(name, text, labels, self._registry)
        return family

    def histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> HistogramFamily:
        family = HistogramFamily(name, text, buckets, labels, self._registry, self._cells)
        self._families[name] = family
        return family


class Metrics:
    """The gateway's metrics, registered in ``registry``. ``cells``: where counters and histograms are to lie,
    so that other workers can read them and they outlive this one."""

    def __init__(self, registry: CollectorRegistry, roles: Iterable[str], cells: Cells | None = None) -> None:
        self.registry = registry
        self.families: dict[str, Family[Any]] = {}
        self._roles = frozenset(roles)
        ProcessCollector(registry=registry)
        make = _Families(self.families, registry, cells)
        self._of_requests(make)
        self._of_tokens(make)
        self._of_routes(make)
        self._of_replicas(make)
        self._of_answers(make)
        self._of_the_reference(make)
        self._of_the_watch(make)
        self._of_the_process(make)
        self._of_conversations(make)

    def _of_requests(self, make: _Families) -> None:
        self.requests = make.counter(
            "tiercel_requests_total",
            "Requests, by what was asked for, who answered, and how they ended",
            "role",
            "requested",
            "model",
            "variant",
            "outcome",
        )
        self.duration = make.histogram(
            "tiercel_request_duration_seconds",
            "From the request's last byte in to its end",
            _LATENCY_S,
            *ASKED,
        )
        self.first_token = make.histogram(
            "tiercel_time_to_first_token_seconds", "Of streamed answers", _LATENCY_S, *ASKED
        )
        self.token_gap = make.histogram(
            "tiercel_inter_token_latency_seconds", "Between chunks of a stream", _TOKEN_GAP_S, *ASKED
        )
        self.overhead = make.histogram(
            "tiercel_gateway_overhead_seconds",
            "Time in the gateway itself, without waiting for an engine or a client",
            _OVERHEAD_S,
            *ASKED,
        )

    def _of_tokens(self, make: _Families) -> None:
        self.tokens = make.counter(
            "tiercel_tokens_total", "Tokens, by kind: prompt, completion", *ASKED, "kind"
        )
        self.cached_tokens = make.counter(
            "tiercel_cached_tokens_total", "Prompt tokens that came out of a prefix cache", *ASKED
        )
        self.key_tokens = make.counter(
            "tiercel_key_tokens_total", "Tokens, by API key", "key", *ASKED, "kind"
        )
        self.usage_unreported = make.counter(
            "tiercel_usage_unreported_total",
            "Requests that an engine began and whose tokens it did not count to the end",
            *ASKED,
        )
        self.usage_settled = make.counter(
            "tiercel_usage_settled_total",
            "What became of the prompts of these: known, booked, unknown, failed, dropped",
            *ASKED,
            "outcome",
        )

    def _of_routes(self, make: _Families) -> None:
        self.hedges = make.counter(
            "tiercel_hedges_total",
            "Requests sent to a second replica, by whose answer came first",
            *ASKED,
            "winner",
        )
        self.routes = make.counter("tiercel_route_total", "Routes, by reason", *ASKED, "reason")
        self.missed = make.counter(
            "tiercel_pool_missed_total",
            "Looks for a replica of the variant that a request should have had, and none could take it",
            *ASKED,
        )

    def _of_replicas(self, make: _Families) -> None:
        self.engine_memory = make.gauge(
            "tiercel_engine_memory_bytes", "Resident memory of an engine's process tree", *PLACED
        )
        self.kv_cache_usage = make.gauge(
            "tiercel_kv_cache_usage_ratio", "Share of an engine's KV cache in use", *PLACED
        )
        self.queue_depth = make.gauge("tiercel_queue_depth", "Requests waiting within an engine", *PLACED)
        self.reachable = make.gauge(
            "tiercel_replica_reachable", "1 if a replica's last health probe found it well", *PLACED
        )
        self.engine_read = make.gauge(
            "tiercel_engine_metrics_read", "1 if an engine's own metrics could be read the last time", *PLACED
        )
        self.weight_bytes = make.gauge(
            "tiercel_variant_weight_bytes", "Bytes of a variant's weights", "model", "variant"
        )

    def _of_answers(self, make: _Families) -> None:
        self.nll_mean = make.histogram(
            "tiercel_token_nll_mean", "Mean -log p of an answer's tokens, nats", _NLL_NATS, *ASKED
        )
        self.entropy_max = make.histogram(
            "tiercel_token_entropy_max", "Highest token entropy of an answer, nats", _ENTROPY_NATS, *ASKED
        )
        self.quality_score = make.histogram(
            "tiercel_quality_score", "Score of an answer, 1 is best", _SCORE, *ASKED, "check"
        )
        self.quality_sentences = make.counter(
            "tiercel_quality_sentences_total", "Sentences of checked answers", *ASKED, "label"
        )
        self.quality_checks = make.counter(
            "tiercel_quality_checks_total", "Checks made on answers", *ASKED, "check", "outcome"
        )

    def _of_the_reference(self, make: _Families) -> None:
        self.shadow = make.counter(
            "tiercel_shadow_compared_total", "Quantized answers put before the reference", *ASKED, "result"
        )
        self.disagreement = make.histogram(
            "tiercel_shadow_token_disagreement_ratio",
            "Share of an answer's tokens that are not the reference's favourite",
            _SHARE,
            *ASKED,
        )
        self.divergence = make.histogram(
            "tiercel_shadow_divergence_nats",
            "Mean log-ratio of a quantized answer's tokens to the reference",
            _DIVERGENCE_NATS,
            *ASKED,
        )

    def _of_the_watch(self, make: _Families) -> None:
        self.cusum = make.gauge(
            "tiercel_quality_cusum", "Evidence that a check has changed for the worse, nats", *ASKED, "check"
        )
        self.demoted = make.gauge(
            "tiercel_variant_demoted", "1 while a variant is out of a role's choice", *ASKED
        )
        self.watch_events = make.counter(
            "tiercel_watch_events_total", "What the watch did and said", *ASKED, "kind"
        )
        self.watch_dropped = make.counter(
            "tiercel_watch_outcomes_dropped_total", "Outcomes lost while the watch's store did not answer"
        )
        self.quality_dropped = make.counter(
            "tiercel_quality_dropped_total",
            "Answers not looked at: full, too_long, stopping; or not in time to hold them back: late",
            "reason",
        )
        self.quality_errors = make.counter(
            "tiercel_quality_errors_total",
            "Defects and lost processes of what looks at answers; it has gone on since",
            "part",
        )
        self.escalations = make.counter(
            "tiercel_escalations_total",
            "Answers asked again of a higher precision before the client saw them",
            *ASKED,
            "check",
        )

    def _of_the_process(self, make: _Families) -> None:
        self.job_up = make.gauge(
            "tiercel_background_job_up", "1 while a background job of this process runs", "task"
        )
        self.job_restarts = make.counter(
            "tiercel_background_job_restarts_total",
            "Times that a background job failed and began anew",
            "task",
        )
        self.loop_lag = make.histogram(
            "tiercel_event_loop_lag_seconds", "How much later than asked for the event loop woke", _LAG_S
        )
        self.log_dropped = make.counter(
            "tiercel_log_lines_dropped_total", "Lines of the log that could not be written"
        )
        self.worker_age = make.gauge(
            "tiercel_worker_heartbeat_age_seconds",
            "Since a worker's event loop was last seen to run",
            "worker",
        )
        self.worker_restarts = make.counter(
            "tiercel_worker_restarts_total", "Times that a worker process was started anew", "worker"
        )

    def _of_conversations(self, make: _Families) -> None:
        self.responses_stored = make.counter(
            "tiercel_responses_stored_total", "Responses kept, so that a client can go on from them"
        )
        self.responses_dropped = make.counter(
            "tiercel_responses_dropped_total",
            "Responses that should have been kept and were not, by why: too_large, busy, store_down",
            "reason",
        )
        self.kept = make.counter(
            "tiercel_kept_conversations_total",
            "Requests and answers in a sample that is kept, by what became of them",
            "role",
            "kind",
            "outcome",
        )

    def role(self, role: str | None) -> str:
        """The label of a role: itself if it is configured, else ``other``."""
        return role if role in self._roles else OTHER

    def forget(self, replicas: Iterable[tuple[str, str, str]]) -> None:
        """Replicas that are gone, by model, variant and name: an old figure would pass for a present one."""
        for labels in replicas:
            for gauge in (
                self.engine_memory,
                self.kv_cache_usage,
                self.queue_depth,
                self.reachable,
                self.engine_read,
            ):
                gauge.remove(*labels)

    def forget_variants(self, served: Container[tuple[str, str]], gone_roles: Container[str]) -> None:
        """What is served no more, by model and variant, and roles that are gone: figures that nobody writes
        would stay for ever."""
        for gauge in (self.weight_bytes, self.cusum, self.demoted):
            for values in tuple(gauge.children):
                labels = dict(zip(gauge.label_names, values, strict=True))
                of = labels["model"], labels["variant"]
                if of not in served or labels.get("role") in gone_roles:
                    gauge.remove(*values)

    def know_roles(self, roles: Iterable[str]) -> None:
        """The configuration has changed; counts of roles that are gone stay."""
        self._roles = self._roles | frozenset(roles)
