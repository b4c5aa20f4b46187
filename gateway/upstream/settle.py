"""Prompts that an engine took in and never counted for us: it is asked for their count afterwards.

An answer that breaks off before its first chunk, or that was to come whole, has no usage. Its prompt was
read all the same. vLLM counts a prompt at ``/tokenize`` (Anthropic's at ``/v1/messages/count_tokens``)
without generating anything, so the books can have it: later, one at a time, and as far as it goes.

What the engine wrote of such an answer cannot be known. It is never guessed: the request is counted in
``tiercel_usage_unreported_total``, as is every one that was cut off before the engine's last word on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import aiohttp
import msgspec

from gateway.proxy.record import Usage
from gateway.telemetry.logs import EVENTS
from gateway.telemetry.metrics import Metrics
from gateway.upstream.sse import UNREADABLE

MOST_WAITING = 4096
MOST_BYTES = 32 << 20
LARGEST_BYTES = 2 << 20
"""Of one body: a longer one is not decoded for this."""
ANSWER_WITHIN_S = 10.0
DRAIN_S = 2.0
"""For what still waits when the gateway stops."""

_COUNTING = frozenset({"tokenize", "detokenize", "count_tokens"})
"""Endpoints that have no usage."""
_OF_CHAT = (
    "model",
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
    "chat_template",
    "media_io_kwargs",
    "mm_processor_kwargs",
)
_OF_ANTHROPIC = (
    "model",
    "messages",
    "system",
    "tools",
    "tool_choice",
    "thinking",
    "output_config",
    "chat_template_kwargs",
)
_WITH_PROMPTS = {
    "/v1/completions": "prompt",
    "/v1/embeddings": "input",
    "/pooling": "input",
    "/classify": "input",
}


class Unreported(msgspec.Struct, frozen=True, gc=False):
    """An attempt that an engine began and did not count to its end."""

    role: str
    variant: str
    key: str | None
    """The API key's name."""
    url: str
    """The engine's, without a path."""
    path: str
    """Of the endpoint, as the engine was asked."""
    body: bytes | None
    """JSON, as the engine got it; None of a provider's, which cannot be asked."""
    usage: Usage
    """As far as it was heard of."""


def owes_usage(path: str) -> bool:
    """Whether answers at this endpoint have a usage at all."""
    return path.rpartition("/")[2] not in _COUNTING


class Settlement:
    """Counts what has no usage, and books the prompts of it. ``run`` is to be supervised."""

    def __init__(self, metrics: Metrics, book: Callable[[str | None, str, str, Usage], None]) -> None:
        """``book`` enters tokens under a key, a role and a variant."""
        self._metrics = metrics
        self._book = book
        self._waiting: deque[Unreported] = deque()
        self._bytes = 0
        self._more = asyncio.Event()

    def report(self, attempt: Unreported) -> None:
        """Never waits and never raises."""
        self._metrics.usage_unreported.labels(attempt.role, attempt.variant).inc()
        if attempt.usage.prompt is not None:
            return  # what is booked is all that will be known
        if attempt.body is None:
            self._count("unknown")
            return
        size = len(attempt.body)
        too_many = len(self._waiting) >= MOST_WAITING or self._bytes + size > MOST_BYTES
        if size > LARGEST_BYTES or too_many:
            self._count("dropped")
            return
        self._waiting.append(attempt)
        self._bytes += size
        self._more.set()

    @property
    def idle(self) -> bool:
        """Whether nothing waits."""
        return not self._waiting

    async def run(self, session: aiohttp.ClientSession) -> None:
        """Ask for one prompt after the other, until it is cancelled; what waits then has a little time."""
        try:
            while True:
                await self._work_off(session)
                self._more.clear()
                await self._more.wait()
        except asyncio.CancelledError:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_S):
                    await self._work_off(session)
            while self._waiting:
                self._waiting.popleft()
                self._count("dropped")
            raise

    async def _work_off(self, session: aiohttp.ClientSession) -> None:
        while self._waiting:
            attempt = self._waiting[0]  # it waits until it is settled
            body = attempt.body or b""
            await self._settle(session, attempt, body)
            self._waiting.popleft()
            self._bytes -= len(body)

    async def _settle(self, session: aiohttp.ClientSession, attempt: Unreported, body: bytes) -> None:
        try:
            questions = await asyncio.to_thread(questions_for, attempt.path, body)
            prompt = None
            if questions is not None:
                async with asyncio.timeout(ANSWER_WITHIN_S):
                    prompt = sum([await _ask(session, attempt.url, question) for question in questions])
        except (aiohttp.ClientError, OSError, TimeoutError, *UNREADABLE, KeyError, TypeError) as error:
            fields = {"variant": attempt.variant, "cause": type(error).__name__}
            logging.getLogger(EVENTS).info("a prompt could not be counted", extra={"fields": fields})
            self._count("failed")
            return
        if prompt is None:
            self._count("unknown")
            return
        self._book(attempt.key, attempt.role, attempt.variant, Usage(prompt))
        self._count("booked")

    def _count(self, outcome: str) -> None:
        self._metrics.usage_settled.labels(outcome).inc()


Question = int | tuple[str, dict[str, Any], str]
"""A count that needs no asking; or a path, a body, and the field of the answer that has it."""


def questions_for(path: str, body: bytes) -> list[Question] | None:
    """What to ask an engine so that the answers add up to the prompt of a request. None: there is no way.
    Raises what decoders raise."""
    fields = msgspec.json.decode(body)
    if not isinstance(fields, dict):
        return None
    if path == "/v1/messages":
        asked = {name: fields[name] for name in _OF_ANTHROPIC if name in fields}
        return [("/v1/messages/count_tokens", asked, "input_tokens")]
    if path == "/v1/chat/completions":
        return [("/tokenize", _chat(fields), "count")]
    given = fields.get(_WITH_PROMPTS.get(path, ""))
    if given is None or fields.get("truncate_prompt_tokens") is not None:
        return None
    more = {name: fields[name] for name in ("model", "add_special_tokens") if name in fields}
    prompts = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    questions: list[Question] = []
    for prompt in prompts:
        if isinstance(prompt, str):
            questions.append(("/tokenize", {**more, "prompt": prompt}, "count"))
        elif isinstance(prompt, list):
            questions.append(len(prompt))
        else:
            return None
    return questions


def _chat(fields: dict[str, Any]) -> dict[str, Any]:
    """vLLM gives these fields of a chat to the template, and takes them at ``/tokenize`` only as such."""
    asked = {name: fields[name] for name in _OF_CHAT if name in fields}
    template = {name: fields[name] for name in ("documents", "reasoning_effort") if fields.get(name)}
    if "reasoning_effort" in template:
        template["enable_thinking"] = template["reasoning_effort"] != "none"
    template |= fields.get("chat_template_kwargs") or {}
    return {**asked, "chat_template_kwargs": template} if template else asked


async def _ask(session: aiohttp.ClientSession, url: str, question: Question) -> int:
    if isinstance(question, int):
        return question
    path, body, field = question
    async with session.post(url + path, json=body) as response:
        response.raise_for_status()
        return int((await response.json())[field])
