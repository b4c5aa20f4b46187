"""The last minutes of traffic: differences of the counters between samples, kept in two bounded rings.

A request costs nothing more for it. One task looks at the counters every five seconds, at multiples of five
seconds of the clock, so that samples of several workers of one machine are of the same stretches of time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry

from gateway.config import variant_id
from gateway.telemetry.counters import Labels
from gateway.telemetry.exposition import Numbers
from gateway.telemetry.ledger import NO_VARIANT
from gateway.telemetry.metrics import Metrics

INTERVAL_S = 5
KEPT = 180
"""Samples that charts are drawn from: a quarter of an hour."""
RECENT = 12
"""Samples that make up "the last minute"."""
SHORTEST_S = 1.0
"""Rates over less than this would be chance."""
SET_BACK_S = 30.0
"""A clock that goes back by more was wrong: samples that it made are of a time to come."""
CLIENT_LEFT = "499"

Series = tuple[str, str]
"""Role and ``model:variant``; ``none`` for requests that got no route."""
Sums = list[float]
"""Requests, errors, tokens written, then the buckets of the duration and of the time to the first token."""
REQUESTS, ERRORS, TOKENS, BUCKETS = 0, 1, 2, 3
Figures = dict[Series, list[float | None]]
ALL: Series = ("", "")
"""The series of all traffic."""

_SHOWN = (
    "tiercel_requests_total",
    "tiercel_tokens_total",
    "tiercel_key_tokens_total",
    "tiercel_route_total",
    "tiercel_request_duration_seconds",
    "tiercel_time_to_first_token_seconds",
)


@dataclass
class Totals:
    """Counters since the start, as far as the console shows them."""

    series: dict[Series, Sums] = field(default_factory=dict)
    tokens: dict[Labels, float] = field(default_factory=dict)
    """Role, ``model:variant`` and kind to tokens."""
    key_tokens: dict[Labels, float] = field(default_factory=dict)
    """Key, role, ``model:variant`` and kind to tokens."""
    routes: dict[Labels, float] = field(default_factory=dict)
    """Role, ``model:variant`` and reason to requests."""

    @property
    def requests(self) -> float:
        return sum(sums[REQUESTS] for sums in self.series.values())


def read_totals(metrics: Metrics) -> Totals:
    """Of this process."""
    duration, first = len(metrics.duration.bounds) + 1, len(metrics.first_token.bounds) + 1
    found = Totals(
        tokens={
            (role, _id(model, variant), kind): count.value
            for (role, model, variant, kind), count in metrics.tokens.children.items()
        },
        key_tokens={
            (key, role, _id(model, variant), kind): count.value
            for (key, role, model, variant, kind), count in metrics.key_tokens.children.items()
        },
        routes={
            (role, _id(model, variant), reason): count.value
            for (role, model, variant, reason), count in metrics.routes.children.items()
        },
    )
    of = _Series(found.series, duration + first)
    for (role, _, model, variant, outcome), count in metrics.requests.children.items():
        of.count(role, _id(model, variant), outcome, count.value)
    for (role, variant, kind), value in found.tokens.items():
        if kind == "completion":
            of(role, variant)[TOKENS] += value
    for (role, model, variant), spread in metrics.duration.children.items():
        of(role, _id(model, variant))[BUCKETS : BUCKETS + duration] = spread.counts
    for (role, model, variant), spread in metrics.first_token.children.items():
        of(role, _id(model, variant))[BUCKETS + duration :] = spread.counts
    return found


def add_totals(counted: Callable[[str], Numbers]) -> Totals:
    """Of several processes, from what all have counted of a metric."""
    total = Metrics(CollectorRegistry(), ())
    for name in _SHOWN:
        total.families[name].add(counted(name).items())
    return read_totals(total)


class _Series:
    """Finds or makes the sums of a role and a variant."""

    def __init__(self, series: dict[Series, Sums], buckets: int) -> None:
        self._series = series
        self._empty = [0.0] * (BUCKETS + buckets)

    def __call__(self, role: str, variant: str) -> Sums:
        sums = self._series.get((role, variant))
        if sums is None:
            sums = self._series[role, variant] = self._empty.copy()
        return sums

    def count(self, role: str, variant: str, outcome: str, requests: float) -> None:
        sums = self(role, variant)
        sums[REQUESTS] += requests
        if outcome >= "400" and outcome != CLIENT_LEFT:
            sums[ERRORS] += requests


@dataclass(frozen=True, slots=True)
class Sample:
    """What has happened between two looks at the counters. ``figures``: of the series in which anything
    has, and of all together."""

    at: int
    """Unix time of the end, seconds."""
    figures: Mapping[Series, Sequence[float | None]]
    engines: Mapping[str, Sequence[float | None]]
    """Replica to its requests in flight, those waiting in the engine, KV cache in use, bytes of memory."""


class History:
    """Samples, the oldest given up first."""

    def __init__(self, metrics: Metrics) -> None:
        self._durations = metrics.duration.bounds
        self._firsts = metrics.first_token.bounds
        self.samples: deque[Sample] = deque(maxlen=KEPT)
        self._recent: deque[tuple[float, dict[Series, Sums], dict[Labels, float]]] = deque(maxlen=RECENT)
        self._before: Totals | None = None
        self._before_at = 0.0
        self._minute: tuple[float, Figures, dict[Labels, float]] | None = None

    def add(self, at: float, totals: Totals, engines: Mapping[str, Sequence[float | None]]) -> None:
        """``at``: Unix time, seconds; ``totals``: since the start."""
        before, seconds = self._before, at - self._before_at
        if before is not None and -SET_BACK_S < seconds < SHORTEST_S:
            return
        if before is not None and seconds < 0:
            before = None
            self.samples.clear()
            self._recent.clear()
            self._minute = None
        if before is not None and totals.requests < before.requests:
            before = None  # a worker has been started anew
        self._before, self._before_at = totals, at
        if before is None:
            return
        if seconds > 4 * INTERVAL_S:
            self._recent.clear()  # nobody has looked for a while: the last minute begins here
        changed = _differences(totals.series, before.series)
        routes = {
            labels: more
            for labels, value in totals.routes.items()
            if (more := value - before.routes.get(labels, 0.0)) > 0
        }
        self._recent.append((seconds, changed, routes))
        self._minute = None
        figures = {series: self.figures(sums, seconds) for series, sums in _with_all(changed).items()}
        self.samples.append(Sample(int(at), figures, engines))

    def since(self, at: float) -> list[Sample]:
        """Samples that end after ``at``."""
        return [sample for sample in self.samples if sample.at > at]

    def last_minute(self) -> tuple[float, Figures, dict[Labels, float]]:
        """The seconds that are known of it, figures by series and of all together, and routes by reason."""
        if self._minute is None:
            self._minute = self._add_up()
        return self._minute

    def _add_up(self) -> tuple[float, Figures, dict[Labels, float]]:
        seconds = sum(one for one, _, _ in self._recent)
        added: dict[Series, Sums] = {}
        routes: dict[Labels, float] = {}
        for _, changed, reasons in self._recent:
            for series, sums in changed.items():
                known = added.get(series)
                added[series] = sums if known is None else [a + b for a, b in zip(known, sums, strict=True)]
            for labels, value in reasons.items():
                routes[labels] = routes.get(labels, 0.0) + value
        return seconds, {s: self.figures(sums, seconds) for s, sums in _with_all(added).items()}, routes

    def figures(self, sums: Sums, seconds: float) -> list[float | None]:
        """Requests, errors and tokens per second; seconds that half and 95 % of the requests took at most,
        and the same of the time to the first token."""
        middle = BUCKETS + len(self._durations) + 1
        rates = [_round(value / seconds) for value in sums[:BUCKETS]]
        durations, firsts = sums[BUCKETS:middle], sums[middle:]
        quantiles = [
            quantile(share, bounds, counts)
            for bounds, counts in ((self._durations, durations), (self._firsts, firsts))
            for share in (0.5, 0.95)
        ]
        return [*rates, *(None if value is None else _round(value) for value in quantiles)]


def quantile(share: float, bounds: Sequence[float], counts: Sequence[float]) -> float | None:
    """From a histogram, as PromQL's ``histogram_quantile``: linear within a bucket, and the highest bound
    for what lies above all. None without anything in it."""
    total = sum(counts)
    if total <= 0:
        return None
    so_far = list(accumulate(counts))
    number = bisect_left(so_far, share * total)
    if number == len(bounds):
        return bounds[-1]
    low = bounds[number - 1] if number else 0.0
    within = 1 - (so_far[number] - share * total) / counts[number]
    return low + (bounds[number] - low) * within


def _differences(now: Mapping[Series, Sums], before: Mapping[Series, Sums]) -> dict[Series, Sums]:
    found = {}
    for series, sums in now.items():
        old = before.get(series)
        if old is None:
            found[series] = sums
        elif sums != old:
            found[series] = [max(0.0, a - b) for a, b in zip(sums, old, strict=True)]
    return found


def _with_all(series: dict[Series, Sums]) -> dict[Series, Sums]:
    if not series:
        return {}
    return {**series, ALL: [sum(column) for column in zip(*series.values(), strict=True)]}


def _id(model: str, variant: str) -> str:
    return NO_VARIANT if model == variant == NO_VARIANT else variant_id(model, variant)


def _round(value: float) -> float:
    """As many digits as anybody can see on a chart."""
    return float(f"{value:.4g}")


def rows(table: Mapping[Labels, float]) -> Iterable[list[Any]]:
    """Labels and value, as a page reads them."""
    return [[*labels, value] for labels, value in table.items()]
