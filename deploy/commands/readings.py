"""Rates between two readings of a gateway's ``/metrics``: counters and histograms as they grew, nothing that
is averaged since the start."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from prometheus_client.parser import text_string_to_metric_families

from gateway.config import parts_of, variant_id

REQUESTS = "tiercel_requests_total"
TOKENS = "tiercel_tokens_total"
DURATION = "tiercel_request_duration_seconds_bucket"
FIRST_TOKEN = "tiercel_time_to_first_token_seconds_bucket"
DEMOTED = "tiercel_variant_demoted"
MEMORY = "tiercel_engine_memory_bytes"
KV_CACHE = "tiercel_kv_cache_usage_ratio"
QUEUE = "tiercel_queue_depth"
STARTED = "process_start_time_seconds"
RESIDENT = "process_resident_memory_bytes"
COUNTERS = (REQUESTS, TOKENS, DURATION, FIRST_TOKEN)
WANTED = (*COUNTERS, DEMOTED, MEMORY, KV_CACHE, QUEUE, STARTED, RESIDENT)

CLIENT_LEFT = "499"
"""The outcome of a request whose client went away: nobody's error."""

Labels = tuple[tuple[str, str], ...]
Cell = tuple[str, str]
"""Role, and variant as ``model:variant``."""


@dataclass(frozen=True)
class Reading:
    """What ``/metrics`` said at a moment of this machine's clock that never goes backwards."""

    at: float
    samples: Mapping[str, Mapping[Labels, float]]

    def one(self, name: str, **labels: str) -> float | None:
        """The sample with exactly these labels."""
        return self.samples.get(name, {}).get(tuple(sorted(labels.items())))

    def of_replica(self, name: str, variant: str, replica: str) -> float | None:
        """The same for a replica of a ``model:variant``."""
        model, short = parts_of(variant)
        return self.one(name, model=model, variant=short, replica=replica)


@dataclass(frozen=True)
class Percentiles:
    """Of what was observed between two readings, seconds; infinite beyond the last bucket."""

    p50: float
    p95: float


@dataclass(frozen=True)
class Flow:
    """What a variant did for a role between two readings, per second."""

    role: str
    variant: str
    requests: float
    refused: float
    """Answered with 4xx, without the clients that left."""
    errors: float
    """Answered with 5xx, or broken off."""
    tokens: float
    """Of answers."""
    duration: Percentiles | None
    first_token: Percentiles | None


def parse(text: str, at: float) -> Reading:
    """Read Prometheus text; only what is used here. Raises ValueError for what is none."""
    lines = "\n".join(line for line in text.splitlines() if line.startswith(WANTED))
    samples: dict[str, dict[Labels, float]] = defaultdict(dict)
    for family in text_string_to_metric_families(lines + "\n"):
        for sample in family.samples:
            samples[sample.name][tuple(sorted(sample.labels.items()))] = sample.value
    return Reading(at, samples)


def read(text: Callable[[], str], clock: Callable[[], float] = time.monotonic) -> Reading:
    """Take a reading now."""
    return parse(text(), clock())


def comparable(before: Reading, now: Reading) -> bool:
    """Whether all counters of ``before`` have grown, or stayed. They have not where the gateway was started
    anew, or one of its workers did not answer: then there is no rate to be had."""
    return all(
        value <= now.samples.get(name, {}).get(labels, -math.inf)
        for name in COUNTERS
        for labels, value in before.samples.get(name, {}).items()
    )


def flows(before: Reading, now: Reading) -> list[Flow]:
    """What went on between two comparable readings, by role and variant; also where nothing did."""
    passed = max(now.at - before.at, 1e-9)
    counts: dict[Cell, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for labels, grown in _growth(before, now, REQUESTS):
        cell, outcome = _cell(labels), labels["outcome"]
        counts[cell]["requests"] += grown
        if outcome.startswith("5"):
            counts[cell]["errors"] += grown
        elif outcome.startswith("4") and outcome != CLIENT_LEFT:
            counts[cell]["refused"] += grown
    for labels, grown in _growth(before, now, TOKENS):
        if labels["kind"] == "completion":
            counts[_cell(labels)]["tokens"] += grown
    durations, first_tokens = _histograms(before, now, DURATION), _histograms(before, now, FIRST_TOKEN)
    return [
        Flow(
            *cell,
            requests=found["requests"] / passed,
            refused=found["refused"] / passed,
            errors=found["errors"] / passed,
            tokens=found["tokens"] / passed,
            duration=percentiles(durations.get(cell, {})),
            first_token=percentiles(first_tokens.get(cell, {})),
        )
        for cell, found in sorted(counts.items())
    ]


def percentiles(buckets: Mapping[float, float]) -> Percentiles | None:
    """From a histogram's cumulative counts by upper bound; None when it counted nothing."""
    if not buckets or buckets[max(buckets)] <= 0:
        return None
    return Percentiles(quantile(0.5, buckets), quantile(0.95, buckets))


def quantile(q: float, buckets: Mapping[float, float]) -> float:
    """As Prometheus' ``histogram_quantile``: linear within a bucket, the first of which begins at 0."""
    rank = q * buckets[max(buckets)]
    for (low, below), (high, count) in pairwise([(0.0, 0.0), *sorted(buckets.items())]):
        if count >= rank and count > below:
            return low + (high - low) * (rank - below) / (count - below)
    return math.inf


def _growth(before: Reading, now: Reading, name: str) -> Iterable[tuple[dict[str, str], float]]:
    old = before.samples.get(name, {})
    for labels, value in now.samples.get(name, {}).items():
        yield dict(labels), value - old.get(labels, 0.0)


def _histograms(before: Reading, now: Reading, name: str) -> dict[Cell, dict[float, float]]:
    found: dict[Cell, dict[float, float]] = defaultdict(lambda: defaultdict(float))
    for labels, grown in _growth(before, now, name):
        found[_cell(labels)][float(labels["le"])] += grown
    return found


def _cell(labels: Mapping[str, str]) -> Cell:
    return labels["role"], variant_id(labels["model"], labels["variant"])


def seconds_text(seconds: float) -> str:
    """At most five characters, as 8.4ms, 120ms, 1.2s, 85s, long."""
    if math.isinf(seconds):
        return ">600s"
    if seconds < 0.01:
        return f"{1000 * seconds:.1f}ms"
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f}ms"
    return f"{seconds:.1f}s" if seconds < 9.95 else f"{seconds:.0f}s"


def percentiles_text(found: Percentiles | None) -> str:
    return "-" if found is None else f"{seconds_text(found.p50)}/{seconds_text(found.p95)}"


def bytes_text(count: float | None) -> str:
    if count is None:
        return "-"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def share_text(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def span_text(seconds: float) -> str:
    """As 42 s, 12 min, 3 h 5 min, 4 d 2 h."""
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{int(seconds)} s"
