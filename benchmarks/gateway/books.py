"""Do the gateway's books say what the engines did? To the token, whatever happens to the requests.

    python -m benchmarks.gateway.books --requests 200000 --minutes 30

Clients of several keys ask for chats, completions, messages, responses and embeddings, streamed and not, one
answer or several, and leave before and within their answers. Engines die, stall, send errors and garbage,
refuse, are slow enough to be hedged against, and write their usage in different places. The gateway runs two
workers, one of which is ended and started again every few seconds. In the end:

* tokens by role, variant and kind, and by key, are those of the fake engines' accounts;
* what an engine never counted is in ``tiercel_usage_unreported_total``, each request once, and what became
  of its prompt in ``tiercel_usage_settled_total``;
* no counter has fallen.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import aiohttp
import psutil

from benchmarks.gateway.peers import ROOT, WORK, free_port, tiercel
from benchmarks.gateway.trial import (
    KEYS,
    Books,
    Trial,
    configuration,
    differences,
    read_books,
    read_outcomes,
    without_outcome,
)
from gateway.upstream.fake import FakeEngine

RESULT = ROOT / "var/benchmarks/gateway/books.json"
READY_S, QUIET_S = 120.0, 60.0
HEADERS = {"authorization": f"Bearer {next(iter(KEYS.values()))}"}


class Gateway:
    """A gateway of two workers, and its books as they grow."""

    def __init__(self, command: list[str], port: int, http: aiohttp.ClientSession) -> None:
        self._http, self._port = http, port
        self.url = f"http://127.0.0.1:{port}"
        self._log = (WORK / "books.log").open("wb")
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=self._log, stderr=self._log)
        self.books: Books = {}
        self.outcomes: Books = {}
        """Of prompts that were not reported."""
        self.fallen: list[str] = []
        """Counters that had less than before."""
        self.restarts = 0

    async def ready(self) -> None:
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                async with self._http.get(self.url + "/readiness") as response:
                    if response.status == 200 and len(self._workers()) == 2:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.2)
        raise SystemExit(f"the gateway did not become ready; its log is {self._log.name}")

    async def read(self) -> None:
        """Look at the books, and whether anything in them has fallen."""
        try:
            async with self._http.get(self.url + "/metrics", headers=HEADERS) as response:
                text = await response.text()
        except (aiohttp.ClientError, TimeoutError):
            return  # it came to the worker that was ending
        found = read_books(text)
        for label, value in self.books.items():
            if found.get(label, 0) < value:
                self.fallen.append(f"{' '.join(label)}: {value} → {found.get(label, 0)}")
        self.books, self.outcomes = found, read_outcomes(text)

    async def read_for_ever(self) -> None:
        while True:
            await self.read()
            await asyncio.sleep(0.5)

    async def restart_for_ever(self, every_s: float, rng: random.Random) -> None:
        """End one worker after the other, as an operator would; the parent starts it again."""
        while True:
            await asyncio.sleep(every_s)
            workers = self._workers()
            if len(workers) == 2 and all(map(self._listens, workers)):
                rng.choice(workers).send_signal(signal.SIGTERM)
                self.restarts += 1

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(60)
        self._log.close()

    def _listens(self, worker: psutil.Process) -> bool:
        try:
            found = worker.net_connections("tcp")
        except psutil.Error:
            return False
        return any(one.status == psutil.CONN_LISTEN and one.laddr.port == self._port for one in found)

    def _workers(self) -> list[psutil.Process]:
        return psutil.Process(self._process.pid).children()


async def balanced(gateway: Gateway, expected: Callable[[], Books]) -> dict[tuple[str, ...], tuple[int, int]]:
    """What differs in the end, when nothing has changed for long."""
    deadline = time.monotonic() + QUIET_S
    while True:
        await gateway.read()
        found = differences(gateway.books, expected())
        found |= without_outcome(gateway.books, gateway.outcomes)
        if not found or time.monotonic() > deadline:
            return found
        await asyncio.sleep(2)


async def run(options: argparse.Namespace) -> dict[str, Any]:
    WORK.mkdir(parents=True, exist_ok=True)
    trial, port = Trial(options.seed), free_port()
    with trial.engines(3) as (engines, urls):
        replicas: dict[str, FakeEngine] = dict(
            zip(("assistant:bf16-0", "assistant:bf16-1", "assistant:int8-0"), engines, strict=True)
        )
        canary = {"canary": {"variant": "int8", "percent": 100}}
        changes = configuration()
        roles = {
            "intent_classifier": {"escalate": True, **canary},
            "summarizer": canary,
            "core": {"hedge": True},
        }
        changes |= {
            "roles": roles,
            "pools": {"bf16": urls[:2], "int8": urls[2:]},
            "gateway": {"port": port, "workers": 2, "access_log": False},
            "quality": {"sample_rate": 0.3},
        }
        command, _ = tiercel(port, 0, **changes)
        began = time.monotonic()
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
            gateway = Gateway(command, port, http)
            try:
                await gateway.ready()
                rng = random.Random(options.seed)
                jobs = [
                    asyncio.create_task(gateway.read_for_ever()),
                    asyncio.create_task(gateway.restart_for_ever(options.restart_s, rng)),
                ]
                until = time.monotonic() + 60 * options.minutes
                asked = await trial.run(gateway.url, http, range(options.requests), options.clients, until)
                for job in jobs:
                    job.cancel()
                await asyncio.wait(jobs)
                await gateway.ready()
                wrong = await balanced(gateway, lambda: trial.expected(replicas))
            finally:
                gateway.stop()
    return {
        "seed": options.seed,
        "requests": asked,
        "attempts": sum(len(engine.account) for engine in engines),
        "seconds": round(time.monotonic() - began, 1),
        **_found(trial, gateway),
        "load": [round(value, 1) for value in os.getloadavg()],
        "wrong": {" ".join(label): values for label, values in wrong.items()},
        "fallen": gateway.fallen,
    }


def _found(trial: Trial, gateway: Gateway) -> dict[str, Any]:
    """What became of the requests, and of the tokens."""
    outcomes: Counter[str] = Counter()
    for label, count in gateway.outcomes.items():
        outcomes[label[-1]] += count
    statuses = Counter(outcome.status for outcome in trial.outcomes.values())  # 0: nothing came
    return {
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "restarts": gateway.restarts,
        "tokens": {
            kind: sum(
                n
                for label, n in gateway.books.items()
                if label[0] == "tiercel_tokens_total" and label[-1] == kind
            )
            for kind in ("prompt", "completion")
        },
        "unreported": sum(
            n for label, n in gateway.books.items() if label[0] == "tiercel_usage_unreported_total"
        ),
        "prompts of these": dict(sorted(outcomes.items())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--minutes", type=float, default=30.0, help="no request is begun later")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--restart-s", type=float, default=10.0, help="between the ends of workers")
    parser.add_argument("--seed", type=int, default=1)
    result = asyncio.run(run(parser.parse_args()))
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2))
    print(json.dumps(result, indent=2))
    sys.exit(bool(result["wrong"] or result["fallen"]))


if __name__ == "__main__":
    main()
