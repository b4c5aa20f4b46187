"""What takes long to read is read like anything else, and holds nobody up."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
from typing import Any

import pytest
from gateway_stack import CHAT, Stack, eventually
from hypothesis import given
from test_body import OURS, bodies, same

from gateway.errors import BadRequestError, BodyTooLargeError
from gateway.proxy import large
from gateway.proxy.body import LARGEST_LENIENT_BYTES, LARGEST_READ_BYTES, Body, Reads
from gateway.proxy.fields import RequestFields
from gateway.proxy.large import SMALL_BYTES, LargeBody, LargeReader, quickly_read
from gateway.wire.requests import WHOLE_BYTES, Received

LIMIT = 32 << 20


async def read(received: Received, coding: str = "", reads: Reads = Reads.OPTIONS) -> Body:
    return await LargeReader().read(received, coding, LIMIT, reads)


def read_in_turns(raw: bytes) -> Body:
    """Although it is small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large, "quickly_read", lambda raw: False)
        return asyncio.run(read(raw))


def long(text: str, **asked: Any) -> dict[str, Any]:
    return {"model": "assistant", **asked, "messages": [{"role": "user", "content": text * (3 << 20)}]}


@given(bodies())
def test_it_is_the_same_body_however_it_is_read(raw: bytes) -> None:
    try:
        at_once = Body(raw)
    except BadRequestError:
        with pytest.raises(BadRequestError):
            read_in_turns(raw)
        return
    body = read_in_turns(raw)
    for name in RequestFields.__struct_fields__:
        read_at_once = getattr(at_once.fields, name)
        assert repr(getattr(body.fields, name)) == repr(read_at_once)  # NaN is another one
    assert set(body) == set(at_once)
    for name in body:
        assert same(body.get(name), at_once.get(name))
    assert same(json.loads(body.with_(OURS)), json.loads(at_once.with_(OURS)))
    first, last = body.parts(b',"cache_salt":1')
    assert same(json.loads(bytes(first) + last), json.loads(at_once.with_({"cache_salt": b"1"})))
    changes = {"store": b"false", "model": b'"other"'}
    changed, whole = body.changed(changes, Reads.OPTIONS), at_once.changed(changes, Reads.OPTIONS)
    assert same(json.loads(changed.json), json.loads(whole.json))
    assert (changed.get("store"), changed.get("model")) == (False, "other")
    assert same(json.loads(changed.with_(OURS)), json.loads(whole.with_(OURS)))


def test_an_engine_is_left_what_only_it_looks_at() -> None:
    """NaN, half characters and what is no JSON within a field: the engine says what it thinks of them."""
    for inner in (b"[NaN]", rb'["\ud83d"]', b"[tru]", b'{"a":[}}'):
        body = read_in_turns(b'{"model": "m", "messages": %b}' % inner)
        assert (body.fields.model, body.raw("messages")) == ("m", inner)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"[1]", "is an array; send a JSON object"),
        (b'"a"', "is a string; send a JSON object"),
        (b'{"model": "m"', r"not valid JSON \(it is cut off\)"),
        (b'{"model": "m"} x', r"not valid JSON \(something follows the object \(byte 15\)\)"),
        (b'{"a": %b}' % (b"[" * 5000), "nested too deeply"),
        (b"{%b}" % b",".join(b'"%d":1' % number for number in range(20_000)), "more than 10000 fields"),
        (b'{"model": [%b1]}' % (b"1," * LARGEST_READ_BYTES), "model: has "),
        (b'{"stream": [%b1]}' % (b"1," * LARGEST_READ_BYTES), "stream: has "),
        (b'\xff\xfe{\0"', "truncated data"),
        (b'{"a":[}]}', "not valid JSON"),
    ],
)
def test_what_cannot_be_read_is_refused(raw: bytes, says: str) -> None:
    with pytest.raises(BadRequestError, match=says):
        read_in_turns(raw)


@pytest.mark.parametrize("filled", [1, LARGEST_LENIENT_BYTES])
async def test_what_only_python_reads_passes_in_a_body_of_any_size(filled: int) -> None:
    """JavaScript writes halves of characters where it has cut a text within one."""
    for value in (
        r'"\ud83d"',
        r'"\ude00"',
        r'"\\\ud83d"',
        r'"\ud83d\ud83d"',
        r'"\ud83d\ude00\ude00"',
        "[NaN]",
    ):
        raw = b'{"model": "m", "messages": [%b, "%b"]}' % (value.encode(), b"x" * filled)
        body = await read(raw)
        assert body.fields.model == "m"
        assert same(json.loads(body.with_({})), json.loads(raw))


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("size", [LARGEST_LENIENT_BYTES, WHOLE_BYTES])
async def test_large_bodies_in_other_encodings_are_read_as_json(coding: str, size: int) -> None:
    """Without making objects of what is in them."""
    text = '{"model": "m", "messages": ["%s"]}' % ("é" * size)
    body = await read(text.encode(coding))
    assert (body.fields.model, body.json) == ("m", text.encode())


def test_only_what_is_needed_of_large_fields_is_read() -> None:
    raw = b'{"metadata": [%b1], "user": "u", "stream_options": 3}' % (b"1," * LARGEST_READ_BYTES)
    fields = read_in_turns(raw).fields
    assert (fields.metadata, fields.user, fields.stream) == (None, "u", None)


@pytest.mark.parametrize(
    ("prompt", "count"), [('["a", "b"]', 2), ("[[1, 2], [3]]", 2), ("[1, 2]", 1), ('"a"', 1), ("[]", 1)]
)
def test_prompts_are_counted_as_they_are_of_small_bodies(prompt: str, count: int) -> None:
    assert read_in_turns(b'{"prompt": %b}' % prompt.encode()).prompts == count


def test_what_is_quickly_read() -> None:
    """Of the same size, what is nearly nothing but structure is not."""
    assert quickly_read(b"[" * SMALL_BYTES)
    assert quickly_read(b"a" * (SMALL_BYTES * 8))
    assert not quickly_read(b"[" * (SMALL_BYTES * 8))
    assert not quickly_read(b"a" * (WHOLE_BYTES + 1))


@pytest.mark.parametrize("text", ["hello", "größe", '\n"\\', "漢"])
async def test_others_have_their_turn_while_a_large_body_is_read(text: str) -> None:
    raw = json.dumps(long(text), ensure_ascii=False).encode()
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(count())
    body = await read([raw[: len(raw) // 2], raw[len(raw) // 2 :]])
    task.cancel()
    assert isinstance(body, LargeBody)
    assert (body.fields.model, body.json) == ("assistant", raw)
    # The least that a megabyte takes, were each turn as long as it may be.
    assert turns > 5


async def test_those_that_are_read_at_once_take_turns_with_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A short one does not wait until a long one is done."""
    monkeypatch.setattr(large, "TURN_S", 0)  # a step a turn
    monkeypatch.setattr(large, "quickly_read", lambda raw: False)
    reader, order = LargeReader(), []

    async def one(raw: bytes) -> None:
        await reader.read(raw, "", LIMIT, Reads.OPTIONS)
        order.append(len(raw))

    bodies = [json.dumps({"messages": "a" * size}).encode() for size in (10 << 20, 1 << 20, 10)]
    await asyncio.gather(*map(one, bodies))
    assert order == [len(body) for body in reversed(bodies)]


async def test_compressed_bodies_are_bounded_and_read_alike() -> None:
    raw = json.dumps(long("a")).encode()
    body = await read(gzip.compress(raw), "gzip")
    assert (body.fields.model, body.json) == ("assistant", raw)
    with pytest.raises(BodyTooLargeError):
        await LargeReader().read(gzip.compress(raw), "gzip", 1 << 20, Reads.OPTIONS)
    assert (await read(gzip.compress(b'{"model": "m"}'), "gzip")).fields.model == "m"


@pytest.mark.parametrize("chunked", [False, True])
async def test_the_engine_gets_all_of_it_and_ours(stack: Stack, chunked: bool) -> None:
    """By parts that are sent as they are taken, and the connection is used again."""
    question = long("x" * 2, user="u", stream=True)
    raw = json.dumps(question).encode()

    async def parts() -> Any:
        for at in range(0, len(raw), 500_000):
            yield raw[at : at + 500_000]

    headers = {"content-type": "application/json"}
    for _ in range(2):
        sent = parts() if chunked else io.BytesIO(raw)
        async with stack.http.post(stack.url + CHAT, data=sent, headers=headers) as response:
            assert response.status == 200, await response.text()
            assert (await stack.events(response))[-1] == "[DONE]"
        asked = stack.asked("bf16")[-1]
        assert {name: asked[name] for name in question} == question
        assert asked["stream_options"]["include_usage"] is True
    assert stack.gateway.plane.intake.buffered == 0


async def test_a_large_request_that_is_left_ends_at_once(stack: Stack) -> None:
    """While it is read or sent: nothing of it is left."""
    raw = json.dumps(long("x")).encode()
    host, port = stack.url.removeprefix("http://").split(":")
    for _ in range(5):
        _, writer = await asyncio.open_connection(host, int(port))
        head = f"POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw)
        await writer.drain()
        writer.transport.abort()
    async with stack.post() as response:
        assert response.status == 200
    plane = stack.gateway.plane
    await eventually(lambda: not plane.active and plane.intake.connections <= 1)
    assert stack.gateway.plane.intake.buffered == 0
