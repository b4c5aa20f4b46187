"""A bounded long run of one engine: does it become slower, larger, or answer otherwise?

In rounds: requests that come together, whose prompts no cache has, are timed; then the memory of the engine's
processes is read; and every so often the same probes are asked alone. Slopes over time are Theil and Sen's,
with their 95 % interval (Sen, 1968), which a few slow rounds do not move. The first rounds warm up and do not
count.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence

from pydantic import BaseModel, ConfigDict

from quantize.evaluate.client import EngineClient
from quantize.evaluate.speed import Load, seconds_of
from quantize.evaluate.tasks import Item

LOAD = Load(8, 128, 24)
PROBE_EVERY = 10
"""Rounds between two passes over the probes."""
WARM_UP, LEAST = 0.1, 6
"""Share of the rounds that warms up, and rounds that a slope needs."""
MOST_POINTS = 1500
"""Of a slope, which looks at all pairs; of more, medians of neighbours. A night's rounds took tens of GB."""
DRIFT, LEAK = 0.05, 0.02
"""Changes over the whole run from which on a slope is told as one: of the time, and of the memory."""


class Slope(BaseModel):
    """Per hour, with its 95 % interval, in the unit of what was measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    per_hour: float
    low: float
    high: float
    median: float
    """Of what was measured."""
    over_run: float
    """The slope over the run's time, as a share of the median."""

    def shows(self, least: float) -> bool:
        """Whether it grows, by ``least`` or more over the run, beyond what chance does."""
        return self.low > 0 and self.over_run >= least


class Soak(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    variant: str
    seconds: float
    rounds: int
    tokens: int
    """That were written."""
    round_s: Slope | None
    """None where there were too few rounds."""
    memory: Slope | None
    """Bytes; None as well where it cannot be read."""
    probes: int
    passes: int
    """Over the probes, after the first."""
    changed: int
    """Answers of those that were not the first pass's."""

    @property
    def well(self) -> bool:
        slower = self.round_s is not None and self.round_s.shows(DRIFT)
        larger = self.memory is not None and self.memory.shows(LEAK)
        return not (slower or larger or self.changed)


async def soak(
    client: EngineClient,
    probes: Sequence[Item],
    variant: str,
    seconds: float,
    resident: Callable[[], int | None],
    clock: Callable[[], float] = time.monotonic,
) -> Soak:
    """Run for ``seconds``, at least three rounds. ``resident`` reads the memory of the engine's processes.
    Raises EngineError."""
    rng, began = random.Random(0), clock()
    first = [await _answer(client, item) for item in probes]
    times: list[tuple[float, float]] = []
    sizes: list[tuple[float, float]] = []
    passes = changed = 0
    while clock() - began < seconds or len(times) < 3:
        took = await seconds_of(client, rng, LOAD, LOAD.answer_tokens)
        times.append((clock() - began, took))
        if (size := resident()) is not None:
            sizes.append((clock() - began, float(size)))
        if len(times) % PROBE_EVERY == 0:
            again = [await _answer(client, item) for item in probes]
            passes += 1
            changed += sum(one != other for one, other in zip(first, again, strict=True))
    return Soak(
        variant=variant,
        seconds=clock() - began,
        rounds=len(times),
        tokens=len(times) * LOAD.together * LOAD.answer_tokens,
        round_s=slope(times),
        memory=slope(sizes),
        probes=len(probes),
        passes=passes,
        changed=changed,
    )


async def _answer(client: EngineClient, item: Item) -> str:
    return await client.answer(item.messages, item.max_tokens, template=item.chat_template_kwargs)


def slope(points: Sequence[tuple[float, float]]) -> Slope | None:
    """Of (seconds, value); None where fewer than :data:`LEAST` are left after warming up."""
    from scipy.stats import theilslopes

    kept = _thinned(points[max(1, round(WARM_UP * len(points))) :])
    if len(kept) < LEAST:
        return None
    at, values = zip(*kept, strict=True)
    found = theilslopes(values, at, alpha=0.95)
    middle = statistics.median(values)
    return Slope(
        per_hour=3600 * float(found[0]),
        low=3600 * float(found[2]),
        high=3600 * float(found[3]),
        median=middle,
        over_run=float(found[0]) * (at[-1] - at[0]) / middle if middle else 0.0,
    )


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most :data:`MOST_POINTS`: medians of as many neighbours each as that takes."""
    each = -(-len(points) // MOST_POINTS) or 1
    parts = [points[at : at + each] for at in range(0, len(points), each)]
    return [(statistics.median(at for at, _ in one), statistics.median(v for _, v in one)) for one in parts]
