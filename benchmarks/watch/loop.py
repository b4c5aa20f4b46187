"""What the event loop spends on an answer that is listened to.

    python -m benchmarks.watch.loop

Answers of several lengths, with the log-probabilities of five tokens at each place, are put together event
by event, handed over, looked at in the process for that, and what was found is counted. The figures are of
the CPU time of the loop's thread alone, per answer: medians of the repeats. The reader's own decoding, which
gives the client what it asked for, is left out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import uvloop
from prometheus_client import CollectorRegistry

from gateway.config import Config
from gateway.quality.answer import Answer
from gateway.quality.observe import Observed, Observer
from gateway.quality.process import CheckProcess
from gateway.quality.records import AnswerRecord, Look, encode
from gateway.telemetry.metrics import Metrics

SHAPES = (("whole, 8 tokens", 8, 8), ("stream of 64", 64, 1), ("stream of 512", 512, 1))
"""Name, tokens, and tokens in an event."""

NOTHING = encode(AnswerRecord(b"{}", []))


def events(tokens: int, each: int) -> list[tuple[dict[str, Any], bytes]]:
    """Decoded, and as they came."""
    top = [{"token": f" t{n}", "logprob": math.log(0.5 / (n + 1)), "bytes": [32, 116]} for n in range(5)]
    place = {"token": " t0", "logprob": math.log(0.5), "bytes": [32, 116], "top_logprobs": top}
    made = []
    for first in range(0, tokens, each):
        part = {"content": " t0" * each}
        said = {"message": part} if each == tokens else {"delta": part}
        usage = {"prompt_tokens": 100, "completion_tokens": first + each, "total_tokens": 100 + first + each}
        finish = "stop" if first + each >= tokens else None
        choice = {"index": 0, **said, "logprobs": {"content": [place] * each}, "finish_reason": finish}
        data = {"id": "x", "object": "chat.completion.chunk", "choices": [choice], "usage": usage}
        made.append((data, b"data: %b\n\n" % json.dumps(data, separators=(",", ":")).encode()))
    return made


def listened(parts: list[tuple[dict[str, Any], bytes]]) -> Answer:
    answer = Answer()
    for number, (data, raw) in enumerate(parts):
        answer.add(data, float(number), raw)
    return answer


async def measure(answers: int, repeats: int) -> dict[str, dict[str, float]]:
    config = Config.model_validate(
        {
            "models": {"assistant": {"path": Path("model"), "serve": ("bf16", "int8")}},
            "variants_dir": Path("variants"),
            "roles": {"core": {}},
            "default_role": "core",
        }
    )
    metrics = Metrics(CollectorRegistry(), config.roles)
    checks = CheckProcess("checks", metrics)
    observer = Observer(config, metrics, checks, checks)
    running = asyncio.create_task(checks.run())
    checks.want()
    await checks.ready()
    body = json.dumps({"messages": [{"role": "user", "content": "word " * 200}]}).encode()
    found: dict[str, dict[str, float]] = {}
    for name, tokens, each in SHAPES:
        parts = events(tokens, each)
        adding, handing = [], []
        for _ in range(repeats):
            began = time.thread_time()
            made = [listened(parts) for _ in range(answers)]
            adding.append(time.thread_time() - began)
            began = time.thread_time()
            for number, answer in enumerate(made):
                seen = Observed("core", "assistant:int8", "r", "/", body, answer, sample_id=str(number))
                observer.offer(seen)
                if number % 16 == 15:
                    await checks.step(Look(), NOTHING)
            handing.append(time.thread_time() - began)
        found[name] = {
            "adding_us": 1e6 * statistics.median(adding) / answers,
            "handing_over_us": 1e6 * statistics.median(handing) / answers,
        }
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--answers", type=int, default=160)
    options.add_argument("--repeats", type=int, default=7)
    given = options.parse_args()
    found = uvloop.run(measure(given.answers, given.repeats))
    print("| answer | added event by event, µs | handed over and counted, µs |\n|---|---|---|")
    for name, one in found.items():
        print(f"| {name} | {one['adding_us']:.0f} | {one['handing_over_us']:.0f} |")


if __name__ == "__main__":
    main()
