"""Requests of every kind and every fate, the engines that make them come true, and what a gateway's books
must say in the end.

What a request does, and what the books must have of it, follows from the seed and its number (``Plan``). It
is settled between client and engine alone: a client that leaves does so when it has seen all that the engine
wrote, and the engine then writes no more. The engines run in a thread of their own on asyncio's own loop,
which hands a request to its handler before it reads that the connection was closed; an engine on uvloop
would not hear of a request that is cancelled right after it was sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from gateway.upstream.fake import FakeEngine, Script, Work
from gateway.upstream.fake.account import REFUSED, REPORTED

CHAT, TEXT, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
RESPONSES, EMBEDDINGS = "/v1/responses", "/v1/embeddings"
WORDS = "the total of your order is two hundred and seventy seven dollars".split()
ROLES = ("intent_classifier", "summarizer", "core")
KEYS = {f"team-{number}": f"sk-books-{number}" for number in range(3)}
COUNTED = {
    "tiercel_tokens_total": ("role", "variant", "kind"),
    "tiercel_key_tokens_total": ("key", "role", "variant", "kind"),
    "tiercel_cached_tokens_total": ("role", "variant"),
    "tiercel_usage_unreported_total": ("role", "variant"),
}
"""Counters of the books, and their labels in order; a variant is known as ``model:variant``."""
SETTLED = "tiercel_usage_settled_total"
Books = dict[tuple[str, ...], int]
"""A counter's name and labels, and its value."""
SLOW_S = 1.0
FATES = {
    "whole": 60,
    "leaves before": 5,
    "leaves within": 8,
    "dies before": 2,
    "dies within": 3,
    "error before": 2,
    "error within": 3,
    "refused": 3,
    "garbage": 1,
    "slow": 5,
    "uncounted": 2,
}
"""What becomes of requests, by weight."""


def configuration() -> dict[str, Any]:
    """The parts of the gateway's settings that matter here."""
    keys = [
        {"name": name, "sha256": hashlib.sha256(secret.encode()).hexdigest(), "tenant": name}
        for name, secret in KEYS.items()
    ]
    roles = {"intent_classifier": {"escalate": True}, "summarizer": {}, "core": {"hedge": True}}
    return {"keys": keys, "roles": roles, "default_role": "core"}


@dataclass(frozen=True)
class Plan:
    """One request: what is asked, what becomes of it."""

    number: int
    request_id: str
    key: str
    role: str
    path: str
    fate: str
    stream: bool
    body: dict[str, Any]
    script: Script
    tokens: int
    """Of the whole answer."""
    after: int
    """Tokens of a stream, after which something happens to it."""

    @classmethod
    def make(cls, seed: int, number: int) -> Plan:
        rng = random.Random(f"{seed}-{number}")
        path = rng.choices((CHAT, TEXT, MESSAGES, RESPONSES, EMBEDDINGS), (60, 15, 10, 10, 5))[0]
        (fate,) = rng.choices(tuple(FATES), tuple(FATES.values()))
        stream = path != EMBEDDINGS and (rng.random() < 0.6 or fate == "error within" or "within" in fate)
        body, answers = _body(rng, path, stream)
        text = rng.choices(WORDS, k=rng.randint(2, 6))
        script = Script(
            text=" ".join(text),
            spaces=rng.random() < 0.3,
            cached_tokens=rng.choice((None, 0, 3, 10_000)),
            fingerprint=rng.choice((None, "fp")),
            usage_shape=rng.choices(("chunk", "empty choice", "last"), (6, 1, 1))[0],
        )
        tokens = 0 if path == EMBEDDINGS else len(text) * answers
        if fate == "uncounted" and path not in (CHAT, TEXT):
            fate = "whole"
        if path == EMBEDDINGS and fate not in ("whole", "leaves before", "dies before", "refused", "slow"):
            fate = "whole"
        if fate == "garbage" and stream and rng.random() < 0.5:
            script.keep_alive_s = 0.002
        # Not within what ends an answer: its last chunks are held back until the usage has come.
        after = rng.randint(1, tokens - answers) if answers else 0
        _ordain(script, fate, after)
        return cls(
            number,
            f"books-{seed}-{number}",
            rng.choice(tuple(KEYS)),
            rng.choice(_roles_for(fate)),
            path,
            fate,
            stream,
            {**body, "seed": number},
            script,
            tokens,
            after,
        )

    @property
    def headers(self) -> dict[str, str]:
        return {
            "authorization": f"Bearer {KEYS[self.key]}",
            "x-request-id": self.request_id,
            "x-agent-role": self.role,
        }

    def heard(self) -> int:
        """Tokens that the engine has counted for us when the answer breaks off where it is planned to: only
        streams of completions have a usage in their chunks."""
        continuous = self.path in (CHAT, TEXT) and self.script.usage_shape in ("chunk", "empty choice")
        return self.after if self.stream and continuous and self.fate.endswith("within") else 0

    def prompt_unknown(self) -> bool:
        """Nobody counts the prompt of a response for us."""
        return self.path == RESPONSES


def _roles_for(fate: str) -> tuple[str, ...]:
    """Only the slow are to be hedged against: where both engines stall, neither has the answer."""
    return ROLES[2:] if fate == "slow" else ROLES[:2] if fate.startswith("leaves") else ROLES


def _body(rng: random.Random, path: str, stream: bool) -> tuple[dict[str, Any], int]:
    """A request, and how many answers it gets."""
    said = " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))
    messages = [{"role": "user", "content": said}]
    body: dict[str, Any] = {"model": "assistant"}
    if stream:
        body["stream"] = True
    if path == EMBEDDINGS:
        return {**body, "input": [said, "b c"][: rng.randint(1, 2)]}, 0
    if path == RESPONSES:
        return {**body, "input": said}, 1
    if path == MESSAGES:
        return {**body, "messages": messages, "max_tokens": 100}, 1
    n = rng.choice((1, 1, 1, 2, 3))
    if n > 1:
        body["n"] = n
    if stream and (wanted := rng.random()) < 0.5:
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": wanted < 0.2}
    if path == CHAT:
        if rng.random() < 0.2 and not stream:
            body["response_format"] = {"type": "json_object"}
        return {**body, "messages": messages}, n
    prompts = rng.randint(1, 2)
    return {**body, "prompt": said if prompts == 1 else [said, "and another"]}, n * prompts


def _ordain(script: Script, fate: str, after: int) -> None:
    where = after if fate.endswith("within") else 0
    if fate.startswith("leaves"):
        script.stall_after = where
    elif fate.startswith("dies"):
        script.die_after = where
        # At once, it would be a kept connection that was closed: tried again, since no work was done.
        script.first_token_delay_s = 0.0 if where else 0.2
    elif fate.startswith("error"):
        script.error_after = where
    elif fate == "refused":
        script.status = 429
    elif fate == "garbage":
        script.garbage = True
    elif fate == "slow":
        script.first_token_delay_s = SLOW_S
    elif fate == "uncounted":
        script.usage_shape = "none"


@dataclass
class Outcome:
    """What a client saw."""

    status: int = 0
    whole: bool = False
    replica: str = ""
    """As the gateway names it."""


class Trial:
    """All requests of a run, the engines' scripts for them, and what must be in the books."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.outcomes: dict[int, Outcome] = {}
        """By a request's number."""
        self._plans: dict[int, Plan] = {}
        """Of requests under way."""
        self._begun: Counter[int] = Counter()

    def plan(self, number: int) -> Plan:
        return self._plans.get(number) or Plan.make(self.seed, number)

    def number(self, work: Work) -> int | None:
        """Of the request that an engine worked at; None if it is not one of these."""
        prefix, _, number = work.request_id.rpartition("-")
        return int(number) if prefix == f"books-{self.seed}" else None

    @contextmanager
    def engines(self, count: int) -> Iterator[tuple[list[FakeEngine], list[str]]]:
        """Fake engines that follow the plans while the block lasts, and their URLs."""
        engines = [FakeEngine() for _ in range(count)]
        for engine in engines:
            engine.keep_requests = False
            engine.scripts = self._script
        urls: list[str] = []
        loop, serving, stop = asyncio.SelectorEventLoop(), threading.Event(), asyncio.Event()

        async def serve() -> None:
            async with AsyncExitStack() as exits:
                urls.extend([await exits.enter_async_context(engine.serving()) for engine in engines])
                serving.set()
                await stop.wait()

        thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), name="engines")
        thread.start()
        try:
            if not serving.wait(30):
                raise TimeoutError("the fake engines did not start")
            yield engines, urls
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join()
            loop.close()

    def _script(self, body: dict[str, Any]) -> Script:
        """A slow request is slow at the first engine alone, so that a hedge wins."""
        number = body.get("seed")
        if number is None or "prompt_logprobs" in body:
            return Script()
        plan = self.plan(number)
        self._begun[number] += 1
        if plan.fate == "slow" and self._begun[number] > 1:
            return replace(plan.script, first_token_delay_s=0.0)
        return plan.script

    async def run(
        self, url: str, http: aiohttp.ClientSession, numbers: Iterable[int], clients: int, until: float
    ) -> int:
        """Ask for each of ``numbers`` until the clock shows ``until``; gives how many were asked for."""
        waiting = iter(numbers)
        asked = 0

        async def client() -> None:
            nonlocal asked
            for number in waiting:
                if time.monotonic() > until:
                    return
                plan = self._plans[number] = Plan.make(self.seed, number)
                outcome = self.outcomes[number] = Outcome()
                asked += 1
                await self._ask(http, url, plan, outcome)
                del self._plans[number]

        await asyncio.gather(*(client() for _ in range(clients)))
        return asked

    async def _ask(self, http: aiohttp.ClientSession, url: str, plan: Plan, outcome: Outcome) -> None:
        """Send a request, and leave where the plan says so."""
        reading = asyncio.create_task(_read(http, url, plan, outcome))
        if plan.fate == "leaves before":
            while not self._begun[plan.number] and not reading.done():  # noqa: ASYNC110 -- of another thread
                await asyncio.sleep(0.002)
            await asyncio.sleep(plan.number % 20 / 1000)
            reading.cancel()
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, asyncio.CancelledError):
            async with asyncio.timeout(60):
                await reading

    def expected(self, engines: Mapping[str, FakeEngine]) -> Books:
        """What the counters must have, by name and labels. ``engines``: by the replica's name."""
        books: Books = defaultdict(int)
        for replica, engine in engines.items():
            variant = replica.rpartition("-")[0]
            for work in engine.account:
                number = self.number(work)
                if number is not None and work.state != REFUSED:
                    self._enter(books, self.plan(number), work, replica, variant)
        return {labels: count for labels, count in books.items() if count}

    def _enter(self, books: Books, plan: Plan, work: Work, replica: str, variant: str) -> None:
        outcome = self.outcomes[plan.number]
        escalated = outcome.whole and outcome.replica.rpartition("-")[0] != variant
        exact = work.state == REPORTED and outcome.whole and (outcome.replica == replica or escalated)
        prompt, completion = work.prompt_tokens, work.completion_tokens
        if not exact:
            books["tiercel_usage_unreported_total", plan.role, variant] += 1
            completion = plan.heard() if outcome.replica == replica else 0
            prompt = 0 if plan.prompt_unknown() else prompt
        else:
            books["tiercel_cached_tokens_total", plan.role, variant] += work.cached_tokens
        for kind, tokens in (("prompt", prompt), ("completion", completion)):
            books["tiercel_tokens_total", plan.role, variant, kind] += tokens
            books["tiercel_key_tokens_total", plan.key, plan.role, variant, kind] += tokens


async def _read(http: aiohttp.ClientSession, url: str, plan: Plan, outcome: Outcome) -> None:
    async with http.post(url + plan.path, json=plan.body, headers=plan.headers) as response:
        outcome.status = response.status
        outcome.replica = sys.intern(response.headers.get("x-tiercel-replica", ""))
        if not plan.stream or response.status != 200:
            await response.read()
            outcome.whole = response.status == 200
            return
        seen = 0
        async for line in response.content:
            seen += _is_token(line)
            if plan.fate == "leaves within" and seen == plan.after:
                response.close()
                return
            if line.startswith(b"data:"):
                outcome.whole = _is_end(line)
                if b'"error"' in line[:40]:
                    return


def _is_token(line: bytes) -> bool:
    if not line.startswith(b"data: {"):
        return False
    data = json.loads(line[6:])
    if data.get("type") in ("content_block_delta", "response.output_text.delta"):
        return True
    return any("text" in choice or choice.get("delta") for choice in data.get("choices") or ())


def _is_end(line: bytes) -> bool:
    return line.startswith(b"data: [DONE]") or b'"message_stop"' in line or b'"response.completed"' in line


def read_books(text: str) -> Books:
    """What a gateway's metrics (Prometheus text) say."""
    return _read_counters(text, COUNTED)


def read_outcomes(text: str) -> Books:
    """What they say became of prompts that were not reported, by role, variant and outcome."""
    return _read_counters(text, {SETTLED: ("role", "variant", "outcome")})


def _read_counters(text: str, wanted: Mapping[str, tuple[str, ...]]) -> Books:
    found: Books = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in wanted and sample.value:
                known = sample.labels | {"variant": f"{sample.labels['model']}:{sample.labels['variant']}"}
                labels = tuple(known[label] for label in wanted[sample.name])
                found[sample.name, *labels] = round(sample.value)
    return found


def without_outcome(found: Books, outcomes: Books) -> dict[tuple[str, ...], tuple[int, int]]:
    """Where prompts with an outcome are not as many as those that were not reported; both numbers."""
    settled: Books = defaultdict(int)
    for (_, role, variant, _), count in outcomes.items():
        settled["tiercel_usage_unreported_total", role, variant] += count
    unreported = {label: n for label, n in found.items() if label[0] == "tiercel_usage_unreported_total"}
    return {(SETTLED, *label[1:]): values for label, values in differences(dict(settled), unreported).items()}


def differences(found: Books, expected: Books) -> dict[tuple[str, ...], tuple[int, int]]:
    """What the books have, and what they should have, where that is not the same."""
    labels = sorted(found.keys() | expected.keys())
    return {
        label: (found.get(label, 0), expected.get(label, 0))
        for label in labels
        if found.get(label, 0) != expected.get(label, 0)
    }
