"""How fast an engine writes a variant's answers: with its bytes, what the variant costs.

Measured at several loads, so that :mod:`deploy.fleet` can tell what other traffic would take. Prompts are
random tokens: none is in the prefix cache.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from quantize.core.energy import Meter
from quantize.core.engine_figures import Speed, SpeedPoint
from quantize.evaluate.client import EngineClient

_WORDS = range(100, 1000)
"""Token ids that every vocabulary has."""


@dataclass(frozen=True)
class Load:
    """Requests that come together, and the tokens of each."""

    together: int
    prompt_tokens: int
    answer_tokens: int


USUAL = Load(8, 128, 48)
"""By which ``tokens_per_s`` is measured: an auxiliary agent's engine is never alone with one request."""
PASSES = 3
"""Of the usual load, after one that is not counted; the others have one each."""
LABEL_PASSES = 15
"""The same of labels, of which a pass takes hundredths of a second."""
AROUND = 2
"""Tokens around a text that a classifier reads."""
NOTHING_S = 1e-9
OTHERS = (Load(1, 128, 24), Load(16, 128, 24), Load(4, 512, 24))
"""From which, with the usual one, is told what batch size and context cost."""


async def measure_speed(client: EngineClient, longest: int, meter: Meter | None = None) -> Speed:
    """Tokens written per second, and per joule of this machine where it tells, at the usual load (the median
    of some passes, and their sum); and points at several loads: those that fit into ``longest`` tokens. The
    machine should do nothing else. Raises EngineError."""
    rng = random.Random(time.monotonic_ns())
    await seconds_of(client, rng, USUAL, USUAL.answer_tokens)
    with meter or Meter() as energy:
        whole = [await seconds_of(client, rng, USUAL, USUAL.answer_tokens) for _ in range(PASSES)]
    points = [await _point(client, rng, USUAL, statistics.median(whole))]
    for load in OTHERS:
        if load.prompt_tokens + load.answer_tokens <= longest:
            seconds = await seconds_of(client, rng, load, load.answer_tokens)
            points.append(await _point(client, rng, load, seconds))
    return _speed(USUAL, whole, energy, points)


async def measure_labels(client: EngineClient, longest: int, meter: Meter | None = None) -> Speed:
    """The same of a classifier's engine: labels per second, each of which is one token and all of an answer.
    Texts are no longer than ``longest`` tokens with those around them."""
    rng = random.Random(time.monotonic_ns())
    loads = [
        replace(one, prompt_tokens=min(one.prompt_tokens, longest - AROUND), answer_tokens=1)
        for one in (USUAL, *OTHERS)
    ]
    await seconds_of(client, rng, loads[0], 1)
    with meter or Meter() as energy:
        whole = [await seconds_of(client, rng, loads[0], 1) for _ in range(LABEL_PASSES)]
    points = [_label_point(loads[0], statistics.median(whole))]
    for load in loads[1:]:
        seconds = [await seconds_of(client, rng, load, 1) for _ in range(PASSES)]
        points.append(_label_point(load, statistics.median(seconds)))
    return _speed(loads[0], whole, energy, points)


def _label_point(load: Load, seconds: float) -> SpeedPoint:
    """With its first token an answer is complete; those that other engines write behind it take nothing."""
    return SpeedPoint(
        together=load.together,
        prompt_tokens=load.prompt_tokens,
        answer_tokens=2,
        prompt_s=seconds,
        step_s=NOTHING_S,
    )


def _speed(load: Load, whole: Sequence[float], energy: Meter, points: Sequence[SpeedPoint]) -> Speed:
    written = load.together * load.answer_tokens
    return Speed(
        tokens_per_s=written / statistics.median(whole),
        tokens_per_joule=len(whole) * written / energy.joules if energy.joules else None,
        energy=energy.source,
        slowest=written / max(whole),
        fastest=written / min(whole),
        together=load.together,
        prompt_tokens=load.prompt_tokens,
        answer_tokens=load.answer_tokens,
        points=tuple(points),
    )


async def _point(client: EngineClient, rng: random.Random, load: Load, whole: float) -> SpeedPoint:
    """The load's point: of the seconds ``whole`` those that its prompts take, and the rest per step."""
    prompt_s = await seconds_of(client, rng, load, 1)
    return SpeedPoint(
        together=load.together,
        prompt_tokens=load.prompt_tokens,
        answer_tokens=load.answer_tokens,
        prompt_s=prompt_s,
        # A pass in which others disturbed the prompts leaves nothing for the steps; they take some time.
        step_s=max(whole - prompt_s, 0.01 * whole) / (load.answer_tokens - 1),
    )


async def seconds_of(client: EngineClient, rng: random.Random, load: Load, answer_tokens: int) -> float:
    """Until all requests of a load have written so many tokens."""
    prompts = [rng.choices(_WORDS, k=load.prompt_tokens) for _ in range(load.together)]
    began = time.monotonic()
    await asyncio.gather(*(client.write(prompt, answer_tokens) for prompt in prompts))
    return time.monotonic() - began
