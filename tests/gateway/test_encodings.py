"""Compressed requests: what they hold is what the engine gets, and a small one cannot become a large one."""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import zstandard
from gateway_stack import CHAT, Stack, running_gateway
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import BadRequestError, BodyTooLargeError, UnsupportedCodingError
from gateway.wire.encodings import decoded

LIMIT = 1 << 20


def bare(data: bytes) -> bytes:
    encoder = zlib.compressobj(wbits=-15)
    return encoder.compress(data) + encoder.flush()


ENCODERS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("gzip", gzip.compress),
    ("x-gzip", gzip.compress),
    ("GZIP", gzip.compress),
    ("deflate", zlib.compress),
    ("deflate", bare),
    ("zstd", zstandard.compress),
    ("zstd", lambda data: zstandard.ZstdCompressor(write_content_size=False).compress(data)),
    ("identity", bytes),
    ("identity, gzip", gzip.compress),
    ("", bytes),
]


@given(st.sampled_from(ENCODERS), st.binary(max_size=2000), st.integers(1, 50))
def test_every_coding_comes_back(
    encoder: tuple[str, Callable[[bytes], bytes]], part: bytes, times: int
) -> None:
    name, encode = encoder
    data = part * times
    assert decoded(encode(data), name, LIMIT) == data


def test_several_members_and_frames_are_one_body() -> None:
    assert decoded(gzip.compress(b"a") + gzip.compress(b"b"), "gzip", LIMIT) == b"ab"
    assert decoded(zstandard.compress(b"a") + zstandard.compress(b"b"), "zstd", LIMIT) == b"ab"


@pytest.mark.parametrize(("name", "encode"), [("gzip", gzip.compress), ("zstd", zstandard.compress)])
def test_members_are_bounded_in_number(name: str, encode: Callable[[bytes], bytes]) -> None:
    """What is left behind each was copied: of a hundred thousand empty ones that took minutes."""
    some = encode(b"a") * 512 + encode(b"") * 512
    assert decoded(some, name, LIMIT) == b"a" * 512
    with pytest.raises(BadRequestError, match="more than 1024 members"):
        decoded(some + encode(b""), name, LIMIT)
    with pytest.raises(BadRequestError, match="more than 1024 members"):
        decoded(encode(b"") * 100_000, name, LIMIT)


@pytest.mark.parametrize(("name", "encode"), [("gzip", gzip.compress), ("zstd", zstandard.compress)])
def test_each_byte_is_handed_to_decoders_once_but_for_a_windows_tail(
    name: str, encode: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted, since a decoder copies what of its input lies behind a member's end."""
    handed = 0

    class Counting:
        def __init__(self, decoder: Any) -> None:
            self._decoder = decoder

        def __getattr__(self, attribute: str) -> Any:
            return getattr(self._decoder, attribute)

        def decompress(self, data: memoryview, *more: int) -> bytes:
            nonlocal handed
            handed += len(data)
            part: bytes = self._decoder.decompress(data, *more)
            return part

        def decompressobj(self) -> Counting:
            return Counting(self._decoder.decompressobj())

    make, make_zstd = zlib.decompressobj, zstandard.ZstdDecompressor
    monkeypatch.setattr(zlib, "decompressobj", lambda bits: Counting(make(bits)))
    monkeypatch.setattr(zstandard, "ZstdDecompressor", lambda **given: Counting(make_zstd(**given)))
    part = random.Random(0).randbytes(10_000)
    members = [encode(b"a")] * 500 + [encode(part)] * 100
    body = b"".join(members)
    assert decoded(body, name, LIMIT) == b"a" * 500 + part * 100
    assert len(body) <= handed <= len(body) + len(members) * (64 << 10)
    handed = 0
    with pytest.raises(BadRequestError, match="more than 1024 members"):
        decoded(encode(b"") * 200_000, name, LIMIT)
    assert 0 < handed <= 1024 * (64 << 10)


def test_frames_of_zstd_that_hold_nothing_are_read_over() -> None:
    skipped = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
    frame = zstandard.compress
    assert decoded(skipped + frame(b"a") + skipped + frame(b"") + frame(b"b") + skipped, "zstd", 2) == b"ab"
    for cut in (frame(b"a") + skipped[:-1], skipped + frame(b"a")[:-1]):
        with pytest.raises(BadRequestError, match="cut off"):
            decoded(cut, "zstd", LIMIT)


@pytest.mark.parametrize(("name", "encode"), ENCODERS[:7])
def test_a_body_of_many_windows_comes_back(name: str, encode: Callable[[bytes], bytes]) -> None:
    noise = random.Random(0).randbytes(400_000)
    assert decoded(encode(noise), name, LIMIT) == noise
    if name in ("gzip", "zstd"):
        assert decoded(encode(noise) + encode(noise[:70_000]), name, LIMIT) == noise + noise[:70_000]
    with pytest.raises(BadRequestError, match="is not "):
        decoded(encode(noise)[:-1], name, LIMIT)


@pytest.mark.parametrize(("name", "encode"), ENCODERS[:7])
def test_the_limit_is_one_of_the_decoded_body(name: str, encode: Callable[[bytes], bytes]) -> None:
    fits, over = encode(b"a" * LIMIT), encode(b"a" * (LIMIT + 1))
    assert len(decoded(fits, name, LIMIT)) == LIMIT
    with pytest.raises(BodyTooLargeError, match=r"gateway\.max_body_bytes"):
        decoded(over, name, LIMIT)


@pytest.mark.parametrize("name", ["gzip", "deflate", "zstd"])
def test_a_bomb_is_never_made(name: str) -> None:
    encode = dict(ENCODERS)[name]
    bomb = encode(bytes(200 << 20))
    assert len(bomb) < LIMIT
    tracemalloc.start()
    with pytest.raises(BodyTooLargeError):
        decoded(bomb, name, LIMIT)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 8 * LIMIT


@given(st.sampled_from(ENCODERS[:7]), st.binary(min_size=1, max_size=300), st.data())
def test_a_body_that_is_cut_off_or_followed_by_something_is_refused(
    encoder: tuple[str, Callable[[bytes], bytes]], data: bytes, draw: st.DataObject
) -> None:
    name, encode = encoder
    whole = encode(data)
    cut = draw.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(BadRequestError, match="is not "):
        decoded(whole[:cut], name, LIMIT)
    with pytest.raises(BadRequestError, match="is not "):
        decoded(whole + b"{}", name, LIMIT)


@given(st.sampled_from(["gzip", "deflate", "zstd"]), st.binary(max_size=300))
def test_nothing_that_is_sent_is_more_than_a_refusal(name: str, noise: bytes) -> None:
    with contextlib.suppress(BadRequestError):
        assert len(decoded(noise, name, LIMIT)) <= LIMIT


@pytest.mark.parametrize("name", ["br", "compress", "gzip, gzip", "x-zip", "gzip;q=1"])
def test_unknown_codings_are_named_beside_the_known_ones(name: str) -> None:
    with pytest.raises(UnsupportedCodingError, match="use one of gzip, deflate, zstd, identity"):
        decoded(b"", name, LIMIT)


async def test_the_engine_gets_what_was_compressed(stack: Stack) -> None:
    body = json.dumps({"model": "assistant", "messages": [{"role": "user", "content": "hi"}]}).encode()
    for name, encode in ENCODERS[:7]:
        headers = {"content-type": "application/json", "content-encoding": name}
        async with stack.http.post(stack.url + CHAT, data=encode(body), headers=headers) as response:
            assert response.status == 200, name
        assert stack.asked("bf16")[-1]["messages"][0]["content"] == "hi"
    headers = {"content-type": "application/json", "content-encoding": "br"}
    async with stack.http.post(stack.url + CHAT, data=body, headers=headers) as response:
        assert response.status == 415
        assert (await response.json())["error"]["param"] == "content-encoding"


async def test_the_limit_of_a_compressed_request_names_its_setting() -> None:
    async with running_gateway(gateway={"max_body_bytes": 4096}) as stack:
        headers = {"content-type": "application/json", "content-encoding": "gzip"}
        bomb = gzip.compress(b'{"model": "' + b"a" * 100_000 + b'"}')
        async with stack.http.post(stack.url + CHAT, data=bomb, headers=headers) as response:
            assert response.status == 413
            assert "gateway.max_body_bytes" in (await response.json())["error"]["message"]
