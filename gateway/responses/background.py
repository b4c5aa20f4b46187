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

from gateway.errors import (
    BadRequestError,
    BodyTooLargeError,
    GatewayError,
    OverloadedError,
    StoreDownError,
    TooManyInBackgroundError,
    envelope,
)
from gateway.proxy.body import LARGE_BYTES, Body
from gateway.proxy.reply import Reply
from gateway.responses import conversation
from gateway.responses.conversation import Previous
from gateway.responses.reader import ResponseObjects
from gateway.responses.service import Responses
from gateway.responses.store import Stored
from gateway.wire.flow import UNCOUNTED_BYTES, Intake, Reservation
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

    def __init__(self, responses: Responses, serve: Serve, intake: Intake) -> None:
        """``serve`` starts a request, as of a client's; in ``intake`` it takes the room that a client's
        would."""
        self._responses = responses
        self._intake = intake
        self._serve = serve
        self._runner = f"{socket.gethostname()[:30]}:{os.getpid()}:{secrets.token_hex(4)}"
        self._running: dict[tuple[str, str], StoreClient] = {}
        self._count: Counter[str] = Counter()
        self._endings: set[asyncio.Task[None]] = set()

    async def begin(
        self, exchange: Exchange, stored: Stored, previous: Previous | None, reply: Reply
    ) -> None:
        """Answer the client, and start the work. Raises TooManyInBackgroundError, BadRequestError for what
        cannot be kept, and what ``Responses.put`` raises."""
        most = self._responses.settings.max_background
        owner = stored.owner
        if self._count[owner] >= most:
            raise TooManyInBackgroundError(
                f"background: {most} responses are under way already (responses.max_background); wait for one"
            )
        self._count[owner] += 1
        begun = False
        try:
            body = await _body(exchange.body, previous)
            created = int(self._responses.now())
            stored = self._queued(exchange, stored, created)
            exchange.client.grow(len(body))
            client = StoreClient(stored, created, Reservation(self._intake), self._ended)
            await self._responses.put(stored)
            reply.whole(exchange, stored.response)
            exchange.pipeline.finish(exchange)
            self._running[owner, stored.id] = client  # from here on its end gives the place back
            begun = True
        finally:
            if not begun:
                self._over(owner)
        head = exchange.head
        headers = {name: value for name, value in head.headers.items() if name not in _BODY_HEADERS}
        headers["x-request-id"] = exchange.request_id
        head = RequestHead("POST", head.path, "", headers, len(body), keep_alive=True)
        try:
            client.grow(len(body))
            client.call = self._serve(client, head, body)
        except GatewayError as error:  # its key is not known any more, say, or others have taken the room
            client.send_whole(b"", msgspec.json.encode(envelope(error)))
        except Exception:
            client.abort()
            raise

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
        if not stored.running or not self._responses.silent(stored):
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
            with contextlib.suppress(StoreDownError, OverloadedError):
                await self._responses.tend()
                if self._running:
                    for owner, name in await self._responses.beat(self._runner, list(self._running)):
                        self._abandon(owner, name)
            await asyncio.sleep(BEAT_S)

    async def close(self) -> None:
        """Wait until the endings of what was stopped are written. Call it before the store is closed."""
        if self._endings:
            await asyncio.wait(tuple(self._endings), timeout=BEAT_S)

    def _queued(self, exchange: Exchange, stored: Stored, created: int) -> Stored:
        """Raises BodyTooLargeError for what is more than is kept."""
        response_id = f"resp_{secrets.token_hex(16)}"
        asked, model = exchange.body.view, exchange.model
        queued = replace(
            stored,
            id=response_id,
            response=conversation.unfinished(response_id, "queued", created, asked, model, stored.previous),
            background=True,
            runner=self._runner,
            beat=self._responses.now(),
        )
        most = self._responses.settings.max_tenant_bytes
        if queued.size > most:
            raise BodyTooLargeError(
                f"background: this request has {queued.size} bytes to be kept, of which "
                f"responses.max_tenant_bytes allows {most}; send fewer, or send it without background",
                param="input",
            )
        return queued

    def _abandon(self, owner: str, response_id: str) -> None:
        client = self._running.pop((owner, response_id), None)
        if client is not None:
            self._over(owner)
            client.over = True
            client.room.release()
            if client.call is not None:
                client.call.abandon()

    def _ended(self, stored: Stored, status: str, response: bytes) -> None:
        """A request has come to its end by itself, and this of it."""
        if self._running.pop((stored.owner, stored.id), None) is not None:
            self._over(stored.owner)
            task = asyncio.get_running_loop().create_task(self._finish(stored, status, response))
            self._endings.add(task)
            task.add_done_callback(self._endings.discard)

    async def _finish(self, stored: Stored, status: str, response: bytes) -> None:
        size, most = len(stored.input) + len(response), self._responses.settings.max_tenant_bytes
        if size > most:
            self._responses.dropped("too_large")
            said = f"The response has {size} bytes, of which responses.max_tenant_bytes allows {most}."
            error = {"code": "server_error", "message": said}
            status, response = "failed", conversation.with_status(stored.response, "failed", error)
        try:
            await self._responses.finish(stored.owner, stored.id, status, response)
        except GatewayError as error:
            self._responses.not_kept(error)

    def _over(self, owner: str) -> None:
        self._count[owner] -= 1
        if not self._count[owner]:
            del self._count[owner]


class StoreClient:
    """The client of a request in the background: it takes whatever comes, at once."""

    old = True
    """As of HTTP/1.0: what it is sent has no chunks around it."""
    transport = None

    def __init__(
        self, stored: Stored, created: int, room: Reservation, ended: Callable[[Stored, str, bytes], None]
    ) -> None:
        """``created``: Unix time. ``ended`` gets what became of ``stored``: its status and its object."""
        self.room = room
        self.call: Call | None = None
        self.over = False
        self._stored = stored
        self._ended = ended
        self._error: dict[str, str] | None = None
        shown = {
            "previous_response_id": msgspec.json.encode(stored.previous),
            "store": b"true",
            "background": b"true",
            "created_at": msgspec.json.encode(created),
        }
        self._objects = ResponseObjects(shown, self._keep, own_id=stored.id)
        self._made: tuple[str, bytes] | None = None

    def grow(self, size: int) -> None:
        """Its request takes so many bytes. Raises OverloadedError or TenantOverloadedError."""
        if size > UNCOUNTED_BYTES:
            self.room.resize(self._stored.owner, size)

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
        self.room.release()
        if self._made is None:
            error = self._error or {"code": "server_error", "message": "The request failed."}
            self._made = "failed", conversation.with_status(self._stored.response, "failed", error)
        self._ended(self._stored, *self._made)


async def _body(body: Body, previous: Previous | None) -> bytes:
    """The request that the engine gets. Raises BadRequestError for what is not JSON all through: only the
    first level of a large body has been read."""
    changes = {
        **({"input": previous.input} if previous else {}),
        "previous_response_id": b"null",
        "store": b"false",
        "background": b"false",
        "stream": b"true",
    }
    try:
        if body.size + (len(previous.input) if previous else 0) <= LARGE_BYTES:
            return conversation.with_fields(body.json, changes)
        return await asyncio.to_thread(lambda: conversation.with_fields(body.json, changes))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise BadRequestError(
            "background needs a request in JSON as RFC 8259 has it, since it is kept; send no NaN and no "
            "Infinity",
            param="background",
        ) from None
