"""What the watch costs the engines: scoring an answer against writing it again, and log-probabilities.

    python -m benchmarks.watch.cost

Two real engines, the reference and INT4, one request at a time for the first part, alternating. Ratios come
with 95 % bootstrap intervals over answers (first part) and over repeats (second part).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import aiohttp
import numpy as np
from prometheus_client import CollectorRegistry
from tqdm import tqdm

from benchmarks.watch.inject import MODEL, SHORT, VARIANT, WORK, configuration
from benchmarks.watch.traffic import questions
from deploy.commands import run_engines, say
from deploy.engine import EngineSpec, free_port, running
from deploy.models import registry_of
from gateway.config import Config, load_config
from gateway.quality.examiner import Examiner
from gateway.quality.inquiry import Inquiry
from gateway.routing.pools import Pools
from gateway.telemetry.metrics import Metrics

LENGTHS = (8, 64, 256)
"""Tokens that are written, each answer to the end."""
CONCURRENCY, REQUESTS = 16, 160


def interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """The ratio of the sums of paired figures, with its 95 % bootstrap interval."""
    first, second = np.array(a), np.array(b)
    picks = np.random.default_rng(0).integers(0, len(first), size=(2000, len(first)))
    low, high = np.quantile(first[picks].sum(1) / second[picks].sum(1), (0.025, 0.975))
    return float(first.sum() / second.sum()), float(low), float(high)


async def scoring(examiner: Examiner, reference: str, count: int) -> list[dict[str, Any]]:
    rows = []
    for length in LENGTHS:
        scored, written = [], []
        for question in tqdm(questions(("summarizer",), count), desc=f"{length} tokens", file=sys.stderr):
            request = {
                "messages": question.messages,
                "max_tokens": length,
                "temperature": 0,
                "ignore_eos": True,
            }
            reply = await examiner.answer(VARIANT, request)
            text = reply.texts[0]
            began = time.perf_counter()
            await examiner.rows(reference, request, text)
            middle = time.perf_counter()
            await examiner.answer(reference, request)
            scored.append(middle - began)
            written.append(time.perf_counter() - middle)
        ratio, low, high = interval(scored, written)
        rows.append(
            {
                "tokens": length,
                "answers": count,
                "scoring_ms": 1000 * float(np.median(scored)),
                "writing_ms": 1000 * float(np.median(written)),
                "ratio": ratio,
                "low": low,
                "high": high,
            }
        )
    return rows


async def log_probabilities(url: str, model: str, repeats: int) -> dict[str, Any]:
    """Requests per second with and without, interleaved."""
    rates: dict[bool, list[float]] = {True: [], False: []}
    async with aiohttp.ClientSession() as session:

        async def load(asked: bool, first: int) -> float:
            slots = asyncio.Semaphore(CONCURRENCY)

            async def one(messages: list[dict[str, str]]) -> None:
                body: dict[str, Any] = {
                    "model": model,
                    "messages": messages,
                    "max_tokens": 32,
                    "temperature": 0,
                    "ignore_eos": True,
                }
                if asked:
                    body |= {"logprobs": True, "top_logprobs": 5}
                async with slots, session.post(url + "/v1/chat/completions", json=body) as response:
                    assert response.status == 200, await response.text()
                    await response.read()

            began = time.perf_counter()
            asked_all = questions(("summarizer",), REQUESTS, first)
            await asyncio.gather(*(one(question.messages) for question in asked_all))
            return REQUESTS / (time.perf_counter() - began)

        await load(False, 0)
        await load(True, 0)
        for number in tqdm(range(repeats), desc="log-probabilities", file=sys.stderr):
            for asked in (False, True) if number % 2 else (True, False):
                rates[asked].append(await load(asked, REQUESTS * (1 + number)))
    ratio, low, high = interval(rates[True], rates[False])
    medians = {"with": float(np.median(rates[True])), "without": float(np.median(rates[False]))}
    return {**medians, "ratio": ratio, "low": low, "high": high}


async def benchmark(config: Config, count: int, repeats: int) -> dict[str, Any]:
    model = config.of(MODEL)
    registry, reference = registry_of(model), config.references[MODEL]
    urls = {}
    specs = []
    for variant in (model.reference, SHORT):
        card = registry.card(variant)
        log = WORK / f"engine-{variant}.log"
        directory = registry.path(variant, card.version)
        specs.append(EngineSpec(card, directory, model.engine, free_port(model.engine.host), log))
        urls[card.id] = (specs[-1].url,)
    served = config.models[model.name].model_copy(update={"serve": (model.reference, SHORT)})
    config = config.model_copy(update={"pools": urls, "models": {model.name: served}})
    pools = Pools(config, time.monotonic)
    inquiry = Inquiry(config.watch, config.references, lambda: pools, Metrics(CollectorRegistry(), ()))
    first, second = specs
    async with (
        running(first, say),
        running(second, say),
        aiohttp.ClientSession() as session,
    ):
        working = asyncio.create_task(inquiry.run(session))
        await asyncio.sleep(0.1)
        examiner = Examiner(inquiry.ask)
        await scoring(examiner, reference, 3)  # warm
        scored = await scoring(examiner, reference, count)
        asked = await log_probabilities(second.url, model.name, repeats)
        working.cancel()
    return {"scoring": scored, "log_probabilities": asked}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--answers", type=int, default=40, help="per length")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    result = run_engines(benchmark(load_config(configuration(1.0)), options.answers, options.repeats))
    (WORK / "cost.json").write_text(json.dumps(result, indent=1))
    print("| tokens written | scoring, ms | writing, ms | ratio |\n|---|---|---|---|")
    for row in result["scoring"]:
        figures = (row["tokens"], row["scoring_ms"], row["writing_ms"], row["ratio"], row["low"], row["high"])
        print("| {} | {:.0f} | {:.0f} | {:.2f} ({:.2f}–{:.2f}) |".format(*figures))
    one = result["log_probabilities"]
    print(
        f"log-probabilities: {one['with']:.1f} requests/s with, {one['without']:.1f} without, "
        f"ratio {one['ratio']:.3f} ({one['low']:.3f}–{one['high']:.3f})"
    )


if __name__ == "__main__":
    main()
