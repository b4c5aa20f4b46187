"""Heads and bodies: what is read, whatever pieces it comes in, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import MalformedRequestError
from gateway.wire.bodies import LAST_CHUNK, ChunkedBody, LengthBody, chunk
from gateway.wire.heads import CHUNKED, UNTIL_CLOSE, parse_answer, parse_request

HOST = b"host: a\r\n"


def head(*lines: bytes, first: bytes = b"POST /v1/chat/completions HTTP/1.1") -> bytes:
    return b"\r\n".join([first, b"host: a", *lines])


def test_a_request() -> None:
    found = parse_request(
        head(b"Content-Length:  12 ", b"X-Two: a", b"x-two: b", first=b"POST /a?b=c HTTP/1.1")
    )
    assert (found.method, found.path, found.query, found.length) == ("POST", "/a", "b=c", 12)
    assert found.headers["x-two"] == "a, b"
    assert found.keep_alive
    assert parse_request(head(b"transfer-encoding: Chunked")).length == CHUNKED
    assert parse_request(head()).length == 0
    assert not parse_request(head(b"connection: keep-alive, Close")).keep_alive
    old = parse_request(b"GET / HTTP/1.0")
    assert (old.keep_alive, old.http_1_0) == (False, True)
    assert parse_request(b"GET / HTTP/1.0\r\nconnection: Keep-Alive").keep_alive
    assert parse_request(head(first=b"GET http://a/v1/models HTTP/1.1")).path == "/v1/models"
    assert parse_request(head(b"expect: 100-Continue")).waits_for_continue


BAD_HEADS = [  # each of these, two servers in a row might read in two ways, or one of them not at all
    (head(b"content-length: 1", b"content-length: 2"), 400, "content-length: comes twice"),
    (head(b"content-length: 1", b"content-length: 1"), 400, "content-length: comes twice"),
    (head(b"content-length: 1", b"transfer-encoding: chunked"), 400, "contradict"),
    (head(b"transfer-encoding: gzip, chunked"), 501, "is not known"),
    (head(b"transfer-encoding: chunked", b"transfer-encoding: identity"), 400, "comes twice"),
    (head(b"transfer-encoding: xchunked"), 501, "is not known"),
    (head(b"content-length: +5"), 400, "is no length"),
    (head(b"content-length: 5, 5"), 400, "is no length"),
    (head(b"content-length: 0x5"), 400, "is no length"),
    (head(b"content-length: -1"), 400, "is no length"),
    (head(b"content-length: 1_0"), 400, "is no length"),
    (head(b"content-length: \xb2"), 400, "is no length"),
    (head(b"content-length: " + b"9" * 30), 400, "is no length"),
    (head(b"content-length : 5"), 400, "characters that no name may have"),
    (head(b" folded"), 400, "is not `name: value`"),
    (head(b"x: a", b" folded: b"), 400, "characters that no name may have"),
    (head(b": nameless"), 400, "is not `name: value`"),
    (head(b"no colon"), 400, "is not `name: value`"),
    (head(b"x: a\nb: c"), 400, "bare line ends"),
    (head(b"x: a\rb"), 400, "bare line ends"),
    (head(b"x: a\x00b"), 400, "control characters"),
    (head(b"host: b"), 400, "host: comes twice"),
    (b"POST / HTTP/1.1", 400, "host: is missing"),
    (head(first=b"POST /"), 400, "is not `METHOD target HTTP/1.1`"),
    (head(first=b"POST  / HTTP/1.1"), 400, "is not `METHOD target HTTP/1.1`"),
    (head(first=b"POST /a b HTTP/1.1"), 400, "is not `METHOD target HTTP/1.1`"),
    (head(first=b"POST / HTTP/2.0"), 505, "is not HTTP/1.1"),
    (head(first=b"PO(ST / HTTP/1.1"), 400, "is not a word"),
    (head(first=b"POST evil HTTP/1.1"), 400, "is no path"),
    (head(b"expect: 200-ok"), 417, "is not 100-continue"),
    (b"POST / HTTP/1.0\r\ntransfer-encoding: chunked", 400, "does not exist in HTTP/1.0"),
    (head(*[b"x-%d: a" % n for n in range(200)]), 431, "send at most"),
]


@pytest.mark.parametrize(("raw", "status", "says"), BAD_HEADS)
def test_a_bad_request(raw: bytes, status: int, says: str) -> None:
    with pytest.raises(MalformedRequestError) as caught:
        parse_request(raw)
    assert caught.value.status == status
    assert says in caught.value.message


def test_an_answer() -> None:
    found = parse_answer(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX: y")
    assert (found.status, found.length, found.keep_alive, found.get("x")) == (200, 5, True, "y")
    assert parse_answer(b"HTTP/1.1 200\r\nTransfer-Encoding: chunked").length == CHUNKED
    assert parse_answer(b"HTTP/1.1 204 No Content").length == 0
    broken = parse_answer(b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 2")
    assert not broken.keep_alive, "servers close behind it and do not say so"
    closing = parse_answer(b"HTTP/1.1 200 OK\r\nserver: x")
    assert (closing.length, closing.keep_alive) == (UNTIL_CLOSE, False)
    for bad in (
        b"HTTP/2 200 OK",
        b"SSH-2.0-OpenSSH",
        b"HTTP/1.1 2x0 OK",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked",
        b"HTTP/1.1 200 OK\r\ncontent-length: -5",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip",
    ):
        with pytest.raises(ValueError, match=r"is no|framed|twice"):
            parse_answer(bad)


@given(st.binary(max_size=300))
def test_any_head_is_read_or_refused(raw: bytes) -> None:
    for parse, refusal in ((parse_request, MalformedRequestError), (parse_answer, ValueError)):
        try:
            parse(raw)
        except refusal:
            continue


@given(
    st.lists(st.binary(min_size=1, max_size=400), max_size=8),
    st.lists(st.integers(1, 50), max_size=60),
    st.binary(max_size=20),
    st.sampled_from([b"", b"x: y\r\n", b"a: b\r\nc:d\r\n", b"Digest:\t\xc3\xa9 \r\nx:\r\nx: y\r\n"]),
)
def test_chunks_in_any_pieces(payloads: list[bytes], cuts: list[int], rest: bytes, trailers: bytes) -> None:
    wire = b"".join(map(chunk, payloads)) + b"0\r\n" + trailers + b"\r\n" + rest
    body, got = ChunkedBody(), b""
    while wire and not body.done:
        size = cuts.pop() if cuts else len(wire)
        got += body.feed(wire[:size])
        wire = wire[size:]
    assert body.done
    assert got == b"".join(payloads)
    assert body.rest + wire == rest


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=20))
def test_any_chunks_are_read_or_refused(pieces: list[bytes]) -> None:
    body = ChunkedBody()
    try:
        for piece in pieces:
            body.feed(piece)
    except ValueError:
        pass


@pytest.mark.parametrize(
    "wire",
    [
        b"5\r\nhelloX\r\n",
        b"5\r\nhello!!",
        b"0x5\r\nhello\r\n",
        b"+5\r\nhello\r\n",
        b"-5\r\nhello\r\n",
        b"1_0\r\nhello\r\n",
        b" 5\r\nhello\r\n",
        b"\r\nhello",
        b"5\nhello\r\n",
        b";x\r\nhello\r\n",
        b"f" * 300,
        b"f" * 16 + b"\r\n",
        b"5\n;\r\nhello\r\n",
    ],
)
def test_bad_chunks(wire: bytes) -> None:
    def read_in_pieces_of(size: int) -> None:
        body = ChunkedBody()
        for at in range(0, len(wire), size):
            body.feed(wire[at : at + size])
        body.feed(b"\r\n" * 200)

    for size in (1, 3, len(wire)):
        with pytest.raises(ValueError, match="chunk"):
            read_in_pieces_of(size)


@pytest.mark.parametrize(
    "trailers",
    [
        b"x: y\n\nGET /version HTTP/1.1\r\nhost: a\r\n\r\n",  # some servers end them at the empty line
        b"GET /version HTTP/1.1\r\n\r\n",
        b"x: y\rz\r\n\r\n",
        b"x: \0\r\n\r\n",
        b" folded: y\r\n\r\n",
        b": y\r\n\r\n",
        b"x : y\r\n\r\n",
        b"x: y\r\n folded\r\n\r\n",
        b"x: y\nz: y\r\n\r\n",
    ],
)
def test_trailers_are_held_to_the_rules_of_heads(trailers: bytes) -> None:
    def read_in_pieces_of(size: int) -> None:
        body = ChunkedBody()
        body.feed(b"5\r\nhello\r\n0\r\n")
        for at in range(0, len(trailers), size):
            body.feed(trailers[at : at + size])

    for size in (1, len(trailers)):
        with pytest.raises(ValueError, match="its trailers are no headers"):
            read_in_pieces_of(size)


@pytest.mark.parametrize("extension", [b"x\ry", b"x=\0", b"x=\x7f", b"x\ny", b"\r"])
def test_extensions_of_chunks_have_no_control_characters(extension: bytes) -> None:
    for size in (b"5", b"0"):
        with pytest.raises(ValueError, match="control characters"):
            ChunkedBody().feed(b"%b;%b\r\nhello\r\n" % (size, extension))


def test_extensions_of_chunks_are_read_over() -> None:
    body = ChunkedBody()
    assert body.feed(b'5;name="x"\r\nhello\r\n' + LAST_CHUNK + b"next") == b"hello"
    assert (body.done, body.rest) == (True, b"next")
    body = ChunkedBody()
    assert body.feed(b'5 ;\tname = "\xc3\xa9"\r\nhello\r\n0;last\r\n\r\n') == b"hello"
    assert body.done


def test_a_length() -> None:
    body = LengthBody(5)
    assert (body.feed(b"hel"), body.done) == (b"hel", False)
    assert (body.feed(b"loPOST"), body.done, body.rest) == (b"lo", True, b"POST")
