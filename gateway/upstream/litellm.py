"""Every model that does not run on a pool of ours, through LiteLLM.

LiteLLM runs on a loop of its own (``providers/library.py``); a part of an answer is asked for when the one
before it has been handed on, so that a client that does not read holds the provider back: nothing is
buffered but what the system's sockets hold. Chat completions and embeddings are served; other endpoints are
refused with words. What a client may ask for is in ``providers/parameters.py``, what becomes of a
provider's errors in ``providers/errors.py``.

Time limits of an exchange are the exchange's; those here are for what has none (``once``).
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import msgspec

from gateway.config import GatewaySettings, Provider
from gateway.errors import BadRequestError, UpstreamError, UpstreamTimeoutError
from gateway.proxy.body import LARGEST_READ_BYTES
from gateway.proxy.endpoints import CHAT, EMBEDDINGS
from gateway.proxy.exchange import Exchange
from gateway.routing.replicas import Replica
from gateway.upstream.options import usage_wanted
from gateway.upstream.providers.errors import Failure, Outcome, failure, secrets_of
from gateway.upstream.providers.library import Library
from gateway.upstream.providers.parameters import passed, unknown_tool
from gateway.upstream.providers.reply import chat_body, chat_event, embeddings_body, finishes
from gateway.upstream.sse import DONE
from gateway.upstream.vllm import Listener

SMALL_BYTES = LARGEST_READ_BYTES
"""A body of up to this is made objects of at once."""
MOST_VALUES = 1 << 19
"""In one body: all are objects at the same time, here and in LiteLLM. Embeddings of 300,000 tokens, which is
as many as OpenAI takes, have so many."""
_WINDOW = 32 << 10
_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_SEPARATORS = (b",", b"[", b"{")


class FailedError(Exception):
    """A provider failed; carries what the client and the breaker get."""

    def __init__(self, failed: Failure) -> None:
        super().__init__(failed.error.message)
        self.failed = failed


class LiteLLM:
    """The providers' upstream. It works after ``load()``."""

    def __init__(self, providers: Sequence[Provider], limits: GatewaySettings) -> None:
        self._providers = {provider.model: provider for provider in providers}
        self._limits = limits
        self._library = Library()

    async def load(self) -> None:
        """Import LiteLLM if there are providers. Takes seconds, in which this loop stalls for moments."""
        if self._providers:
            await self._library.start(provider.litellm_model for provider in self._providers.values())

    async def close(self) -> None:
        await self._library.close()

    def know(self, providers: Sequence[Provider]) -> None:
        """The configuration has changed."""
        self._providers = {provider.model: provider for provider in providers}

    def attempt(
        self, listener: Listener, exchange: Exchange, replica: Replica, work: float
    ) -> ProviderAttempt:
        """An attempt at a provider's model, which ``start`` sends. Raises BadRequestError, or UpstreamError
        where the model is gone."""
        if exchange.endpoint not in (CHAT, EMBEDDINGS):
            raise BadRequestError(
                f"model: {replica.name} serves {CHAT.path} and {EMBEDDINGS.path} only; send it there",
                param="model",
            )
        provider = self._provider(replica.name)
        chat, stream = exchange.endpoint is CHAT, exchange.options.stream
        if exchange.body.size <= SMALL_BYTES:
            body = _asked(exchange, replica.name)
            answer = self._answer(provider, body, chat=chat, stream=stream)
        else:
            answer = self._read_and_answer(provider, exchange, replica.name, chat=chat, stream=stream)
        return ProviderAttempt(listener, exchange, replica, answer)

    async def once(self, model: str, body: dict[str, Any]) -> dict[str, Any]:
        """A chat completion that is not streamed. Raises UpstreamError."""
        limit_s = self._limits.answer_timeout_s
        try:
            async with (
                asyncio.timeout(limit_s),
                aclosing(self._answer(self._provider(model), body, chat=True, stream=False)) as answer,
            ):
                async for payload in answer:
                    return msgspec.json.decode(payload, type=dict[str, Any])
        except TimeoutError:
            raise UpstreamTimeoutError(f"The provider of {model} gave no answer in {limit_s:g} s.") from None
        except FailedError as error:
            raise error.failed.error from None
        raise UpstreamError(f"The provider of {model} gave no answer.")

    def _provider(self, model: str) -> Provider:
        try:
            return self._providers[model]
        except KeyError:
            raise UpstreamError(f"The provider of {model} is no longer configured.") from None

    async def _read_and_answer(
        self, provider: Provider, exchange: Exchange, name: str, *, chat: bool, stream: bool
    ) -> AsyncGenerator[bytes, None]:
        """The answer to a body that takes long to read. Raises BadRequestError, and FailedError."""
        body = await asyncio.to_thread(_asked, exchange, name)
        async with aclosing(self._answer(provider, body, chat=chat, stream=stream)) as answer:
            async for payload in answer:
                yield payload

    async def _answer(
        self, provider: Provider, body: dict[str, Any], *, chat: bool, stream: bool
    ) -> AsyncGenerator[bytes, None]:
        """The answer's JSON, or its events. Raises FailedError. LiteLLM's stream is closed with it."""
        source: Any = None
        key = _key(provider)
        try:
            await self._library.start((provider.litellm_model,))
            answer = await self._library.run(self._complete(provider, key, body, chat=chat))
            if not stream:
                yield (chat_body if chat else embeddings_body)(answer, provider.model)
                return
            source = aiter(answer)
            while (chunk := await self._library.run(_next(source))) is not None:
                if finishes(chunk) and not _has_finished(source):
                    raise UpstreamError(f"The provider of {provider.model} broke its answer off.")
                yield chat_event(chunk, provider.model)
            yield DONE
        except (GeneratorExit, asyncio.CancelledError):
            raise
        except Exception as error:
            failed = failure(error, provider.model, secrets_of(key, provider.api_base))
            raise FailedError(failed) from None
        finally:
            if source is not None:
                self._library.start_soon(_closed(source))

    async def _complete(self, provider: Provider, key: str, body: dict[str, Any], *, chat: bool) -> Any:
        litellm = self._library.module
        complete = litellm.acompletion if chat else litellm.aembedding
        # Tools of LiteLLM's own proxy, which have it fetch tools elsewhere, are not for clients to switch on.
        own = {"_skip_mcp_handler": True} if chat else {}
        return await complete(
            **passed(body, chat=chat),
            **own,
            model=provider.litellm_model,
            api_base=provider.api_base,
            api_key=key,
            drop_params=True,
            num_retries=0,
            max_retries=0,
            timeout=self._limits.total_timeout_s,
        )


class ProviderAttempt:
    """One request to a provider, in a task of its own."""

    def __init__(
        self, listener: Listener, exchange: Exchange, replica: Replica, answer: AsyncGenerator[bytes, None]
    ) -> None:
        self.exchange = exchange
        self.replica = replica
        self.over = False
        self.sent = False
        self.did_nothing = False
        self._listener = listener
        self._answer = answer
        self._may_send = asyncio.Event()
        self._may_send.set()
        self._task: asyncio.Task[None] | None = None
        self._lease = replica.take()

    def request_body(self) -> tuple[bytes | memoryview, ...] | None:
        return None

    def start(self) -> None:
        self.sent = True
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        try:
            async with aclosing(self._answer) as answer:
                async for payload in answer:
                    await self._may_send.wait()
                    if self.over:
                        return
                    if not self.exchange.options.stream:
                        self._end()
                        self._listener.whole(self, payload)
                        return
                    self._listener.arrived(self, payload)
                    if self.over:
                        return
            self._end()
            self._listener.ended(self)
        except FailedError as error:
            self._fail(error.failed)
        except BadRequestError as error:
            if self._end():
                self.did_nothing = True
                self.exchange.pipeline.fail(self.exchange, error)
        except Exception as error:
            self._end()
            self.exchange.pipeline.defect(self.exchange, error)

    def cancel(self) -> None:
        """Give the provider up, and close its connection. Safe at any time and twice."""
        if self._end() and self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()

    def pause(self) -> None:
        self._may_send.clear()

    def resume(self) -> None:
        self._may_send.set()

    def _fail(self, failed: Failure) -> None:
        if not self._end():
            return
        self.did_nothing = failed.outcome in (Outcome.ANSWERED, Outcome.NOT_REACHED)
        breaker = self.replica.breaker
        if failed.outcome is Outcome.ANSWERED:
            breaker.answered()
        elif failed.outcome is Outcome.NOT_REACHED:
            breaker.not_reached()
        else:
            breaker.errored()
        self._listener.broke(self, failed.error)

    def _end(self) -> bool:
        """Whether it had not ended before."""
        if self.over:
            return False
        self.over = True
        self._lease.release()
        return True


def _asked(exchange: Exchange, name: str) -> dict[str, Any]:
    """What is asked, as objects. Raises BadRequestError."""
    asked = exchange.body
    if asked.size > SMALL_BYTES and (count := _values(asked.json)) > MOST_VALUES:
        raise BadRequestError(
            f"The body has {count:,} values or more, of which {name} takes {MOST_VALUES:,}; send fewer"
        )
    body = asked.everything()
    if place := unknown_tool(body):
        text = f"{place}.type: {name} takes tools of type function and custom; send one of these"
        raise BadRequestError(text, param=place)
    if exchange.options.stream:
        body["stream_options"] = usage_wanted(asked)
    return body


def _values(raw: bytes) -> int:
    """How many values a JSON text has, without making any; of more than ``MOST_VALUES`` not how many more.
    For a thread, which lets others go on after every step."""
    count, at, size = 1, 0, len(raw)
    while at < size and count <= MOST_VALUES:
        end = min(at + _WINDOW, size)
        if (quote := raw.find(b'"', at, end)) >= 0:
            end = quote
        count += sum(raw.count(sign, at, end) for sign in _SEPARATORS)
        at = end if quote < 0 else _behind(raw, quote + 1)
    return count


def _behind(raw: bytes, at: int) -> int:
    """Where what follows a string begins; ``at`` is behind its first quote."""
    while (found := _STRING.match(raw, at, at + _WINDOW)) is not None:
        if raw[found.end() : found.end() + 1] == b'"':
            return found.end() + 1
        if found.end() == at:
            break  # it is cut off
        at = found.end()
    return len(raw)


async def _next(source: Any) -> Any:
    """The next chunk; None at the end, since a task cannot end with StopAsyncIteration."""
    return await anext(source, None)


def _has_finished(source: Any) -> bool:
    """Whether the provider itself said that its answer is complete: where its stream merely ends, LiteLLM
    says so in its place."""
    said = ("received_finish_reason", "intermittent_finish_reason")
    return not hasattr(source, said[0]) or any(getattr(source, name, None) for name in said)


async def _closed(source: Any) -> None:
    if callable(close := getattr(source, "aclose", None)):
        await close()


def _key(provider: Provider) -> str:
    """The provider's key. LiteLLM wants one even where the provider does not."""
    return os.environ.get(provider.api_key_env, "") if provider.api_key_env else "none"
