"""vLLM engines over HTTP: bytes pass as they come, unbuffered.

No time limit on the whole answer alone: limits are on connecting, on the first byte and on silence. The
first event is awaited before the answer counts as begun, so that an engine that dies during prefill is
still a clean 502 for the client.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from gateway.errors import NeverReachedError, UpstreamError, UpstreamRefusedError
from gateway.proxy.endpoints import Form
from gateway.routing.pools import Replica
from gateway.telemetry.traces import carried
from gateway.upstream.options import changes_for_engine
from gateway.upstream.readers import refusal
from gateway.wire.engine import EngineConnection
from gateway.wire.heads import AnswerHead

if TYPE_CHECKING:
    from gateway.proxy.exchange import Exchange

LARGEST_ANSWER_BYTES = 256 << 20
PASSED_ON = ("traceparent", "tracestate", "baggage")
"""Headers of the client that engines are given: those of tracing, and none that authenticates."""


class EngineAttempt:
    """One request to one engine."""

    __slots__ = (
        "_connection",
        "_head",
        "_parts",
        "_request",
        "_size",
        "_work",
        "exchange",
        "over",
        "replica",
    )

    def __init__(self, exchange: Exchange, replica: Replica, request: bytes, work: float = 0.0) -> None:
        """``work``: blocks that it adds to the replica's queue, until its first token."""
        self.exchange = exchange
        self.replica = replica
        self._request = request
        self._connection: EngineConnection | None = None
        self._head: AnswerHead | None = None
        self._parts: list[bytes] = []
        self._size = 0
        self.over = False
        self._work = work
        replica.take(work)

    def start(self) -> None:
        """Send it, over a kept connection or else a new one."""
        if (connection := self.replica.connections.kept()) is not None:
            self._connection = connection
            connection.ask(self, self._request)
        else:
            self.exchange.spawn(self._connect())

    async def _connect(self) -> None:
        try:
            connection = await self.replica.connections.connect()
        except OSError as error:
            self._end()
            self._never_reached(f"{error!r}", stale=False)
            return
        if self.over:
            connection.close()
            return
        self._connection = connection
        connection.ask(self, self._request)
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
        if head.status == 200 and self.exchange.options.stream and self._connection is not None:
            self._connection.stream = self.part

    def part(self, payload: bytes) -> None:
        """The first part of a stream, never empty. The others go to the exchange at once."""
        if self._work:  # its first token is here
            self.replica.work -= self._work
            self._work = 0.0
        if (connection := self._connection) is not None and connection.stream is not None:
            connection.stream = partial(self.exchange.arrived, self)
        self.exchange.arrived(self, payload)

    def arrived(self, payload: bytes) -> None:
        if self._head is not None and self._head.status == 200 and self.exchange.options.stream:
            self.part(payload)
            return
        self._size += len(payload)
        if self._size > LARGEST_ANSWER_BYTES:
            self._fail(UpstreamError("The engine's answer is too large."))
            return
        self._parts.append(payload)

    def ended(self) -> None:
        """The connection is the pool's again."""
        assert self._head is not None
        if self._head.status == 200 and self.exchange.options.stream:
            self._connection = None
            self._end()
            self.exchange.ended(self)
        else:
            self.whole(self._head, self._parts[0] if len(self._parts) == 1 else b"".join(self._parts))

    def whole(self, head: AnswerHead, body: bytes) -> None:
        self._connection = None
        self._end()
        if head.status == 200 and self.exchange.options.stream:
            self.exchange.arrived(self, body)
            self.exchange.ended(self)
        elif head.status == 200:
            self.exchange.whole(self, body)
        else:
            self._refused(head, body)

    def _refused(self, head: AnswerHead, body: bytes) -> None:
        error = refusal(head.status, body)
        if head.status == 404 and b'"error"' not in body:
            path, variant = self.exchange.endpoint.path, self.replica.variant
            said = {
                "message": f"The engines of {variant} do not serve {path}.",
                "type": "invalid_request_error",
            }
            error = UpstreamRefusedError(404, {"error": said})
        if isinstance(error, UpstreamRefusedError):
            self.replica.breaker.answered()
            if error.retry_after_s is None and (wait := head.get("retry-after") or "").isdigit():
                error.retry_after_s = int(wait[:6])
        else:
            self.replica.breaker.answer_broke()
        self.exchange.broke(self, error)

    def lost(self, why: str, *, untouched: bool) -> None:
        self._connection = None
        self._end()
        if untouched:
            self._never_reached(why, stale=True)
            return
        self.replica.breaker.answer_broke()
        began = "in the middle of its answer" if self.exchange.begun else "before it answered"
        self.exchange.broke(self, UpstreamError(f"The engine broke off {began}.", internal=self._where(why)))

    def _never_reached(self, why: str, *, stale: bool) -> None:
        if not stale:
            self.replica.breaker.not_reached()
        said = "closed the connection" if stale else "cannot be reached"
        error = NeverReachedError(f"The engine {said}.", stale=stale, internal=self._where(why))
        self.exchange.snapshot.ask.again(self.exchange, self, error)

    def _fail(self, error: UpstreamError) -> None:
        self.cancel()
        self.exchange.broke(self, error)

    def _where(self, why: str) -> str:
        return f"{self.replica.name} at {self.replica.url}: {why}"

    def _end(self) -> bool:
        """Whether it had not ended before."""
        if self.over:
            return False
        self.over = True
        self.replica.release()
        self.replica.work -= self._work
        return True


def request_for(exchange: Exchange, replica: Replica) -> bytes:
    """The bytes of the request to an engine."""
    snapshot, endpoint, caller = exchange.snapshot, exchange.endpoint, exchange.caller
    changes: dict[str, bytes] = {}
    if endpoint.form is Form.COMPLETIONS and (exchange.options.stream or exchange.tapped is not None):
        tapped = exchange.tapped is not None
        changes = changes_for_engine(exchange.body, exchange.options, snapshot.config.quality, tapped=tapped)
    if caller is not None and caller.cache_salt:
        changes["cache_salt"] = b'"%b"' % caller.cache_salt.encode()
    if exchange.model != snapshot.model and exchange.model not in snapshot.config.adapters:
        changes["model"] = b'"%b"' % snapshot.model.encode()
    raw = exchange.body.with_(changes)
    given = exchange.head.headers
    if exchange.span is not None:
        given = {**given, **carried(exchange.span)}
    more = b""
    if not given.keys().isdisjoint(PASSED_ON):
        lines = [f"{name}: {given[name]}\r\n" for name in PASSED_ON if name in given]
        more = "".join(lines).encode("latin-1")
    return b"%bx-request-id: %b\r\n%bcontent-length: %d\r\n\r\n%b" % (
        replica.request_head(endpoint),
        exchange.request_id.encode(),
        more,
        len(raw),
        raw,
    )
