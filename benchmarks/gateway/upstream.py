"""An engine that costs nothing: the fastest answers that Python can give, in vLLM's shapes.

    python -m benchmarks.gateway.upstream --port 9100

What it does is asked for in the body, so that one process serves every test: ``max_tokens`` is the number of
chunks of a stream; ``seed`` is the pause between chunks in milliseconds (0: none); ``top_k`` of 7
means never to answer. Health and metrics answer as vLLM's do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from typing import Any

import uvloop

TEXT = "The quick brown fox jumps over the lazy dog. " * 14
HEAD = {"id": "chatcmpl-1", "created": 1, "model": "assistant"}
_CHUNKS = re.compile(rb'"max_tokens": ?(\d+)')
_PAUSE = re.compile(rb'"seed": ?(\d+)')


def _whole() -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": TEXT}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 200, "total_tokens": 340, "completion_tokens": 140}
    body = json.dumps(
        {**HEAD, "object": "chat.completion", "choices": [choice], "usage": usage}, separators=(",", ":")
    ).encode()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    return head + body


def _chunk(data: dict[str, Any] | str) -> bytes:
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    event = b"data: " + text.encode() + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(event), event)


def _event(n: int, usage: bool) -> bytes:
    choice = {"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None}
    more = {"usage": {"prompt_tokens": 200, "total_tokens": 200 + n, "completion_tokens": n}} if usage else {}
    return _chunk({**HEAD, "object": "chat.completion.chunk", "choices": [choice], **more})


WHOLE = _whole()
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
PLAIN = [_event(n, usage=False) for n in range(1024)]
COUNTED = [_event(n, usage=True) for n in range(1024)]
LAST_USAGE = _chunk(
    {
        **HEAD,
        "object": "chat.completion.chunk",
        "choices": [],
        "usage": {"prompt_tokens": 200, "total_tokens": 264, "completion_tokens": 64},
    }
)
END = _chunk("[DONE]") + b"0\r\n\r\n"
METRICS = (
    b"# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 0\n"
    b"# TYPE vllm:num_requests_waiting gauge\nvllm:num_requests_waiting 0\n"
)
HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5")
"""It stands for several engines: an address is one replica's."""


class Engine(asyncio.Protocol):
    open_streams = 0
    cancelled = 0

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._data = bytearray()
        self._busy = False
        self._gone = False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone = True
        if self._busy:
            Engine.cancelled += 1
            Engine.open_streams -= 1

    def data_received(self, data: bytes) -> None:
        self._data += data
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._data[:end]).lower()
            length, body = self._framing(head, end + 4)
            if length is None:
                return
            del self._data[: end + 4 + length]
            self._answer(head, body)

    def _framing(self, head: bytes, start: int) -> tuple[int | None, bytes]:
        """Length of the body on the wire (None: more is to come) and the body."""
        if (at := head.find(b"content-length:")) >= 0:
            length = int(head[at + 15 : head.find(b"\r", at) if head.find(b"\r", at) > 0 else None])
            return (
                (length, bytes(self._data[start : start + length]))
                if len(self._data) - start >= length
                else (None, b"")
            )
        if b"transfer-encoding: chunked" in head:
            end = self._data.find(b"\r\n0\r\n\r\n", start - 2)
            return (end + 7 - start, bytes(self._data[start:end])) if end >= 0 else (None, b"")
        return 0, b""

    def _answer(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"get"):
            said = METRICS if b"/metrics" in head[:40] else str(Engine.cancelled).encode()
            if b"/v1/models" in head[:40]:
                said = b'{"object":"list","data":[{"id":"assistant","object":"model"}]}'
            if b"/get_model_info" in head[:60] or b"/get_server_info" in head[:60]:
                said = b'{"model_path":"assistant","served_model_name":"assistant"}'
            self._transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
                % (len(said), said)
            )
        elif b'"top_k":7' in body or b'"top_k": 7' in body:
            self._begin()
        elif b'"stream":true' not in body and b'"stream": true' not in body:
            self._transport.write(WHOLE)
        else:
            chunks, pause = _CHUNKS.search(body), _PAUSE.search(body)
            counted = b'"continuous_usage_stats":true' in body
            usage = b'"include_usage":true' in body or b'"include_usage": true' in body
            self._begin()
            self._transport.write(STREAM_HEAD)
            self._stream(
                0, int(chunks[1]) if chunks else 64, int(pause[1]) / 1000 if pause else 0.0, counted, usage
            )

    def _begin(self) -> None:
        self._busy = True
        Engine.open_streams += 1

    def _stream(self, n: int, chunks: int, pause: float, counted: bool, usage: bool) -> None:
        if self._gone:
            return
        self._transport.write((COUNTED if counted else PLAIN)[n % 1024])
        n += 1
        if n == chunks:
            self._transport.write((LAST_USAGE if usage else b"") + END)
            self._busy = False
            Engine.open_streams -= 1
        elif pause:
            self._loop.call_later(pause, self._stream, n, chunks, pause, counted, usage)
        else:
            self._loop.call_soon(self._stream, n, chunks, pause, counted, usage)


async def _serve(port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Engine(loop), HOSTS, port, backlog=4096)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    uvloop.run(_serve(parser.parse_args().port))


if __name__ == "__main__":
    main()
