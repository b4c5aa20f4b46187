"""Engines that misbehave, byte by byte: the client gets a clean error, and nothing is sent twice."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import pytest
from gateway_stack import Stack, running_gateway
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.upstream.options import OutputOptions
from gateway.upstream.readers import NamedStreamReader, StreamReader

OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
ANSWER = json.dumps({"choices": [{"message": {"content": "hi"}}], "usage": {"completion_tokens": 1}}).encode()
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunked(*events: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in events)


def event(text: str) -> bytes:
    return b'data: {"choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n' % text.encode()


class Raw:
    """A server that answers every request with the same bytes."""

    def __init__(self, answer: bytes, *, close: bool) -> None:
        self.answer = answer
        self.close = close
        self.requests = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"GET"):
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
                    continue
                length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
                await reader.readexactly(length)
                self.requests += 1
                writer.write(self.answer)
                await writer.drain()
                if self.close:
                    break
        writer.close()


@asynccontextmanager
async def raw_engine(
    answer: bytes, *, close: bool = True, **limits: float
) -> AsyncIterator[tuple[Stack, Raw]]:
    """A gateway whose bf16 engine answers so. Its own probes and scrapes are answered too."""
    engine = Raw(answer, close=close)
    server = await asyncio.start_server(engine.serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    settings = {"first_byte_timeout_s": 1.0, "idle_timeout_s": 0.5, "health_interval_s": 60} | limits
    async with running_gateway(pools={"bf16": (url,)}, gateway=settings) as stack:
        yield stack, engine
    server.close()


FAULTS = [
    ("nothing", b"", 502),
    ("closes after the head", OK + b"content-length: 100\r\n\r\n", 502),
    ("closes within the head", OK[:30], 502),
    ("too short for its length", OK + b"content-length: 9999\r\n\r\n" + ANSWER, 502),
    ("no HTTP", b"SSH-2.0-OpenSSH_9.2\r\n\r\n", 502),
    ("two lengths", OK + b"content-length: 1\r\ncontent-length: 2\r\n\r\n" + ANSWER, 502),
    ("a chunk that lies", OK + b"transfer-encoding: chunked\r\n\r\nzz\r\n", 502),
    ("an endless head", b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000, 502),
    ("an error page", b"HTTP/1.1 500 Oops\r\ncontent-length: 4\r\n\r\noops", 502),
    ("no JSON", OK + b"content-length: 4\r\n\r\noops", 502),
    ("a list", OK + b"content-length: 2\r\n\r\n[]", 502),
    ("a refusal without words", b"HTTP/1.1 422 No\r\ncontent-length: 0\r\n\r\n", 422),
    ("too many requests", b"HTTP/1.1 429 No\r\nretry-after: 7\r\ncontent-length: 2\r\n\r\n{}", 429),
    ("until it closes", OK + b"\r\n" + ANSWER, 200),
    ("a preliminary answer", b"HTTP/1.1 103 Hints\r\nlink: x\r\n\r\n" + OK + b"\r\n" + ANSWER, 200),
]


@pytest.mark.parametrize(("name", "answer", "status"), FAULTS, ids=[fault[0] for fault in FAULTS])
async def test_whole_answers(name: str, answer: bytes, status: int) -> None:
    async with raw_engine(answer) as (stack, engine):
        async with stack.post() as response:
            assert response.status == status, name
            body = await response.json()
            if status != 200:
                assert set(body["error"]) == {"message", "type", "param", "code"}
            if status == 429:
                assert response.headers["retry-after"] == "7"
        assert engine.requests == 1, "asked once"
        assert all(replica.in_flight == 0 for replica in stack.gateway.plane.snapshot.pools.replicas())


async def test_bytes_after_an_answer_are_nobodys() -> None:
    """They might be taken for the next one's answer."""
    answer = OK + b"content-length: %d\r\n\r\n" % len(ANSWER) + ANSWER + OK + b"content-length: 2\r\n\r\n{}"
    async with raw_engine(answer, close=False) as (stack, engine):
        for _ in range(5):
            async with stack.post() as response:
                assert (await response.json())["choices"][0]["message"]["content"] == "hi"
        assert engine.requests == 5


STREAM_FAULTS = [
    ("ends without its end", STREAM + chunked(event("a")) + b"0\r\n\r\n", ["a"]),
    ("closes", STREAM + chunked(event("a"), event("b")), ["a", "b"]),
    ("closes within an event", STREAM + chunked(event("a"), event("b")[:20]), ["a"]),
    ("lies about a chunk", STREAM + chunked(event("a")) + b"5\r\nabcdefgh\r\n", ["a"]),
    ("sends no event", STREAM + chunked(event("a"), b"<html>\n\n"), ["a"]),
    ("sends broken JSON", STREAM + chunked(event("a"), b"data: {]\n\n"), ["a"]),
]


@pytest.mark.parametrize("sampled", [0, 1])
@pytest.mark.parametrize(("name", "answer", "said"), STREAM_FAULTS, ids=[fault[0] for fault in STREAM_FAULTS])
async def test_streams(name: str, answer: bytes, said: list[str], sampled: int) -> None:
    async with raw_engine(answer) as (stack, engine):
        stack.gateway.plane.snapshot.pipeline.attempts._sampled.share = float(sampled)
        async with stack.post({"stream": True}) as response:
            events = await stack.events(response)
        if response.status == 200:
            *parts, last = events
            if name != "sends broken JSON" or sampled:
                assert last["error"]["type"] == "upstream_error", name
            texts = [part["choices"][0]["delta"]["content"] for part in parts if "choices" in part]
            assert texts == said
        else:
            assert response.status == 502
        assert engine.requests == 1


async def test_an_engine_that_hangs_is_given_up() -> None:
    for answer in (b"", STREAM + chunked(event("a"))):
        async with raw_engine(answer, close=False) as (stack, _):
            async with stack.post({"stream": True}) as response:
                assert response.status == (200 if answer else 504)
                text = await response.text()
            assert "upstream_timeout" in text


def test_usage_is_cut_out_of_events_and_nothing_else_is() -> None:
    shown = b'data: {"id":"1","choices":[{"index":0,"delta":{"content":"say \\",\\"usage\\":{}}"}}]'
    usage = b',"usage":{"prompt_tokens":5,"completion_tokens":%d,"prompt_tokens_details":{"cached_tokens":1}}'
    wire = b"".join(shown + usage % n + b"}\n\n" for n in (1, 2, 3))
    last = b'data: {"id":"1","choices":[]' + usage % 3 + b"}\n\n"
    for cut in range(1, len(wire), 7):
        reader = StreamReader(OutputOptions(chat=True, stream=True))
        out = reader.feed(wire[:cut], 0.0) + reader.feed(wire[cut:] + last + b"data: [DONE]\n\n", 0.0)
        assert out == (shown + b"}\n\n") * 3 + b"data: [DONE]\n\n"
        assert (reader.prompt_tokens, reader.completion_tokens, reader.done) == (5, 3, True)
    reader = StreamReader(OutputOptions(chat=True, stream=True, include_usage=True))
    assert reader.feed(wire + last, 0.0) == (shown + b"}\n\n") * 3 + last
    reader = StreamReader(OutputOptions(chat=True, stream=True, include_usage=True, continuous_usage=True))
    assert reader.feed(wire, 0.0) == wire


def _shown(text: str) -> bytes:
    choice = {"index": 0, "delta": {"content": text}}
    return b'data: {"id":"1","choices":' + json.dumps([choice], separators=(",", ":")).encode()


EVENTS = st.one_of(
    st.builds(
        lambda text, usage: _shown(text) + usage + b"}\n\n",
        st.sampled_from(["a", "}}\n\n", ',"usage":{}', '"choices":[]', "data: [DONE]", 'data: {"error"']),
        st.sampled_from([
            b"",
            b',"usage":null',
            b',"usage":{"prompt_tokens":5,"completion_tokens":%d}' % 7,
            b',"usage":{"prompt_tokens":5,"completion_tokens":8,"prompt_tokens_details":{"cached_tokens":1}}',
        ]),
    ),
    st.sampled_from([
        b'data: {"id":"1","choices":[],"usage":{"prompt_tokens":5,"completion_tokens":9}}\n\n',
        b"data: [DONE]\n\n",
        b": still here\n\n",
        b'data: {"id":"2","usage":{"prompt_tokens":6,"completion_tokens":1},"choices":[{"index":0}]}\n\n',
        b'data: {"id":"1","choices":[{"index":0}],"usage":{"prompt_tokens":5,"completion_tokens":3}}\r\n\r\n',
    ]),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(EVENTS, max_size=8), st.lists(st.integers(0, 1000), max_size=3), st.booleans())
def test_a_stream_is_read_alike_however_it_arrives(
    events: list[bytes], cuts: list[int], include_usage: bool
) -> None:
    def read(parts: Iterable[bytes]) -> tuple[bytes, object]:
        reader = StreamReader(OutputOptions(chat=True, stream=True, include_usage=include_usage))
        out = b"".join([reader.feed(part, 0.0) for part in parts])
        return out, (reader.prompt_tokens, reader.completion_tokens, reader.chunks, reader.done)

    wire = b"".join(events)
    edges = [0, *sorted(cut % (len(wire) + 1) for cut in cuts), len(wire)]
    parts = [wire[start:end] for start, end in itertools.pairwise(edges)]
    assert read(parts) == read(events)


def test_events_in_other_spellings_are_read_too() -> None:
    reader = StreamReader(OutputOptions(chat=True, stream=True))
    odd = (
        b': ping\r\n\r\ndata: {"usage": {"completion_tokens": 2}, "choices": [{"index": 0}], "z": 1}\r\n\r\n'
    )
    assert json.loads(reader.feed(odd, 0.0).splitlines()[-2][6:]) == {"choices": [{"index": 0}], "z": 1}
    assert reader.completion_tokens == 2


def test_named_events() -> None:
    reader = NamedStreamReader()
    wire = (
        b'event: message_start\ndata: {"type":"message_start","message":{"usage":{"input_tokens":9}}}\n\n'
        b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":"a"}}\n\n'
        b'event: message_delta\ndata: {"type":"message_delta","usage":{"output_tokens":4}}\n\n'
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    )
    assert reader.feed(wire, 0.0) == wire
    assert (reader.prompt_tokens, reader.completion_tokens, reader.done) == (9, 4, True)
