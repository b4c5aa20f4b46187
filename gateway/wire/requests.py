"""A client's bytes, read as requests: what has come of the present one, and what waits behind it."""

from __future__ import annotations

import re
from typing import cast

from gateway.errors import BodyTooLargeError, GatewayError, MalformedRequestError
from gateway.wire.bodies import Body, body_of
from gateway.wire.flow import UNCOUNTED_BYTES, UNKNOWN, Admission, Intake, Reservation
from gateway.wire.heads import CHUNKED, END, LONGEST_HEAD_BYTES, RequestHead, parse_request

Received = bytes | list[bytes]
"""A body; in the parts in which it came where it is so large that joining them would hold others up."""
WHOLE_BYTES = 1 << 20
"""A body of up to so much is handed on as a whole."""
PART_BYTES = 64 << 10
"""A part of a large body has at least so much, but for the last one: parts cost memory of their own."""
LARGE_HEAD_BYTES = 4 << 10
"""A head of more is not kept on a connection that waits for the next request."""
WINDOW_BYTES = 16 << 10
"""Of many requests that have come at once so much is looked at; to cut each from all that is left would take
longer the more they are."""
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,18})\r\n", re.IGNORECASE)
_EMPTY_LINES = re.compile(rb"(?:\r\n)+")


class RequestReader:
    """``head`` is the present request's, or the last one's; None while it is not whole. ``data``: what has
    come and is not read yet, or its beginning: it is empty only where there is nothing."""

    __slots__ = (
        "_backlog",
        "_body",
        "_head_size",
        "_later",
        "_part",
        "_parts",
        "admission",
        "data",
        "head",
        "held",
        "is_head",
        "prefix",
        "received",
        "suffix",
    )

    def __init__(self, intake: Intake) -> None:
        self.data = b""
        self._later = memoryview(b"")
        """What comes behind ``data``."""
        self._backlog = Reservation(intake)
        self.head: RequestHead | None = None
        self._head_size = 0
        self.is_head = False
        """The request's method is HEAD, as far as is known."""
        self.admission = Admission("", 0)
        self._body: Body | None = None
        self._parts: list[bytes] = []
        self._part = bytearray()
        """The last one, while it is small."""
        self.received = 0
        """Bytes of the present body."""
        self.held = Reservation(intake)
        """Room for the request's body, until it is answered."""
        self.prefix = b""
        """The last request's head up to its length, and what follows that."""
        self.suffix = b""

    def add(self, data: bytes) -> None:
        """It has come."""
        if self._later:
            self._later = memoryview(bytes(self._later) + data)
        else:
            self.data = self.data + data if self.data else data

    @property
    def unread(self) -> int:
        """Bytes."""
        return len(self.data) + len(self._later)

    def _take(self, size: int) -> None:
        """So much of ``data`` has been read."""
        rest = len(self.data) - size
        if rest > 2 * WINDOW_BYTES:
            view = memoryview(self.data)[size:]
            if self._later:
                view = memoryview(b"".join((view, self._later)))
            self.data, self._later = bytes(view[:WINDOW_BYTES]), view[WINDOW_BYTES:]
        else:
            self.data = self.data[size:]
            if not rest:
                self._look_further()

    def _look_further(self, size: int = WINDOW_BYTES) -> bool:
        """Have so much more in ``data``, if it is there. Whether anything is."""
        later = self._later
        if not later:
            return False
        self.data += later[:size]
        rest = later[size:]
        # A view keeps all of what it is a view of: what is counted is to be what is held.
        self._later = memoryview(bytes(rest)) if 2 * len(rest) < len(cast(bytes, later.obj)) else rest
        return True

    def read_head(self) -> bool:
        """Whether the head is whole now; then it is ``head``. Raises MalformedRequestError."""
        while not (whole := self._read_head()) and self._look_further():
            pass
        return whole

    def _read_head(self) -> bool:
        data = self.data
        if data.startswith(b"\r\n"):  # empty lines before a request are to be read over
            lines = _EMPTY_LINES.match(data)
            data = self.data = data[lines.end() :] if lines else data
        end = data.find(END, 0, LONGEST_HEAD_BYTES)
        self.head = None
        self.is_head = data.startswith(b"HEAD ")
        if end < 0:
            if len(data) > LONGEST_HEAD_BYTES:
                raise MalformedRequestError(
                    f"The head is longer than {LONGEST_HEAD_BYTES} bytes; send fewer or shorter headers.",
                    status=431,
                )
            return False
        self.prefix = b""
        head = self.head = parse_request(data[:end])
        self._head_size = end
        self._take(end + 4)
        if head.length > 0 and not head.waits_for_continue:
            # A client's requests mostly differ in their length alone: then the rest is not read again (and
            # ``content-length`` among the headers is the first one's).
            at = _LENGTH.search(data, 0, end + 4)
            if at is not None:
                self.prefix, self.suffix = data[: at.start(1)], data[at.end(1) : end + 4]
        return True

    @property
    def begun(self) -> bool:
        """Whether something of a head has come."""
        return self.data not in (b"", b"\r")

    def take_whole(self, head: RequestHead) -> bytes | None:
        """The request's body, if all of it is here."""
        length, data = head.length, self.data
        if length > len(data) and self._look_further(length - len(data) + WINDOW_BYTES):
            data = self.data
        if not 0 <= length <= len(data):
            return None
        self._take(length)
        return data[:length]

    def admit(self, admission: Admission, size: int) -> None:
        """All of the body has come at once, of ``size`` bytes. Raises BodyTooLargeError, and what
        ``Intake.reserve`` raises."""
        self.admission = admission
        if size > admission.max_body_bytes:
            raise _too_large(admission)
        if size > UNCOUNTED_BYTES:
            self.held.resize(admission.tenant, size)

    def grow(self, size: int) -> None:
        """What has become of the body takes ``size`` bytes: hold room for so much until it is answered.
        Raises what ``Intake.reserve`` raises, and then the body must be dropped."""
        if size > max(UNCOUNTED_BYTES, self.held.size):
            self.held.resize(self.admission.tenant, size)

    def await_body(self, head: RequestHead, admission: Admission) -> None:
        """The body is to come. Raises BodyTooLargeError."""
        self.admission = admission
        if head.length != CHUNKED and head.length > admission.max_body_bytes:
            raise _too_large(admission)
        self._body = body_of(head.length)

    def read_body(self) -> Received | None:
        """The whole body, once it has come. Raises MalformedRequestError, BodyTooLargeError, and what
        ``Intake.reserve`` raises."""
        body = self._body
        assert body is not None
        self._look_further(len(self._later))
        try:
            part = body.feed(self.data)
        except ValueError as error:
            raise MalformedRequestError(f"The body is not chunked as it should be: {error}.") from None
        self.data = body.rest
        self.received += len(part)
        if self.received > self.admission.max_body_bytes:
            raise _too_large(self.admission)
        self.held.resize(self.admission.tenant, self.received)
        if len(part) < PART_BYTES:
            self._part += part
            if len(self._part) >= PART_BYTES:
                self._end_part()
        else:
            self._end_part()
            self._parts.append(part)
        if not body.done:
            return None
        self._take(0)
        self._end_part()
        parts, large = self._parts, self.received > WHOLE_BYTES
        self._body, self._parts, self.received = None, [], 0
        return parts if large else b"".join(parts)

    def _end_part(self) -> None:
        if self._part:
            self._parts.append(bytes(self._part))
            self._part = bytearray()

    def count(self, *, answering: bool) -> None:
        """Count what waits in ``data``: behind a request that is being answered, or to become one. Raises
        what ``Intake.reserve`` raises, and then it is dropped."""
        try:
            self._backlog.resize(self.admission.tenant if answering else UNKNOWN, self.unread)
        except GatewayError:
            self._forget()
            raise

    @property
    def waits(self) -> bool:
        return bool(self.data or self._backlog.size)

    def forget_large_head(self) -> None:
        """Keep no large head of an answered request: clients may leave many connections open."""
        head = self.head
        if head is not None and self._head_size > LARGE_HEAD_BYTES:
            self.head, self.prefix, self.suffix = None, b"", b""

    def drop(self) -> None:
        """Keep nothing of what has come."""
        self._forget()
        self._body, self.prefix = None, b""
        self._parts, self._part, self.received = [], bytearray(), 0
        self._backlog.release()
        self.held.release()

    def _forget(self) -> None:
        self.data, self._later = b"", memoryview(b"")


def _too_large(admission: Admission) -> BodyTooLargeError:
    return BodyTooLargeError(
        f"The body is larger than the {admission.max_body_bytes} bytes that it may have "
        f"({admission.setting}); send less."
    )
