"""Responses that are made while their client is away (``background: true``).

Such a request is answered at once. A second one, whose client is the store, goes the way of any other
request: it is routed, tried again, counted and logged like them. It is streamed, so that the limits on
silence are those of a stream. It ends with the process that runs it: what was under way is then *failed*.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from gateway.errors import GatewayError, StoreDownError, TooManyInBackgroundError, envelope
from gateway.proxy.reply import Reply
from gateway.responses import conversation
from gateway.responses.conversation import Previous
from gateway.responses.reader import ResponseObjects
from gateway.responses.service import Responses
from gateway.responses.store import Stored
from gateway.wire.heads import RequestHead

if TYPE_CHECKING:
    from gateway.proxy.exchange import Exchange
    from gateway.wire.client import Call

BEAT_S = 1.0
"""How often a process says what it works on, and hears of what was cancelled elsewhere."""
_BODY_HEADERS = ("content-encoding", "content-length", "transfer-encoding", "expect")
_STOPPED = {"code": "server_error", "message": "The gateway that worked on this response has stopped."}

Serve = Callable[[Any, RequestHead, bytes], "Call | None"]


class Background:
    """What this process works on."""

    def __init__(self, responses: Responses, serve: Serve) -> None:
        """``serve`` starts a request, as of a client's."""
        self._responses = responses
        self._serve = serve
        self._runner = f"{socket.gethostname()[:30]}:{os.getpid()}:{secrets.token_hex(4)}"
        self._running: dict[tuple[str, str], StoreClient] = {}
        self._count: Counter[str] = Counter()
        self._endings: set[asyncio.Task[None]] = set()

    async def begin(
        self, exchange: Exchange, stored: Stored, previous: Previous | None, reply: Reply
    ) -> None:
        """Answer the client, and start the work. Raises TooManyInBackgroundError and StoreDownError."""
        most = self._responses.settings.max_background
        owner = stored.owner
        if self._count[owner] >= most:
            raise TooManyInBackgroundError(
                f"background: {most} responses are under way already (responses.max_background); wait for one"
            )
        self._count[owner] += 1
        try:
            stored = self._queued(exchange, stored)
            await self._responses.put(stored)
        except BaseException:
            self._over(owner)
            raise
        body = conversation.with_fields(
            exchange.body.json,
            {
                **({"input": previous.input} if previous else {}),
                "previous_response_id": b"null",
                "store": b"false",
                "background": b"false",
                "stream": b"true",
            },
        )
        head = exchange.head
        headers = {name: value for name, value in head.headers.items() if name not in _BODY_HEADERS}
        headers["x-request-id"] = exchange.request_id
        reply.whole(exchange, stored.response)
        exchange.pipeline.finish(exchange)
        head = RequestHead("POST", head.path, "", headers, len(body), keep_alive=True)
        client = StoreClient(stored, self._ended)
        self._running[owner, stored.id] = client
        try:
            client.call = self._serve(client, head, body)
        except GatewayError as error:  # its key is not known any more, say
            client.send_whole(b"", msgspec.json.encode(envelope(error)))

    async def cancel(self, stored: Stored) -> Stored:
        """End it, wherever it is worked on; gives what it has become, which may be whole by now. Raises
        StoreDownError."""
        response = conversation.with_status(stored.response, "cancelled")
        if await self._responses.finish(stored.owner, stored.id, "cancelled", response):
            self._abandon(stored.owner, stored.id)
            return replace(stored, status="cancelled", response=response)
        return await self._responses.get(stored.owner, stored.id) or stored

    async def present(self, stored: Stored) -> Stored:
        """The same, unless the process that worked on it has gone: then it has failed. Raises
        StoreDownError."""
        if not stored.running or not await self._responses.silent(stored):
            return stored
        response = conversation.with_status(stored.response, "failed", _STOPPED)
        await self._responses.finish(stored.owner, stored.id, "failed", response)
        return await self._responses.get(stored.owner, stored.id) or stored

    def forget(self, owner: str, response_id: str) -> None:
        """It has been deleted."""
        self._abandon(owner, response_id)

    async def beat_forever(self) -> None:
        """Say what is worked on here, end what was cancelled elsewhere, and tend the store."""
        while True:
            with contextlib.suppress(StoreDownError):
                await self._responses.tend()
                if self._running:
                    for owner, name in await self._responses.beat(self._runner, list(self._running)):
                        self._abandon(owner, name)
            await asyncio.sleep(BEAT_S)

    async def close(self) -> None:
        """Wait until the endings of what was stopped are written. Call it before the store is closed."""
        if self._endings:
            await asyncio.wait(tuple(self._endings), timeout=BEAT_S)

    def _queued(self, exchange: Exchange, stored: Stored) -> Stored:
        response_id = f"resp_{secrets.token_hex(16)}"
        now = self._responses.now()
        asked, model = exchange.body.raw, exchange.model
        return replace(
            stored,
            id=response_id,
            response=conversation.unfinished(response_id, "queued", int(now), asked, model, stored.previous),
            background=True,
            runner=self._runner,
            beat=now,
        )

    def _abandon(self, owner: str, response_id: str) -> None:
        client = self._running.pop((owner, response_id), None)
        if client is not None:
            self._over(owner)
            client.over = True
            if client.call is not None:
                client.call.abandon()

    def _ended(self, stored: Stored) -> None:
        """A request has come to its end by itself."""
        if self._running.pop((stored.owner, stored.id), None) is not None:
            self._over(stored.owner)
            task = asyncio.get_running_loop().create_task(self._finish(stored))
            self._endings.add(task)
            task.add_done_callback(self._endings.discard)

    async def _finish(self, stored: Stored) -> None:
        try:
            await self._responses.finish(stored.owner, stored.id, stored.status, stored.response)
        except StoreDownError:
            self._responses.dropped("store_down")

    def _over(self, owner: str) -> None:
        self._count[owner] -= 1
        if not self._count[owner]:
            del self._count[owner]


class StoreClient:
    """The client of a request in the background: it takes whatever comes, at once."""

    old = True
    """As of HTTP/1.0: what it is sent has no chunks around it."""
    transport = None

    def __init__(self, stored: Stored, ended: Callable[[Stored], None]) -> None:
        self.call: Call | None = None
        self.over = False
        self._stored = stored
        self._ended = ended
        self._error: dict[str, str] | None = None
        created = msgspec.json.decode(stored.response)["created_at"]
        shown = {
            "previous_response_id": msgspec.json.encode(stored.previous),
            "store": b"true",
            "background": b"true",
            "created_at": msgspec.json.encode(created),
        }
        self._objects = ResponseObjects(shown, self._keep, own_id=stored.id)
        self._made: tuple[str, bytes] | None = None

    def send_whole(self, head: bytes, body: bytes, *, no_body: bool = False) -> None:
        """An error, since what was asked for is a stream."""
        self._read_error(body)
        self._end()

    def begin(self, head: bytes, payload: bytes) -> None:
        self.send(payload)

    def send(self, payload: bytes) -> None:
        self._objects.events(payload)

    def end(self, payload: bytes = b"") -> None:
        self.send(payload)
        if self._made is None:
            self._read_error(payload.rpartition(b"data:")[2])
        self._end()

    def abort(self) -> None:
        self._end()

    def _keep(self, response_id: str, status: str, response: bytes) -> None:
        self._made = (status, response)

    def _read_error(self, body: bytes) -> None:
        """Of OpenAI's envelope, or of an event ``error``."""
        message = None
        with contextlib.suppress(msgspec.DecodeError, AttributeError):
            said = msgspec.json.decode(body)
            message = (said.get("error") or said).get("message")
        self._error = {"code": "server_error", "message": str(message or "The request failed.")[:1000]}

    def _end(self) -> None:
        if self.over:
            return
        self.over = True
        if self._made is None:
            error = self._error or {"code": "server_error", "message": "The request failed."}
            self._made = "failed", conversation.with_status(self._stored.response, "failed", error)
        status, response = self._made
        self._ended(replace(self._stored, status=status, response=response))
