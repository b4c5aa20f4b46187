"""Prompts that an engine took in and never counted for us: it is asked for their count afterwards.

An answer that breaks off before its first chunk, or that was to come whole, has no usage. Its prompt was
read all the same. vLLM counts a prompt at ``/tokenize`` (Anthropic's at ``/v1/messages/count_tokens``)
without generating anything, so the books can have it: later, a few at a time, and as far as it goes. An
engine that cannot be reached, or has no time, is asked again; one that has just died may be up again.

What the engine wrote of such an answer cannot be known. It is never guessed: the request is counted in
``tiercel_usage_unreported_total``, as is every one that was cut off before the engine's last word on it.
Each of these has one outcome in ``tiercel_usage_settled_total``, under the same role and variant:

===========  ==================================================================================
``known``    the engine had counted the prompt before the answer broke off
``booked``   it did so when it was asked afterwards
``unknown``  nobody can be asked: a provider's prompt, or one that no endpoint counts
``failed``   the engine gave no count, however often it was asked, or one that is none
``dropped``  there were too many, or the process ended first
===========  ==================================================================================

The prompts of the last three are not in the books. What has no outcome yet still waits, or was lost with a
process that was killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

import aiohttp
import msgspec

from gateway.proxy.record import Usage
from gateway.telemetry.logs import EVENTS
from gateway.telemetry.metrics import Metrics
from gateway.upstream.usage import is_count
from gateway.upstream.whole import read_whole

MOST_WAITING = 4096
MOST_BYTES = 32 << 20
LARGEST_BYTES = 2 << 20
"""Of one body: a longer one is not decoded for this."""
LONGEST_ANSWER_BYTES = 8 * LARGEST_BYTES
"""Of an engine: vLLM lists the ids of all tokens beside their number."""
AT_ONCE = 8
"""Prompts that are asked for side by side: an engine under load takes seconds over each."""
ANSWER_WITHIN_S = 10.0
AGAIN_AFTER_S = (1.0, 10.0, 30.0)
"""Before an engine that gave no count is asked the second time, the third, ..."""

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
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_WITH_PROMPTS = {
    "/v1/completions": "prompt",
    "/v1/embeddings": "input",
    "/pooling": "input",
    "/classify": "input",
}


class Unreported(msgspec.Struct, frozen=True, gc=False):
    """An attempt that an engine began and did not count to its end."""

    role: str
    labels: tuple[str, str]
    """Of the replica: its model and variant."""
    key: str | None
    """The API key's name."""
    url: str
    """The engine's, without a path of its own, and without a password."""
    path: str
    """Of the endpoint, as the engine was asked."""
    body: tuple[bytes | memoryview, ...] | None
    """JSON, as the engine got it, in parts; None of a provider's, which cannot be asked."""
    usage: Usage
    """As far as it was heard of."""
    headers: Mapping[str, str] = {}
    """Without which the engine lets nobody in."""

    def __repr__(self) -> str:
        """Without what is secret: prompts and keys."""
        return f"Unreported({':'.join(self.labels)}, {self.path})"


def owes_usage(path: str) -> bool:
    """Whether answers at this endpoint have a usage at all."""
    return path.rpartition("/")[2] not in _COUNTING


class _Waiting(msgspec.Struct, eq=False, gc=False):
    attempt: Unreported
    body: bytes
    asked: int = 0
    """How often in vain."""


class Settlement:
    """Counts what has no usage, and books the prompts of it. ``run`` is to be supervised."""

    def __init__(
        self, metrics: Metrics, book: Callable[[str | None, str, tuple[str, str], Usage], None]
    ) -> None:
        """``book`` enters tokens under a key, a role, and a model with its variant."""
        self._metrics = metrics
        self._book = book
        self._waiting: deque[_Waiting] = deque()
        self._later: dict[_Waiting, asyncio.TimerHandle] = {}
        """To be asked for again."""
        self._owed = self._bytes = 0
        """Of all that wait, will again, or are being asked for; and the bytes of their bodies."""
        self._more = asyncio.Event()
        self._none = asyncio.Event()
        self._none.set()
        self._ending = False

    def report(self, attempt: Unreported) -> None:
        """Never waits and never raises."""
        self._metrics.usage_unreported.labels(attempt.role, *attempt.labels).inc()
        if attempt.usage.prompt is not None:
            self._count(attempt, "known")  # what is booked is all that will be known
            return
        if attempt.body is None:
            self._count(attempt, "unknown")
            return
        size = sum(map(len, attempt.body))
        too_many = self._owed >= MOST_WAITING or self._bytes + size > MOST_BYTES
        if size > LARGEST_BYTES or too_many:
            self._count(attempt, "dropped")
            return
        self._owed += 1
        self._bytes += size
        self._none.clear()
        self._wait(_Waiting(attempt, b"".join(attempt.body)))

    @property
    def idle(self) -> bool:
        """Whether every prompt has its outcome."""
        return not self._owed

    async def run(self, session: aiohttp.ClientSession) -> None:
        """Ask for prompts until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(self._work_off(session))

    async def drain(self, within_s: float) -> None:
        """Before ``run`` is cancelled for good: what is still owed has so many seconds, and is then dropped.
        What was to be asked for again is asked for now, and then no more."""
        self._ending = True
        for waiting in tuple(self._later):
            self._wait(waiting)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._none.wait()
        self._drop()

    def _drop(self) -> None:
        for waiting in (*self._waiting, *self._later):
            self._settled(waiting, "dropped")
        for timer in self._later.values():
            timer.cancel()
        self._waiting.clear()
        self._later.clear()

    def _wait(self, waiting: _Waiting) -> None:
        if (timer := self._later.pop(waiting, None)) is not None:
            timer.cancel()
        self._waiting.append(waiting)
        self._more.set()

    async def _work_off(self, session: aiohttp.ClientSession) -> None:
        while True:
            while self._waiting:
                waiting = self._waiting.popleft()
                try:
                    await self._settle(session, waiting)
                except asyncio.CancelledError:
                    self._waiting.appendleft(waiting)
                    if self._ending:
                        self._drop()
                    raise
            self._more.clear()
            await self._more.wait()

    async def _settle(self, session: aiohttp.ClientSession, waiting: _Waiting) -> None:
        attempt = waiting.attempt
        try:
            questions = await asyncio.to_thread(questions_for, attempt.path, waiting.body)
            prompt = None
            if questions is not None:
                async with asyncio.timeout(ANSWER_WITHIN_S):
                    prompt = _together([await _ask(session, attempt, question) for question in questions])
        except (aiohttp.ClientError, OSError) as error:  # a TimeoutError is one as well
            self._failed(waiting, error, for_good=_is_for_good(error))
        except Exception as error:
            self._failed(waiting, error, for_good=True)
        else:
            if prompt is not None:
                self._book(attempt.key, attempt.role, attempt.labels, Usage(prompt))
            self._settled(waiting, "unknown" if prompt is None else "booked")

    def _failed(self, waiting: _Waiting, error: Exception, *, for_good: bool) -> None:
        if not (for_good or self._ending) and waiting.asked < len(AGAIN_AFTER_S):
            after_s = AGAIN_AFTER_S[waiting.asked]
            waiting.asked += 1
            self._later[waiting] = asyncio.get_running_loop().call_later(after_s, self._wait, waiting)
            return
        fields = {"variant": ":".join(waiting.attempt.labels), "cause": type(error).__name__}
        logging.getLogger(EVENTS).info("a prompt could not be counted", extra={"fields": fields})
        self._settled(waiting, "failed")

    def _settled(self, waiting: _Waiting, outcome: str) -> None:
        self._owed -= 1
        self._bytes -= len(waiting.body)
        if not self._owed:
            self._none.set()
        self._count(waiting.attempt, outcome)

    def _count(self, attempt: Unreported, outcome: str) -> None:
        self._metrics.usage_settled.labels(attempt.role, *attempt.labels, outcome).inc()


def _is_for_good(error: Exception) -> bool:
    """Whether an engine that said this would say it again: it refuses the question."""
    status = error.status if isinstance(error, aiohttp.ClientResponseError) else 0
    return 400 <= status < 500 and status not in (408, 429)


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


async def _ask(session: aiohttp.ClientSession, attempt: Unreported, question: Question) -> int:
    if isinstance(question, int):
        return question
    path, body, field = question
    sent = session.post(attempt.url + path, json=body, headers=attempt.headers, allow_redirects=False)
    async with sent as response:
        response.raise_for_status()
        if response.status != HTTPStatus.OK:  # it sends us elsewhere, with the prompt and its key
            raise ValueError(f"status {response.status}")
        answer = _FIELDS.decode(await read_whole(response, LONGEST_ANSWER_BYTES))
        return _together([msgspec.json.decode(answer[field])])


def _together(counts: list[Any]) -> int:
    """Raises ValueError for what is no count, which would spoil a counter for good."""
    if all(map(is_count, counts)) and is_count(total := sum(counts)):
        return total
    raise ValueError("no count of tokens")
