"""Counters and histograms for the path of every token: plain numbers of one event loop, without locks.

They are shown through a ``CollectorRegistry`` like any others, and can be added up over worker processes.
prometheus_client's own take a lock per change and look through a histogram's buckets one by one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any, Generic, TypeVar

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.utils import floatToGoString

Labels = tuple[str, ...]


class Counter:
    """One counter of a family."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1) -> None:
        self.value += amount

    def dump(self) -> list[float]:
        return [self.value]

    def add(self, dumped: Sequence[float]) -> None:
        self.value += dumped[0]


class Histogram:
    """One histogram of a family. ``counts`` has one element per bucket, the last for what is above all."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0.0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def dump(self) -> list[float]:
        return [*self.counts, self.total]

    def add(self, dumped: Sequence[float]) -> None:
        self.counts = [mine + other for mine, other in zip(self.counts, dumped[:-1], strict=True)]
        self.total += dumped[-1]


One = TypeVar("One", Counter, Histogram)


class Family(Collector, Generic[One]):
    """All children of a metric, by label values in the order of ``label_names``."""

    def __init__(
        self, name: str, text: str, label_names: Sequence[str], registry: CollectorRegistry | None
    ) -> None:
        self.name = name
        self.text = text
        self.label_names = tuple(label_names)
        self.children: dict[Labels, One] = {}
        if registry is not None:
            registry.register(self)

    def make(self) -> One:
        raise NotImplementedError

    def labels(self, *values: str) -> One:
        child = self.children.get(values)
        if child is None:
            if len(values) != len(self.label_names):
                raise ValueError(f"{self.name} has the labels {self.label_names}, got {values}")
            child = self.children[values] = self.make()
        return child

    def describe(self) -> Iterable[Metric]:
        return [self._metric()]

    def collect(self) -> Iterable[Metric]:
        metric: Any = self._metric()
        for labels, child in self.children.items():
            self._show(metric, labels, child)
        return [metric]

    def dump(self) -> list[tuple[Labels, list[float]]]:
        """What another process needs to add these numbers to its own."""
        return [(labels, child.dump()) for labels, child in self.children.items()]

    def add(self, dumped: Iterable[tuple[Sequence[str], Sequence[float]]]) -> None:
        for labels, numbers in dumped:
            self.labels(*labels).add(numbers)

    def _metric(self) -> Metric:
        raise NotImplementedError

    def _show(self, metric: Any, labels: Labels, child: One) -> None:
        raise NotImplementedError


class CounterFamily(Family[Counter]):
    """A counter; ``name`` ends with ``_total``."""

    def make(self) -> Counter:
        return Counter()

    def _metric(self) -> CounterMetricFamily:
        return CounterMetricFamily(self.name, self.text, labels=self.label_names)

    def _show(self, metric: CounterMetricFamily, labels: Labels, child: Counter) -> None:
        metric.add_metric(labels, child.value)


class HistogramFamily(Family[Histogram]):
    """A histogram with the given upper bounds of its buckets."""

    def __init__(
        self,
        name: str,
        text: str,
        bounds: tuple[float, ...],
        label_names: Sequence[str],
        registry: CollectorRegistry | None,
    ) -> None:
        self.bounds = bounds
        super().__init__(name, text, label_names, registry)

    def make(self) -> Histogram:
        return Histogram(self.bounds)

    def _metric(self) -> HistogramMetricFamily:
        return HistogramMetricFamily(self.name, self.text, labels=self.label_names)

    def _show(self, metric: HistogramMetricFamily, labels: Labels, child: Histogram) -> None:
        buckets, so_far = [], 0.0
        for bound, count in zip((*child.bounds, float("inf")), child.counts, strict=True):
            so_far += count
            buckets.append((_text(bound), so_far))
        metric.add_metric(labels, buckets, child.total)


def _text(bound: float) -> str:
    return str(floatToGoString(bound))  # type: ignore[no-untyped-call]
