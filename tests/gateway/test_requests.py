"""A client's bytes, read as requests: whatever pieces they come in."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.wire.flow import Admission, Intake
from gateway.wire.requests import WINDOW_BYTES, RequestReader


@dataclass
class Limits:
    max_connections: int = 1
    max_buffered_bytes: int = 1 << 30
    max_buffered_bytes_per_tenant: int = 1 << 30
    min_body_bytes_per_s: int = 0


def reader() -> RequestReader:
    return RequestReader(Intake(Limits))


def message(body: bytes, chunked: bool) -> bytes:
    if not chunked:
        return b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:7], body[7:]) if part)
    return b"\r\nPOST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n%b0\r\n\r\n" % chunks


class Requests:
    """What a connection makes of a reader: bodies, as far as they are whole."""

    def __init__(self) -> None:
        self.reader = reader()
        self.bodies: list[bytes] = []
        self.in_body = False
        self.looked_at = 0

    def come(self, data: bytes) -> None:
        self.reader.add(data)
        while self.reader.data:
            if not self.in_body:
                if not self.reader.read_head():
                    return
                head = self.reader.head
                assert head is not None
                body = self.reader.take_whole(head)
                if body is None:
                    self.reader.await_body(head, Admission("", 1 << 30))
                    self.in_body = True
                    continue
            else:
                received = self.reader.read_body()
                if received is None:
                    continue
                self.in_body = False
                body = received if isinstance(received, bytes) else b"".join(received)
            self.bodies.append(body)
            self.looked_at = max(self.looked_at, len(self.reader.data))


SIZES = st.one_of(st.integers(0, 40), st.sampled_from([1000, WINDOW_BYTES, 3 * WINDOW_BYTES]))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(SIZES, st.booleans()), min_size=1, max_size=60),
    st.lists(st.integers(1, 4 * WINDOW_BYTES), max_size=20),
)
def test_requests_are_the_same_in_whatever_pieces_they_come(
    wanted: list[tuple[int, bool]], cuts: list[int]
) -> None:
    bodies = [bytes([65 + number % 26]) * size for number, (size, _) in enumerate(wanted)]
    sent = b"".join(message(body, chunked) for body, (_, chunked) in zip(bodies, wanted, strict=True))
    found = Requests()
    for cut in cuts:
        found.come(sent[:cut])
        sent = sent[cut:]
    found.come(sent)
    assert found.bodies == bodies
    assert not found.reader.unread


def test_of_many_requests_at_once_only_a_window_is_looked_at() -> None:
    """To cut each from what is left of a megabyte took longer than to serve it."""
    found = Requests()
    sent = message(b"x" * 1000, chunked=False) * 4000
    for at in range(0, len(sent), 256 << 10):
        found.come(sent[at : at + (256 << 10)])
    assert found.bodies == [b"x" * 1000] * 4000
    assert found.looked_at <= 3 * WINDOW_BYTES


def test_what_waits_holds_little_more_than_what_is_counted() -> None:
    """A view of the last kilobytes would keep everything that they came with."""
    one = reader()
    one.add(message(b"x" * 1000, chunked=False) * 400)
    while one.unread > 4 * WINDOW_BYTES:
        assert one.read_head()
        assert one.head is not None
        assert one.take_whole(one.head) is not None
    held = one._later.obj
    assert isinstance(held, bytes)
    assert len(held) + len(one.data) <= 2 * one.unread
