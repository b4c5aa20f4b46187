"""Every model that does not run on a pool of ours, through LiteLLM.

LiteLLM takes seconds to import, so it is imported when there are providers, and then at start-up. Only
OpenAI's own chat parameters are handed to it: its keyword arguments could otherwise be used by a client
to redirect a request, and our key with it (``api_base``), or to fake an answer (``mock_response``).
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import logging
import os
from collections.abc import AsyncIterator, Sequence
from typing import Any

from gateway.config import GatewaySettings, Provider
from gateway.errors import BadRequestError, UpstreamError, UpstreamRefusedError, UpstreamTimeoutError
from gateway.proxy.endpoints import CHAT, EMBEDDINGS
from gateway.proxy.exchange import Exchange
from gateway.routing.pools import Replica
from gateway.upstream.options import usage_wanted
from gateway.upstream.sse import DONE, ServerEvent
from gateway.upstream.vllm import Listener

PASSED_PARAMETERS = frozenset(
    "audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens max_tokens "
    "messages modalities n parallel_tool_calls prediction presence_penalty reasoning_effort response_format "
    "seed service_tier stop store stream stream_options temperature tool_choice tools top_logprobs top_p "
    "user verbosity".split()
)
PASSED_TO_EMBEDDINGS = frozenset(("dimensions", "encoding_format", "input", "user"))
_CLIENTS_OWN = frozenset({400, 413, 422, 429})
"""Statuses of a provider that are the client's to see. A 401 or 404 is about our configuration."""


class LiteLLM:
    """The providers' upstream. It works after ``load()``."""

    def __init__(self, providers: Sequence[Provider], limits: GatewaySettings) -> None:
        self._providers = {provider.model: provider for provider in providers}
        self._limits = limits
        self._litellm: Any = None

    async def load(self) -> None:
        """Import LiteLLM if there are providers."""
        if self._providers and self._litellm is None:
            self._litellm = await asyncio.to_thread(_import_litellm)

    def know(self, providers: Sequence[Provider]) -> None:
        """The configuration has changed."""
        self._providers = {provider.model: provider for provider in providers}

    def attempt(
        self, listener: Listener, exchange: Exchange, replica: Replica, work: float
    ) -> _ProviderAttempt:
        """An attempt at a provider's model. Raises BadRequestError."""
        if exchange.endpoint not in (CHAT, EMBEDDINGS):
            raise BadRequestError(
                f"model: {replica.name} serves {CHAT.path} and {EMBEDDINGS.path} only; send it there",
                param="model",
            )
        body = exchange.body.everything()
        if exchange.options.stream:
            body["stream_options"] = usage_wanted(exchange.body)
        return _ProviderAttempt(self, listener, exchange, replica, body)

    async def once(self, model: str, body: dict[str, Any]) -> dict[str, Any]:
        """A chat completion that is not streamed. Raises UpstreamError."""
        reply = await self.open(model, body, chat=True, stream=False)
        async for event in reply.events():
            return event.data or {}
        raise UpstreamError(f"The provider of {model} gave no answer.")

    async def open(self, model: str, body: dict[str, Any], *, chat: bool, stream: bool) -> _Reply:
        """An answer whose first event has come."""
        await self.load()
        provider = self._providers[model]
        passed = PASSED_PARAMETERS if chat else PASSED_TO_EMBEDDINGS
        arguments = {key: value for key, value in body.items() if key in passed}
        complete = self._litellm.acompletion if chat else self._litellm.aembedding
        try:
            async with asyncio.timeout(self._limits.first_byte_timeout_s):
                answer = await complete(
                    **arguments,
                    model=provider.litellm_model,
                    api_base=provider.api_base,
                    api_key=_key(provider),
                    drop_params=True,
                    num_retries=0,
                    max_retries=0,
                    timeout=self._limits.first_byte_timeout_s,
                )
                reply = _Reply(answer, model, self._limits.idle_timeout_s, stream=stream)
                try:
                    await reply.begin()
                except BaseException:
                    await reply.close()
                    raise
                return reply
        except Exception as error:
            raise _translated(error, model) from error


class _ProviderAttempt:
    """One request to a provider. Its task is the exchange's."""

    def __init__(
        self,
        providers: LiteLLM,
        listener: Listener,
        exchange: Exchange,
        replica: Replica,
        body: dict[str, Any],
    ) -> None:
        self.exchange = exchange
        self.replica = replica
        self.sent = False
        self._listener = listener
        self._providers = providers
        self._body = body
        self._may_send = asyncio.Event()
        self._may_send.set()
        self.over = False
        self._lease = replica.take()

    def start(self) -> None:
        self.sent = True
        self.exchange.task = asyncio.get_running_loop().create_task(self._guarded())

    async def _guarded(self) -> None:
        try:
            await self._run()
        except Exception as error:
            self.exchange.pipeline.defect(self.exchange, error)

    async def _run(self) -> None:
        exchange, listener, reply = self.exchange, self._listener, None
        try:
            reply = await self._providers.open(
                self.replica.name,
                self._body,
                chat=exchange.endpoint is CHAT,
                stream=exchange.options.stream,
            )
            async for event in reply.events():
                await self._may_send.wait()
                if exchange.options.stream:
                    listener.arrived(self, event.raw)
                else:
                    listener.whole(self, event.raw)
            self.cancel()
            if exchange.options.stream:
                listener.ended(self)
        except UpstreamError as error:
            if isinstance(error, UpstreamRefusedError):
                self.replica.breaker.answered()
            else:
                self.replica.breaker.errored()
            self.cancel()
            listener.broke(self, error)
        finally:
            self.cancel()
            if reply is not None:
                await reply.close()

    def cancel(self) -> None:
        """Its books; the task ends with the exchange."""
        if not self.over:
            self.over = True
            self._lease.release()

    def pause(self) -> None:
        self._may_send.clear()

    def resume(self) -> None:
        self._may_send.set()


class _Reply:
    """An answer of LiteLLM: one object, or a stream of objects, each of which becomes an event."""

    def __init__(self, answer: Any, model: str, idle_timeout_s: float, *, stream: bool) -> None:
        self._answer = answer
        self._model = model
        self._idle_timeout_s = idle_timeout_s
        self._stream = stream
        self._first: ServerEvent | None = None

    async def begin(self) -> None:
        if not self._stream:
            self._first = self._event(self._answer)
            return
        self._answer = aiter(self._answer)
        self._first = self._event(await anext(self._answer))

    async def events(self) -> AsyncIterator[ServerEvent]:
        assert self._first
        yield self._first
        if not self._stream:
            return
        try:
            while True:
                async with asyncio.timeout(self._idle_timeout_s):
                    chunk = await anext(self._answer)
                yield self._event(chunk)
        except StopAsyncIteration:
            yield ServerEvent(DONE, done=True)
        except Exception as error:
            raise _translated(error, self._model) from error

    async def close(self) -> None:
        """Close the provider's connection, however deep LiteLLM holds it."""
        stream = self._answer if self._stream else None
        for holder in (stream, getattr(stream, "completion_stream", None)):
            for name in ("aclose", "close"):
                if callable(method := getattr(holder, name, None)):
                    result = method()
                    if inspect.isawaitable(result):
                        await result
                    break

    def _event(self, answer: Any) -> ServerEvent:
        data = answer.model_dump(exclude_none=True)
        data["model"] = self._model
        if self._stream:
            for choice in data.get("choices", ()):
                choice.setdefault("finish_reason", None)
            if data.get("usage") and not any(_says_something(choice) for choice in data["choices"]):
                data["choices"] = []  # OpenAI's usage chunk; LiteLLM's has an empty choice
        text = json.dumps(data, default=str).encode()
        return ServerEvent(b"data: " + text + b"\n\n" if self._stream else text, data)


def _says_something(choice: dict[str, Any]) -> bool:
    return bool(choice.get("delta") or choice["finish_reason"])


def _key(provider: Provider) -> str:
    """The provider's key. LiteLLM wants one even where the provider does not."""
    return os.environ.get(provider.api_key_env, "") if provider.api_key_env else "none"


def _translated(error: Exception, model: str) -> Exception:
    """LiteLLM's exceptions carry the provider's status; its message may hold keys and stays in the log."""
    if isinstance(error, UpstreamError):
        return error
    status = getattr(error, "status_code", None)
    internal = f"{model}: {type(error).__name__}: {error}"
    if isinstance(error, TimeoutError) or status in (408, 504):
        return UpstreamTimeoutError(f"The provider of {model} gave no answer in time.", internal=internal)
    if status in _CLIENTS_OWN:
        body = getattr(error, "body", None)  # the provider's own error object, if it sent one
        said = body if isinstance(body, dict) else {"message": f"The provider of {model} refused ({status})."}
        refused = UpstreamRefusedError(status, said, retry_after_s=1 if status == 429 else None)
        refused.internal = internal
        return refused
    return UpstreamError(f"The provider of {model} failed; try again.", internal=internal)


def _import_litellm() -> Any:
    """LiteLLM without its price list from the network, its reports and its chatter."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    litellm: Any = importlib.import_module("litellm")
    litellm.telemetry = False
    litellm.suppress_debug_info = True
    litellm.turn_off_message_logging = True
    for name in ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return litellm
