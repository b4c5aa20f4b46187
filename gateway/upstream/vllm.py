"""vLLM engines over HTTP: bytes pass as they come, unbuffered.

What an engine sends is handed to the attempts' listener: parts of a stream as they come, any other answer
whole. The first event is awaited before the answer counts as begun, so that an engine that dies during
prefill is still a clean 502 for the client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import Protocol

import msgspec
from msgspec import UNSET

from gateway.config import Config
from gateway.errors import NeverReachedError, UpstreamError, UpstreamRefusedError
from gateway.identity import LONGEST_MODEL, sent_priority
from gateway.proxy.body import LARGE_BYTES, fields_of
from gateway.proxy.endpoints import Form
from gateway.proxy.exchange import Attempt, Exchange
from gateway.routing.replicas import Lease, Replica
from gateway.telemetry.propagation import PASSED_ON, carried
from gateway.upstream.options import changes_for_engine
from gateway.upstream.readers import refusal
from gateway.wire.engine import EngineConnection, Request
from gateway.wire.heads import AnswerHead

COMPLETIONS = Form.COMPLETIONS
LARGEST_ANSWER_BYTES = 256 << 20
TEXT = b"text/plain; charset=utf-8"
"""What a body is that nobody says anything of."""
_OUR_KEY = frozenset({401, 403, 407})
"""No client's fault: its own key is not sent to engines."""
_MOST_TAILS = 1024
_HEAD = b"%bx-request-id: %b\r\n%bcontent-length: %d\r\n\r\n%b"
_LONGEST_WAIT_DIGITS = 6


class Listener(Protocol):
    """Who hears how an attempt goes. After ``whole``, ``ended`` or ``broke`` nothing more comes."""

    def arrived(self, attempt: Attempt, payload: bytes) -> None:
        """A part of a stream, never empty."""

    def ended(self, attempt: Attempt) -> None:
        """The stream has come to its end."""

    def whole(self, attempt: Attempt, body: bytes, content_type: bytes | None = None) -> None:
        """All of an answer that is not streamed; ``content_type`` where it is not JSON."""

    def broke(self, attempt: Attempt, error: UpstreamError) -> None:
        """There will be no answer. NeverReachedError: no work was done."""


class Engines:
    """Makes attempts at engines."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._several_keys = len(config.keys) > 1
        self._tails: dict[tuple[str, str, str, int], bytes] = {}
        """What is added to bodies of a sender and a model where nothing else is: by salt, the model that the
        engine knows, the one that is asked for, priority."""

    def attempt(self, listener: Listener, exchange: Exchange, replica: Replica, work: float) -> EngineAttempt:
        """One request to one engine, which ``start`` sends."""
        endpoint, caller, body = exchange.endpoint, exchange.caller, exchange.body
        assert caller is not None
        more, added = b"", b""
        tapped = exchange.tapped is not None
        if endpoint.form is COMPLETIONS and (tapped or exchange.options.stream):
            added = fields_of(changes_for_engine(body, exchange.options, self._config.quality, tapped=tapped))
        given, priority = body.fields.priority, caller.priority
        if given is not UNSET:
            priority = sent_priority(caller, given) or 0
        named = exchange.model if exchange.names_model else replica.model
        of = (caller.cache_salt, replica.model, named, priority)
        tail = b"" if endpoint.bare else self._tails.get(of)
        if tail is None:
            tail = self._tail(*of, keep=given is UNSET)
        if given is not UNSET and not priority and not endpoint.bare:
            tail += b',"priority":0'
        if exchange.span is not None or exchange.head.memo.passes_on:
            more = _passed_on(exchange)
        if priority:  # vLLM's own header, for the endpoints whose body has no such field
            more += b"x-vllm-priority: %d\r\n" % priority
        head = replica.heads.get(endpoint.path) or replica.request_head(endpoint)
        identity = exchange.request_id.encode()
        request: Request
        if body.size > LARGE_BYTES:
            first, last = body.parts(added + tail)
            size = len(first) + len(last)
            request = (_HEAD % (head, identity, more, size, b""), first, last)
        else:
            raw = body.with_fields(added + tail)
            request = _HEAD % (head, identity, more, len(raw), raw)
        blamed = caller.key.name if self._several_keys and caller.key else ""
        return EngineAttempt(listener, exchange, replica, request, replica.take(work), blamed)

    def _tail(self, salt: str, known: str, model: str, priority: int, *, keep: bool) -> bytes:
        """What a body ends with, but for its brace. Engines know their own model, and adapters, by the names
        that clients use; whatever else a client names, an engine is sent its own, and nothing where it names
        none."""
        changes: dict[str, bytes] = {}
        if salt:
            changes["cache_salt"] = b'"%b"' % salt.encode()
        if model != known and model not in self._config.adapters:
            changes["model"] = msgspec.json.encode(known)
        if priority:
            changes["priority"] = b"%d" % priority
        tail = fields_of(changes)
        if keep and len(self._tails) < _MOST_TAILS and len(model) <= LONGEST_MODEL:
            self._tails[salt, known, model, priority] = tail
        return tail


def _passed_on(exchange: Exchange) -> bytes:
    given: Mapping[str, str] = exchange.head.headers
    if exchange.span is not None:
        given = {**given, **carried(exchange.span)}
    lines = [f"{name}: {given[name]}\r\n" for name in PASSED_ON if name in given]
    return "".join(lines).encode("latin-1")


class EngineAttempt(msgspec.Struct, eq=False):
    """One request to one engine: the ``ResponseHandler`` of its connection."""

    _listener: Listener
    exchange: Exchange
    replica: Replica
    _request: Request
    _lease: Lease
    _blamed: str = ""
    """The key whose request may be the reason if the engine fails at it, where there are several."""
    over: bool = False
    sent: bool = False
    did_nothing: bool = False
    _connection: EngineConnection | None = None
    _head: AnswerHead | None = None
    _streams: bool = False
    _parts: list[bytes] = []
    _size: int = 0

    def request_body(self) -> tuple[bytes | memoryview, ...] | None:
        request = self._request
        if isinstance(request, bytes):
            return (request.partition(b"\r\n\r\n")[2],)
        return request[1:]

    def start(self) -> None:
        """Send it, over a kept connection or else a new one."""
        if (connection := self.replica.connections.kept()) is not None:
            self._connection = connection
            self.sent = True
            connection.send(self, self._request)
        else:
            self.exchange.task = asyncio.get_running_loop().create_task(self._connect())

    def _send(self, connection: EngineConnection) -> None:
        self._connection = connection
        self.sent = True
        connection.send(self, self._request)

    async def _connect(self) -> None:
        try:
            connection = await self.replica.connections.connect()
        except OSError as error:
            self._never_reached(f"{error!r}", unread=False)
            return
        except Exception as error:
            self._end()
            self.exchange.pipeline.defect(self.exchange, error)
            return
        if self.over:
            connection.close()
            return
        self._send(connection)
        if self.exchange.paused_at is not None:
            connection.pause()

    def cancel(self) -> None:
        connection = self._connection
        if self._end() and connection is not None:
            connection.close()

    def pause(self) -> None:
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        if self._connection is not None:
            self._connection.resume()

    # what the connection reports

    def began(self, head: AnswerHead) -> None:
        self._head = head
        self._streams = head.status == 200 and head.is_stream
        if self._streams and self._connection is not None:
            self._connection.stream = self.part

    def part(self, payload: bytes) -> None:
        """The first part of a stream, never empty. The others go to the listener at once."""
        self._lease.began()
        if (connection := self._connection) is not None and connection.stream is not None:
            connection.stream = partial(self._listener.arrived, self)
        self._listener.arrived(self, payload)

    def arrived(self, payload: bytes) -> None:
        if self._streams:
            self.part(payload)
            return
        self._size += len(payload)
        if self._size > LARGEST_ANSWER_BYTES:
            self.cancel()
            self._listener.broke(self, UpstreamError("The engine's answer is too large."))
            return
        self._parts.append(payload)

    def ended(self) -> None:
        """The connection is the pool's again."""
        head = self._head
        assert head is not None
        if self._streams:
            self._connection = None
            self._end()
            self._listener.ended(self)
        else:
            self.whole(head, self._parts[0] if len(self._parts) == 1 else b"".join(self._parts))

    def whole(self, head: AnswerHead, body: bytes) -> None:
        self._connection = None
        if not self.over:
            self.over = True
            self._lease.release()
        if head.status != 200:
            self._refused(head, body)
            return
        if head.is_stream:
            if body:
                self._listener.arrived(self, body)
            self._listener.ended(self)
            return
        self.exchange.carried = head.carried
        if head.is_json and not self.exchange.endpoint.bare:
            self._listener.whole(self, body)
        else:
            self._listener.whole(self, body, head.content_type or TEXT)

    def _refused(self, head: AnswerHead, body: bytes) -> None:
        self.did_nothing = True
        error: UpstreamError
        if head.status == 404 and b'"error"' not in body:
            path, variant = self.exchange.endpoint.path, self.replica.variant
            said = {
                "message": f"The engines of {variant} do not serve {path}.",
                "type": "invalid_request_error",
            }
            error = UpstreamRefusedError(404, {"error": said})
        elif head.status in _OUR_KEY:
            error = UpstreamError(
                f"The engine does not take the key that it is asked with (status {head.status}); whoever "
                "runs this gateway has to look at gateway.engine_key_env, and at the engine's URL in pools.",
                internal=self._where(
                    f"it refused our key with status {head.status} (gateway.engine_key_env)"
                ),
            )
        else:
            error = refusal(head.status, body)
        if 400 <= head.status < 500:
            self.replica.breaker.answered()
        else:
            self.replica.breaker.errored(self._blamed)
        if error.retry_after_s is None:
            error.retry_after_s = _retry_after(head)
        self._listener.broke(self, error)

    def lost(self, why: str, *, unread: bool) -> None:
        self._connection = None
        if unread:
            self.replica.connections.discard_idle()  # those beside it will have been closed as well
            self._never_reached(why, unread=True)
            return
        self._end()
        self.replica.breaker.errored()
        began = "in the middle of its answer" if self.exchange.begun else "before it answered"
        self._listener.broke(self, UpstreamError(f"The engine broke off {began}.", internal=self._where(why)))

    def _never_reached(self, why: str, *, unread: bool) -> None:
        self.did_nothing = True
        if not self._end():
            return
        if not unread:
            self.replica.breaker.not_reached()
        said = "closed the connection" if unread else "cannot be reached"
        self._listener.broke(self, NeverReachedError(f"The engine {said}.", internal=self._where(why)))

    def _where(self, why: str) -> str:
        return f"{self.replica.where}: {why}"

    def _end(self) -> bool:
        """Whether it had not ended before."""
        if self.over:
            return False
        self.over = True
        self._lease.release()
        return True


def _retry_after(head: AnswerHead) -> int | None:
    """The seconds that an engine wants to be left alone; None for what is no such number."""
    wait = head.get("retry-after") or ""
    return int(wait) if wait.isascii() and wait.isdigit() and len(wait) <= _LONGEST_WAIT_DIGITS else None
