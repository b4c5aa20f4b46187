"""LiteLLM's client for ADK with a stopwatch: what a call took, and which variant answered it.

LiteLlm hands its caller the text alone. This client sits at the seam that ADK leaves for one
(``LiteLlm(llm_client=…)``) and reports every call once, when it has ended::

    LiteLlm(model="openai/assistant", api_base=url, llm_client=GatewayClient(on_call))

It changes neither the request nor the answer, and an ``on_call`` that raises breaks neither: that is said in
the log. Calls are told apart by the headers that :class:`tiercel_agents.adk.GatewayPlugin` adds. Not covered:
the synchronous ``completion``, which ADK does not use, and a stream that its reader abandons, which is not
reported.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import openai
from google.adk.models.lite_llm import LiteLLMClient

from tiercel_agents.headers import (
    AGENT_HEADER,
    INVOCATION_HEADER,
    REASON_HEADER,
    REPLICA_HEADER,
    REQUEST_HEADER,
    SESSION_HEADER,
    VARIANT_HEADER,
)

logger = logging.getLogger("tiercel.agents")

_PROVIDER_PREFIX = "llm_provider-"
"""What LiteLLM puts before the name of a header that it passes on."""


@dataclass(frozen=True)
class GatewayCall:
    """One ended model call. Seconds are measured here, at the client, from just before the request."""

    agent: str
    session_id: str
    invocation_id: str
    latency_s: float
    ttft_s: float | None
    """Time to the first text; None when the answer was not streamed or had no text."""
    completion_tokens: int | None
    """As the engine counted them; None when it did not say."""
    variant: str | None
    """Answer header ``x-tiercel-variant``: ``model:variant``."""
    route_reason: str | None
    """Answer header ``x-tiercel-route-reason``."""
    replica: str | None
    request_id: str | None
    error: str | None = None
    """What went wrong, with the HTTP status when there was one; None for an answer."""


class GatewayClient(LiteLLMClient):  # type: ignore[misc]  # ADK is untyped here
    """Calls LiteLLM and reports each ended call to ``on_call``."""

    def __init__(
        self, on_call: Callable[[GatewayCall], None], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._on_call = on_call
        self._clock = clock

    async def acompletion(self, model: Any, messages: Any, tools: Any, **kwargs: Any) -> Any:
        """Same arguments, answer and errors as LiteLLM's own."""
        watch = _Stopwatch(self._clock, kwargs.get("extra_headers") or {})
        try:
            answer = await super().acompletion(model, messages, tools, **kwargs)
        except (Exception, asyncio.CancelledError) as error:
            self._report(watch.failed(error))
            raise
        watch.headers = answer_headers(answer)
        if kwargs.get("stream"):
            return self._timed(answer, watch)
        watch.see_usage(answer)
        self._report(watch.ended())
        return answer

    async def _timed(self, chunks: AsyncIterator[Any], watch: _Stopwatch) -> AsyncIterator[Any]:
        try:
            async for chunk in chunks:
                watch.see_chunk(chunk)
                yield chunk
        except (Exception, asyncio.CancelledError) as error:
            self._report(watch.failed(error))
            raise
        self._report(watch.ended())

    def _report(self, call: GatewayCall) -> None:
        try:
            self._on_call(call)
        except Exception:
            logger.exception("on_call failed; the model's call goes on")


@dataclass
class _Stopwatch:
    """What is known so far about a call under way."""

    clock: Callable[[], float]
    sent: Mapping[str, str]
    headers: Mapping[str, str] = field(default_factory=dict)
    ttft_s: float | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        self.start = self.clock()

    def see_chunk(self, chunk: Any) -> None:
        if self.ttft_s is None and any(
            getattr(getattr(choice, "delta", None), "content", None)
            for choice in getattr(chunk, "choices", None) or ()
        ):
            self.ttft_s = self.clock() - self.start
        self.see_usage(chunk)

    def see_usage(self, answer: Any) -> None:
        usage = getattr(answer, "usage", None)
        if usage is not None:
            self.tokens = getattr(usage, "completion_tokens", None)

    def failed(self, error: BaseException) -> GatewayCall:
        self.headers = self.headers or answer_headers(error)
        return self.ended(describe(error))

    def ended(self, error: str | None = None) -> GatewayCall:
        return GatewayCall(
            agent=self.sent.get(AGENT_HEADER, ""),
            session_id=self.sent.get(SESSION_HEADER, ""),
            invocation_id=self.sent.get(INVOCATION_HEADER, ""),
            latency_s=self.clock() - self.start,
            ttft_s=self.ttft_s,
            completion_tokens=self.tokens,
            variant=self.headers.get(VARIANT_HEADER),
            route_reason=self.headers.get(REASON_HEADER),
            replica=self.headers.get(REPLICA_HEADER),
            request_id=self.headers.get(REQUEST_HEADER),
            error=error,
        )


def answer_headers(answer: Any) -> dict[str, str]:
    """The HTTP headers behind a LiteLLM answer, stream or error, by lower-case name.

    LiteLLM 1.108 keeps them in ``_response_headers`` of a stream or an answer, in
    ``_hidden_params`` with a prefix, or in ``litellm_response_headers`` or ``response`` of an error.
    """
    hidden = getattr(answer, "_hidden_params", None) or {}
    places = (
        getattr(getattr(answer, "response", None), "headers", None),
        getattr(answer, "litellm_response_headers", None),
        hidden.get("additional_headers"),
        getattr(answer, "_response_headers", None),
    )
    found: dict[str, str] = {}
    for place in places:
        for name, value in dict(place or {}).items():
            found[str(name).lower().removeprefix(_PROVIDER_PREFIX)] = str(value)
    return found


def describe(error: BaseException) -> str:
    """What went wrong, in one line, with the HTTP status when there was an answer.

    LiteLLM wraps an error several times and gives a connection that failed the status 500, so the
    cause is looked up at its origin, the OpenAI client.
    """
    origin: BaseException = error
    while not isinstance(origin, openai.OpenAIError) or _is_wrapper(origin):
        deeper = origin.__cause__ or origin.__context__
        if deeper is None:
            origin = error
            break
        origin = deeper
    text = " ".join(str(getattr(origin, "message", "") or origin).split()) or type(origin).__name__
    if isinstance(origin, openai.APIStatusError):
        body = origin.body if isinstance(origin.body, dict) else {}
        return f"HTTP {origin.status_code}: {body.get('message') or text}"
    if isinstance(origin, openai.APIConnectionError):
        return f"no answer from {origin.request.url}: {text}"
    return text


def _is_wrapper(error: BaseException) -> bool:
    """LiteLLM's exceptions are subclasses of the OpenAI client's."""
    return type(error).__module__.startswith("litellm")


def keep_quiet() -> None:
    """Import LiteLLM without a price list from the network, a ``.env``, or hints on the terminal.

    Call it before anything else imports LiteLLM. ADK's log goes to handlers that the application has
    set up, and not to standard error otherwise: the reports hold every failure.
    """
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    os.environ.setdefault("LITELLM_MODE", "PRODUCTION")
    import litellm  # takes seconds, and reads the two variables above when it is imported

    litellm.suppress_debug_info = True
    adk = logging.getLogger("google_adk")
    if not adk.handlers:
        adk.addHandler(logging.NullHandler())
