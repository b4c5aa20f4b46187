"""``/metrics``: every number as Prometheus text, written in a thread.

A hundred roles with three variants are some forty thousand lines. A thread that writes them holds the
interpreter's lock, so it stops for a moment after every few hundred lines, and whoever asks while it writes
gets the text that is being written.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric

from gateway.telemetry.counters import Family, HistogramFamily, Labels, bound_text

LINES_AT_A_TIME = 500
"""Between two pauses: about a third of a millisecond."""
PAUSE_S = 0.0001
"""Long enough for another thread to take the lock; ``sleep(0)`` mostly takes it back at once."""

Numbers = Mapping[Labels, Sequence[float]]
"""What every child of a metric has counted, by its labels."""


class Exposition:
    """Writes the text. ``numbers`` gives what to show of a family, called in the thread; by default what it
    has itself."""

    def __init__(
        self,
        families: Mapping[str, Family[Any]],
        registry: CollectorRegistry,
        numbers: Callable[[Family[Any]], Numbers] | None = None,
    ) -> None:
        self._families = families
        self._registry = registry
        self._numbers = numbers
        self._labels: dict[str, dict[Labels, str]] = {name: {} for name in families}
        self._writing: asyncio.Task[bytes] | None = None
        self.written = 0
        """Texts so far."""

    async def text(self) -> bytes:
        """The present text. Those who ask while it is written get the same one."""
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(asyncio.to_thread(self.write))
        # One who leaves must not take the text away from the others.
        return await asyncio.shield(self._writing)

    def write(self) -> bytes:
        """The text, written here and now."""
        self.written += 1
        parts: list[bytes] = []
        for lines in self._lines():
            parts.append("".join(lines).encode())
            time.sleep(PAUSE_S)
        parts.append(generate_latest(_Others(self._registry)))
        return b"".join(parts)

    def _lines(self) -> Iterator[list[str]]:
        """Pieces of the text, of about ``LINES_AT_A_TIME`` lines."""
        lines: list[str] = []
        for name, family in self._families.items():
            children = family.numbers() if self._numbers is None else self._numbers(family)
            lines.append(f"# HELP {name} {_escaped(family.text)}\n# TYPE {name} {family.kind}\n")
            tails = _tails(family)
            for labels, numbers in children.items():
                text = self._label_text(family, labels)
                if tails is None:
                    lines.append(f"{name}{_braced(text)} {_number(numbers[0])}\n")
                else:
                    _histogram(lines, name, text, tails, numbers)
                if len(lines) >= LINES_AT_A_TIME:
                    yield lines
                    lines = []
            yield lines
            lines = []

    def _label_text(self, family: Family[Any], labels: Labels) -> str:
        known = self._labels[family.name]
        text = known.get(labels)
        if text is None:
            pairs = sorted(zip(family.label_names, labels, strict=True))
            text = known[labels] = ",".join(f'{name}="{_quoted(value)}"' for name, value in pairs)
        return text


class _Others:
    """A registry's metrics that are no families of ours, such as the process's own."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        for collector in tuple(self._registry._collector_to_names):
            if not isinstance(collector, Family):
                yield from collector.collect()


def _tails(family: Family[Any]) -> list[str] | None:
    """How the lines of a histogram's buckets end; None for what is no histogram."""
    if not isinstance(family, HistogramFamily):
        return None
    return [f'le="{bound_text(bound)}"}} ' for bound in (*family.bounds, float("inf"))]


def _histogram(lines: list[str], name: str, text: str, tails: list[str], numbers: Sequence[float]) -> None:
    head = f"{name}_bucket{{{text}," if text else f"{name}_bucket{{"
    so_far = 0.0
    for tail, count in zip(tails, numbers, strict=False):  # the sum of all values comes last
        so_far += count
        lines.append(f"{head}{tail}{so_far}\n")
    if tails[0].startswith('le="-'):
        return  # a sum that may fall is no counter, so there is none
    labels = _braced(text)
    lines.append(f"{name}_count{labels} {so_far}\n{name}_sum{labels} {_number(numbers[-1])}\n")


def _braced(text: str) -> str:
    return f"{{{text}}}" if text else ""


def _number(value: float) -> str:
    if value - value == 0.0:
        return repr(value)
    return "NaN" if value != value else "+Inf" if value > 0 else "-Inf"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n")


def _quoted(value: str) -> str:
    return _escaped(value).replace('"', r"\"")
