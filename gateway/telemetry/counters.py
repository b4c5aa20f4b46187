"""Counters, gauges and histograms: plain numbers of one event loop, without locks.

Only the thread of the event loop changes them. Who works in another thread hands the numbers over with
``loop.call_soon_threadsafe``. Reading them is allowed from any thread.

They are shown through a ``CollectorRegistry`` like any others. Where several processes share a port, counters
and histograms lie in memory that all of them can read and that outlives the process (``Cells``); otherwise
they are attributes, which cost a third. prometheus_client's own take a lock per change and look through a
histogram's buckets one by one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.utils import floatToGoString

Labels = tuple[str, ...]


class Cells(Protocol):
    """Numbers in memory that other processes read."""

    numbers: memoryview[float]

    def take(self, name: str, labels: Labels, width: int) -> int | None:
        """Where so many numbers of a child begin; they keep what they had. None when there is no room."""


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


class SharedCounter(Counter):
    """A counter in memory that other processes read."""

    __slots__ = ("_at", "_numbers")

    def __init__(self, numbers: memoryview[float], at: int) -> None:
        self._numbers, self._at = numbers, at

    @property
    def value(self) -> float:
        return float(self._numbers[self._at])

    @value.setter
    def value(self, value: float) -> None:
        self._numbers[self._at] = value

    def inc(self, amount: float = 1) -> None:
        self._numbers[self._at] += amount


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


class SharedHistogram(Histogram):
    """A histogram in memory that other processes read."""

    __slots__ = ("_at", "_numbers", "_sum")

    def __init__(self, bounds: tuple[float, ...], numbers: memoryview[float], at: int) -> None:
        self.bounds = bounds
        self._numbers, self._at, self._sum = numbers, at, at + len(bounds) + 1

    @property
    def counts(self) -> list[float]:
        """A copy."""
        return list(map(float, self._numbers[self._at : self._sum]))

    @counts.setter
    def counts(self, counts: Sequence[float]) -> None:
        for number, count in enumerate(counts):
            self._numbers[self._at + number] = count

    @property
    def total(self) -> float:
        return float(self._numbers[self._sum])

    @total.setter
    def total(self, total: float) -> None:
        self._numbers[self._sum] = total

    def observe(self, value: float) -> None:
        numbers = self._numbers
        numbers[self._at + bisect_left(self.bounds, value)] += 1
        numbers[self._sum] += value


class Gauge:
    """One gauge of a family. It is this process's own: gauges are not added up."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def set(self, value: float) -> None:
        self.value = float(value)

    def dump(self) -> list[float]:
        return [self.value]

    def add(self, dumped: Sequence[float]) -> None:
        self.value += dumped[0]


One = TypeVar("One", Counter, Histogram, Gauge)


class Family(Collector, Generic[One]):
    """All children of a metric, by label values in the order of ``label_names``."""

    kind = ""
    """Prometheus' word for it."""

    def __init__(
        self,
        name: str,
        text: str,
        label_names: Sequence[str],
        registry: CollectorRegistry | None,
        cells: Cells | None = None,
    ) -> None:
        """``cells``: where its numbers are to lie, if not here."""
        self.name = name
        self.text = text
        self.label_names = tuple(label_names)
        self.children: dict[Labels, One] = {}
        self._cells = cells
        if registry is not None:
            registry.register(self)

    def make(self, labels: Labels) -> One:
        raise NotImplementedError

    def labels(self, *values: str) -> One:
        child = self.children.get(values)
        if child is None:
            if len(values) != len(self.label_names):
                raise ValueError(f"{self.name} has the labels {self.label_names}, got {values}")
            child = self.children[values] = self.make(tuple(str(value) for value in values))
        return child

    def describe(self) -> Iterable[Metric]:
        return [self._metric()]

    def collect(self) -> Iterable[Metric]:
        metric: Any = self._metric()
        for labels, child in tuple(self.children.items()):
            self._show(metric, labels, child)
        return [metric]

    def numbers(self) -> dict[Labels, list[float]]:
        """What every child has counted."""
        return {labels: child.dump() for labels, child in tuple(self.children.items())}

    def add(self, dumped: Iterable[tuple[Sequence[str], Sequence[float]]]) -> None:
        for labels, numbers in dumped:
            self.labels(*labels).add(numbers)

    def width(self) -> int:
        """How many numbers a child has."""
        return 1

    def _metric(self) -> Metric:
        raise NotImplementedError

    def _show(self, metric: Any, labels: Labels, child: One) -> None:
        raise NotImplementedError


class CounterFamily(Family[Counter]):
    """A counter; ``name`` ends with ``_total``."""

    kind = "counter"

    def make(self, labels: Labels) -> Counter:
        at = self._cells.take(self.name, labels, 1) if self._cells else None
        return Counter() if at is None or not self._cells else SharedCounter(self._cells.numbers, at)

    def _metric(self) -> CounterMetricFamily:
        return CounterMetricFamily(self.name, self.text, labels=self.label_names)

    def _show(self, metric: CounterMetricFamily, labels: Labels, child: Counter) -> None:
        metric.add_metric(labels, child.value)


class GaugeFamily(Family[Gauge]):
    """A gauge."""

    kind = "gauge"

    def make(self, labels: Labels) -> Gauge:
        return Gauge()

    def remove(self, *labels: str) -> None:
        """Show a child no more; none need be there."""
        self.children.pop(labels, None)

    def _metric(self) -> GaugeMetricFamily:
        return GaugeMetricFamily(self.name, self.text, labels=self.label_names)

    def _show(self, metric: GaugeMetricFamily, labels: Labels, child: Gauge) -> None:
        metric.add_metric(labels, child.value)


class HistogramFamily(Family[Histogram]):
    """A histogram with the given upper bounds of its buckets."""

    kind = "histogram"

    def __init__(
        self,
        name: str,
        text: str,
        bounds: tuple[float, ...],
        label_names: Sequence[str],
        registry: CollectorRegistry | None,
        cells: Cells | None = None,
    ) -> None:
        self.bounds = bounds
        super().__init__(name, text, label_names, registry, cells)

    def make(self, labels: Labels) -> Histogram:
        at = self._cells.take(self.name, labels, self.width()) if self._cells else None
        if at is None or not self._cells:
            return Histogram(self.bounds)
        return SharedHistogram(self.bounds, self._cells.numbers, at)

    def width(self) -> int:
        return len(self.bounds) + 2

    def _metric(self) -> HistogramMetricFamily:
        return HistogramMetricFamily(self.name, self.text, labels=self.label_names)

    def _show(self, metric: HistogramMetricFamily, labels: Labels, child: Histogram) -> None:
        buckets, so_far = [], 0.0
        for bound, count in zip((*child.bounds, float("inf")), child.counts, strict=True):
            so_far += count
            buckets.append((bound_text(bound), so_far))
        metric.add_metric(labels, buckets, child.total)


def bound_text(bound: float) -> str:
    """The ``le`` label of a bucket."""
    return str(floatToGoString(bound))  # type: ignore[no-untyped-call]
