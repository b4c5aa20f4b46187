"""vLLM engines over HTTP: bytes come back as they are, unbuffered.

No time limit on the whole answer: limits are on connecting, on the first byte and on silence. The
first event is awaited before the answer counts as begun, so that an engine that dies during prefill
is still a clean 502 for the client.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp

from gateway.config import Gateway
from gateway.errors import NeverReachedError, UpstreamError, UpstreamRefusedError, UpstreamTimeoutError
from gateway.routing.pools import Replica
from gateway.upstream.base import Call, Event, Reply
from gateway.upstream.sse import EventSplitter

READ_BUFFER_BYTES = 1 << 18
KEEP_ALIVE_S = 4.0
"""Below the 5 s after which vLLM closes an idle connection, so that few pooled ones are stale."""

_FINISH_S = 1.0


class _Trace:
    """Notes whether a request went over a pooled connection, which may have been closed meanwhile."""

    reused = False


class VLLM:
    """The engines' upstream. It works within ``connected()``."""

    def __init__(self, limits: Gateway) -> None:
        self._limits = limits
        self._session: aiohttp.ClientSession | None = None

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[aiohttp.ClientSession]:
        """The HTTP session for engines: no proxy, no cookies, no redirects, no limit on connections."""

        async def reused(_session: Any, context: Any, _params: Any) -> None:
            if isinstance(context.trace_request_ctx, _Trace):
                context.trace_request_ctx.reused = True

        tracing = aiohttp.TraceConfig()
        tracing.on_connection_reuseconn.append(reused)
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._limits.connect_timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"accept-encoding": "identity"},
            read_bufsize=READ_BUFFER_BYTES,
            trace_configs=[tracing],
        ) as self._session:
            yield self._session

    async def open(self, replica: Replica, call: Call) -> Reply:
        limit_s = self._limits.first_byte_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                response = await self._post(replica, call)
                try:
                    return await self._begin(response, stream=call.stream)
                except BaseException:
                    response.close()
                    raise
        except TimeoutError as error:
            raise UpstreamTimeoutError(
                f"The engine gave no answer within {limit_s:g} s.",
                internal=f"{replica.name} at {replica.url}",
            ) from error

    async def _post(self, replica: Replica, call: Call) -> aiohttp.ClientResponse:
        assert self._session is not None, "VLLM is used outside connected()"
        trace = _Trace()
        try:
            return await self._session.post(
                replica.url + call.path,
                data=json.dumps(call.body).encode(),
                headers={"content-type": "application/json"},
                allow_redirects=False,
                trace_request_ctx=trace,
            )
        except aiohttp.ClientError as error:
            raise _not_answered(error, replica, trace) from error

    async def _begin(self, response: aiohttp.ClientResponse, *, stream: bool) -> Reply:
        try:
            if response.status != 200:
                raise _refusal(response.status, await response.read())
            reply = _Reply(response, self._limits.idle_timeout_s, stream=stream)
            await reply.begin()
            return reply
        except aiohttp.ClientError as error:
            raise _broke_off(error) from error


class _Reply:
    """An answer that arrives over an aiohttp response."""

    def __init__(self, response: aiohttp.ClientResponse, idle_timeout_s: float, *, stream: bool) -> None:
        self._response = response
        self._idle_timeout_s = idle_timeout_s
        self._stream = stream
        self._splitter = EventSplitter()
        self._first: list[Event] = []
        self._complete = False
        self.busy_s = 0.0

    async def begin(self) -> None:
        """Wait for the first event; for an answer that is not streamed, the whole of it."""
        if not self._stream:
            self._first = [_whole(await self._response.read())]
        while not self._first:
            self._first = await self._read()

    async def batches(self) -> AsyncIterator[list[Event]]:
        batch = self._first
        while True:
            for index, event in enumerate(batch):
                if event.data is not None and event.data.get("error"):
                    # vLLM has sent its 200 by the time it looks closely at a stream.
                    if index:
                        yield batch[:index]
                    raise _reported(event)
            if batch:
                yield batch
            if not self._stream or any(event.done for event in batch):
                self._complete = True
                return
            batch = await self._next()

    async def close(self) -> None:
        """Close the connection, upon which vLLM aborts the request; after a whole answer, keep it."""
        if self._complete:
            # The end of the HTTP message must be read, or the connection cannot be used again.
            with suppress(aiohttp.ClientError, TimeoutError):
                async with asyncio.timeout(_FINISH_S):
                    await self._response.read()
        self._response.close()

    async def _next(self) -> list[Event]:
        try:
            async with asyncio.timeout(self._idle_timeout_s):
                return await self._read()
        except TimeoutError as error:
            raise UpstreamTimeoutError(f"The engine fell silent for {self._idle_timeout_s:g} s.") from error
        except aiohttp.ClientError as error:
            raise _broke_off(error) from error

    async def _read(self) -> list[Event]:
        data = await self._response.content.readany()
        if not data and self._response.content.at_eof():
            raise UpstreamError("The engine ended its answer before it was complete.")
        begun = time.perf_counter()
        events = self._splitter.feed(data)
        self.busy_s += time.perf_counter() - begun
        return events


def _whole(raw: bytes) -> Event:
    try:
        data = json.loads(raw)
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise UpstreamError("The engine sent something that is no answer.", internal=f"body {raw[:120]!r}")
    return Event(raw, data)


def _reported(event: Event) -> UpstreamError:
    """An error that came as the answer's text."""
    error = event.data["error"] if event.data else None
    code = error.get("code") if isinstance(error, dict) else None
    return _refusal(code if isinstance(code, int) else 500, json.dumps(event.data).encode())


def _refusal(status: int, raw: bytes) -> UpstreamError:
    """An answer other than 200: the client's own mistake is passed on, anything else is a 502."""
    if 400 <= status < 500:
        try:
            return UpstreamRefusedError(status, json.loads(raw))
        except ValueError:
            return UpstreamRefusedError(status, {})
    return UpstreamError(
        f"The engine failed with status {status}; try again.", internal=f"it said {raw[:300]!r}"
    )


def _not_answered(error: aiohttp.ClientError, replica: Replica, trace: _Trace) -> UpstreamError:
    """Sort out the failures before the first byte of an answer, of which two kinds may be retried."""
    internal = f"{replica.name} at {replica.url}: {error!r}"
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return NeverReachedError("The engine cannot be reached.", internal=internal)
    if trace.reused and isinstance(error, aiohttp.ClientConnectionError):
        return NeverReachedError("The engine closed the connection.", stale=True, internal=internal)
    return UpstreamError("The engine broke off before it answered.", internal=internal)


def _broke_off(error: aiohttp.ClientError) -> UpstreamError:
    return UpstreamError("The engine broke off in the middle of its answer.", internal=repr(error))
