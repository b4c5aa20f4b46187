"""How fast an engine writes a variant's answers: with its bytes, what the variant costs."""

from __future__ import annotations

import asyncio
import random
import statistics
import time

from quantize.card import Speed
from quantize.evaluate.client import EngineClient

PROMPT_TOKENS, ANSWER_TOKENS = 128, 48
TOGETHER = 8
"""Requests at a time: an auxiliary agent's engine is never alone with one."""
PASSES = 3
_WORDS = range(100, 1000)
"""Token ids that every vocabulary has."""


async def measure_speed(client: EngineClient) -> Speed:
    """Tokens written per second, the median of some passes after one that is not counted. Prompts are random
    tokens, so that none is in the prefix cache. The machine should do nothing else. Raises EngineError."""
    rng = random.Random(time.monotonic_ns())
    rates = []
    for _ in range(PASSES + 1):
        prompts = [rng.choices(_WORDS, k=PROMPT_TOKENS) for _ in range(TOGETHER)]
        began = time.monotonic()
        written = await asyncio.gather(*(client.write(prompt, ANSWER_TOKENS) for prompt in prompts))
        rates.append(sum(written) / (time.monotonic() - began))
    return Speed(
        tokens_per_s=statistics.median(rates[1:]),
        slowest=min(rates[1:]),
        fastest=max(rates[1:]),
        together=TOGETHER,
        prompt_tokens=PROMPT_TOKENS,
        answer_tokens=ANSWER_TOKENS,
    )
