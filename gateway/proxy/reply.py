"""What the client is sent: heads, the parts of a stream, errors in the form of the endpoint."""

from __future__ import annotations

import time
from email.utils import formatdate

from gateway.errors import GatewayError
from gateway.proxy.endpoints import Form
from gateway.proxy.exchange import Exchange
from gateway.routing.router import Route
from gateway.wire.client import STATUS_LINES
from tiercel_agents.headers import REASON_HEADER, REPLICA_HEADER, VARIANT_HEADER

JSON = b"application/json"
EVENT_STREAM = b"text/event-stream; charset=utf-8"
_UNBUFFERED = b"cache-control: no-cache\r\nx-accel-buffering: no\r\n"
MOST_GAPS = 10_000
"""Of one stream, that its inter-token latencies are taken from."""
_MOST_HEADS = 4096
_COLON = ord(":")


class Reply:
    """Writes answers. Most of an answer's head is the same for all answers of a route within a second."""

    def __init__(self) -> None:
        self._date = b""
        self._second = -1
        self._heads: dict[tuple[bytes, str, str, str] | bytes, bytes] = {}

    def date(self) -> bytes:
        """The header line of the present second."""
        now = int(time.time())
        if now != self._second:
            self._second = now
            self._date = b"date: " + formatdate(now, usegmt=True).encode() + b"\r\n"
            self._heads.clear()
        return self._date

    def whole(self, exchange: Exchange, body: bytes, content_type: bytes = JSON) -> None:
        """An answer that is not streamed."""
        exchange.begun = True
        exchange.client.send_whole(self._ok(exchange, content_type) + exchange.carried, body)

    def part(self, exchange: Exchange, out: bytes, now: float) -> None:
        """A part of a stream, never empty."""
        gaps = exchange.gaps
        if out[0] == _COLON and only_comments(out):
            pass
        elif gaps is None:
            exchange.first_at = exchange.last_at = now
            exchange.gaps = []
        elif len(gaps) < MOST_GAPS:
            gaps.append(now - exchange.last_at)
            exchange.last_at = now
        if not exchange.begun:
            exchange.begun = True
            exchange.client.begin(self._ok(exchange, EVENT_STREAM) + _UNBUFFERED, out)
        elif exchange.client.old:
            exchange.client.send(out)
        else:
            exchange.client.transport.write(b"%x\r\n%b\r\n" % (len(out), out))

    def end(self, exchange: Exchange) -> None:
        """The end of a stream."""
        if not exchange.begun:
            exchange.begun = True
            exchange.client.begin(self._ok(exchange, EVENT_STREAM) + _UNBUFFERED, b"")
        exchange.client.end()

    def error(self, exchange: Exchange, error: GatewayError) -> None:
        """An error: a status, or the last event of a stream that breaks off."""
        held = exchange.reader.flush() if exchange.reader is not None else b""
        if held and not exchange.begun and exchange.options.stream:
            self.part(exchange, held, exchange.heard_at)
            held = b""
        if exchange.begun:
            exchange.client.end(held + exchange.endpoint.error_event(error))
            return
        head = self._head(exchange, error.status, JSON)
        if error.retry_after_s is not None:
            head += b"retry-after: %d\r\n" % error.retry_after_s
        if error.retry_after_ms is not None:
            head += b"retry-after-ms: %d\r\n" % error.retry_after_ms
        if error.status == 401:
            head += b"www-authenticate: Bearer\r\n"
        exchange.client.send_whole(head, exchange.endpoint.error_body(error))

    def _ok(self, exchange: Exchange, content_type: bytes) -> bytes:
        route, now = exchange.route, int(time.time())
        if now != self._second:
            self.date()  # and all heads begin anew
        key: tuple[bytes, str, str, str] | bytes = content_type
        if route is not None:
            key = (content_type, route.variant, route.replica.name, route.reason)
        head = self._heads.get(key)
        if head is None:
            head = b"%b%bcontent-type: %b\r\n%b" % (
                STATUS_LINES[200],
                self._date,
                content_type,
                _placed(route),
            )
            if len(self._heads) < _MOST_HEADS:
                self._heads[key] = head
        identity, more = exchange.request_id.encode(), exchange.head.memo.more
        if exchange.endpoint.form is Form.ANTHROPIC:
            return b"%b%b%b" % (head, exchange.endpoint.id_lines(identity), more)
        return b"%bx-request-id: %b\r\n%b" % (head, identity, more)

    def _head(self, exchange: Exchange, status: int, content_type: bytes) -> bytes:
        line = STATUS_LINES.get(status) or b"HTTP/1.1 %d Error\r\n" % status
        placed = _placed(exchange.route)
        return b"%b%bcontent-type: %b\r\n%b%b" % (line, self.date(), content_type, placed, _ids(exchange))


def _ids(exchange: Exchange) -> bytes:
    """The lines that are this request's own."""
    lines = exchange.endpoint.id_lines(exchange.request_id.encode())
    admitted = exchange.head.memo
    return lines if admitted is None else lines + bytes(admitted.more)


def _placed(route: Route | None) -> bytes:
    """The header lines that say where a request went, and why."""
    if route is None:
        return b""
    return (
        f"{VARIANT_HEADER}: {route.variant}\r\n{REPLICA_HEADER}: {route.replica.name}\r\n"
        f"{REASON_HEADER}: {route.reason}\r\n"
    ).encode("latin-1", "replace")


def only_comments(events: bytes) -> bool:
    """Whether whole server-sent events say nothing: engines keep connections alive by comments."""
    if not events.startswith(b":") or not events.endswith(b"\n\n"):
        return False
    return all(line.startswith(b":") for line in events.splitlines() if line)
