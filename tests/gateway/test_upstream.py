"""Engines that misbehave, byte by byte: the client gets a clean error, and nothing is sent twice."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from gateway_stack import Stack, running_gateway

from gateway.config import ApiKey
from gateway.identity import hash_of

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
        self.head = self.body = b""
        """Of the last request."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"GET"):
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
                    continue
                length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
                self.body = await reader.readexactly(length)
                self.requests += 1
                self.head = head
                writer.write(self.answer)
                await writer.drain()
                if self.close:
                    break
        writer.close()


@asynccontextmanager
async def raw_engine(
    answer: bytes, *, close: bool = True, keys: Sequence[ApiKey] = (), **limits: float | str
) -> AsyncIterator[tuple[Stack, Raw]]:
    """A gateway whose bf16 engine answers so. Its own probes and scrapes are answered too."""
    engine = Raw(answer, close=close)
    server = await asyncio.start_server(engine.serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    settings = {"first_byte_timeout_s": 1.0, "idle_timeout_s": 0.5, "health_interval_s": 60} | limits
    try:
        async with running_gateway(pools={"bf16": (url,)}, gateway=settings, keys=keys) as stack:
            yield stack, engine
    finally:
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
    ("a status that is ours alone", b"HTTP/1.1 499 Gone\r\ncontent-length: 2\r\n\r\n{}", 502),
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
            assert last["error"]["type"] == "upstream_error", name
            texts = [part["choices"][0]["delta"]["content"] for part in parts if "choices" in part]
            assert texts == said
        else:
            assert response.status == 502
        assert engine.requests == 1


async def test_an_engine_that_hangs_is_given_up() -> None:
    for answer in (b"", STREAM + chunked(event("a"))):
        # It hangs as well when the stopping gateway asks for the count of the prompt.
        async with raw_engine(answer, close=False, shutdown_timeout_s=0.1) as (stack, _):
            async with stack.post({"stream": True}) as response:
                assert response.status == (200 if answer else 504)
                text = await response.text()
            assert "upstream_timeout" in text


async def test_an_answer_is_read_as_what_it_is() -> None:
    """Not as what was asked for: an engine may answer a request for a stream with one object."""
    whole = OK + b"content-length: %d\r\n\r\n" % len(ANSWER) + ANSWER
    async with raw_engine(whole) as (stack, _), stack.post({"stream": True}) as response:
        assert (response.status, response.content_type) == (200, "application/json")
        assert (await response.json())["choices"][0]["message"]["content"] == "hi"
    binary = (
        b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ncontent-length: 3\r\n\r\n\x00\xff{"
    )
    async with raw_engine(binary) as (stack, _):
        body = {"model": "assistant", "input": "a", "encoding_format": "bytes"}
        async with stack.http.post(stack.url + "/v1/embeddings", json=body) as response:
            assert (response.status, response.content_type) == (200, "application/octet-stream")
            assert await response.read() == b"\x00\xff{"


async def test_headers_that_belong_to_an_answer_reach_the_client() -> None:
    """Binary numbers mean nothing without them; a load balancer asks for the engine's load by one and gets it
    by another. Others are the engine's own."""
    meta = '{"data": [{"index": 0, "shape": [4]}]}'
    carried = (
        f"Metadata: {meta}\r\nEndpoint-Load-Metrics: JSON {{}}\r\nserver: uvicorn\r\nset-cookie: a=b\r\n"
    )
    kind = b"content-type: application/octet-stream\r\ncontent-length: 3\r\n\r\n\x00\xff{"
    async with raw_engine(b"HTTP/1.1 200 OK\r\n" + carried.encode() + kind) as (stack, engine):
        body = {"model": "assistant", "input": "a", "encoding_format": "bytes"}
        asked = {"endpoint-load-metrics-format": "JSON", "x-other": "1"}
        async with stack.http.post(stack.url + "/v1/embeddings", json=body, headers=asked) as response:
            assert response.headers["metadata"] == meta
            assert response.headers["endpoint-load-metrics"] == "JSON {}"
            assert not {"server", "set-cookie"} & {name.lower() for name in response.headers}
            assert await response.read() == b"\x00\xff{"
        assert b"endpoint-load-metrics-format: JSON\r\n" in engine.head
        assert b"x-other" not in engine.head
        async with stack.http.post(stack.url + "/v1/embeddings", json=body) as response:
            assert response.status == 200
        assert b"endpoint-load-metrics-format" not in engine.head


async def test_sessions_that_an_engine_keeps_are_begun_used_and_ended(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """SageMaker's: engines take these bodies with nothing added, name the session by a header, and answer by
    a text that has no type. Whoever has its name may use it, so nobody else is shown it."""
    answer = (
        b"HTTP/1.1 200 OK\r\nX-Amzn-SageMaker-New-Session-Id: 1f; Expires=2026\r\n"
        b"X-Amzn-SageMaker-Closed-Session-Id: 0e\r\ncontent-length: 18\r\n\r\nSession 1f created"
    )
    tenant = ApiKey(name="k", sha256=hash_of("sk-client"), tenant="theirs", priority=1)
    async with raw_engine(answer, keys=[tenant]) as (stack, engine):
        lines: list[object] = []
        monkeypatch.setattr(stack.gateway.plane.log, "write", lines.append)
        headers = {"x-amzn-sagemaker-session-id": "0e-own", "content-type": "application/json"}
        headers |= {"authorization": "Bearer sk-client"}
        body = b'{"requestType": "NEW_SESSION"}'
        async with stack.http.post(stack.url + "/invocations", data=body, headers=headers) as response:
            assert response.status == 200, await response.text()
            assert response.headers["x-amzn-sagemaker-new-session-id"] == "1f; Expires=2026"
            assert response.headers["x-amzn-sagemaker-closed-session-id"] == "0e"
            assert await response.read() == b"Session 1f created"
        assert engine.body == body
        assert b"x-amzn-sagemaker-session-id: 0e-own\r\n" in engine.head
        del headers["x-amzn-sagemaker-session-id"]
        async with stack.http.post(stack.url + "/invocations", data=body, headers=headers) as response:
            assert response.status == 200
        assert b"sagemaker" not in engine.head.lower(), "of another request, over the same connection"
        assert len(lines) == 2
        assert "0e-own" not in repr(lines) + caplog.text


@pytest.mark.parametrize("asked", ['"prompt": "x"', '"messages": []', '"input": "x"'])
async def test_a_session_is_no_way_around_salt_priority_and_route(asked: str) -> None:
    """vLLM 0.32 refuses a session's request with more in it; an engine that knows no sessions answers it."""
    tenant = ApiKey(name="k", sha256=hash_of("sk-client"), tenant="theirs", priority=1)
    answer = OK + b"content-length: %d\r\n\r\n" % len(ANSWER) + ANSWER
    async with raw_engine(answer, keys=[tenant]) as (stack, engine):
        headers = {"content-type": "application/json", "authorization": "Bearer sk-client"}
        body = (
            f'{{"requestType": "NEW_SESSION", "model": "core", "priority": -9, "cache_salt": "a", {asked}}}'
        )
        async with stack.http.post(stack.url + "/invocations", data=body, headers=headers) as response:
            assert response.status == 200, await response.text()
        sent = json.loads(engine.body)
        assert len(sent["cache_salt"]) > 20
        assert (sent["priority"], sent["model"]) == (1, "assistant")


async def test_an_engine_is_asked_with_the_key_that_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_KEY", "sk-engine")
    answer = OK + b"content-length: %d\r\n\r\n" % len(ANSWER) + ANSWER
    async with raw_engine(answer, engine_key_env="ENGINE_KEY") as (stack, engine):
        async with stack.post(headers={"authorization": "Bearer sk-client"}) as response:
            assert response.status == 200
        assert b"authorization: Bearer sk-engine\r\n" in engine.head
        assert b"sk-client" not in engine.head


async def test_what_is_held_back_reaches_a_client_whose_answer_breaks_off() -> None:
    """The last chunk of an answer waits for what the engine says after it."""
    last = json.loads(event("b")[6:])
    last["choices"][0]["finish_reason"] = "stop"
    wire = chunked(event("a"), b"data: " + json.dumps(last).encode() + b"\n\n")
    async with raw_engine(STREAM + wire) as (stack, _), stack.post({"stream": True}) as response:
        *parts, error = await stack.events(response)
    assert [part["choices"][0]["delta"]["content"] for part in parts] == ["a", "b"]
    assert error["error"]["type"] == "upstream_error"
