"""No client can tell whether its answer is listened to: ``sample_rate`` 0 and 1 give the same bytes, at every
endpoint and for every kind of answer. How answers are spelled is varied in ``test_readers.py``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
from gateway_stack import CHAT, RECORD, Stack
from responses_engine import gateways_over

from gateway.upstream.fake import Call, FakeEngine, Script

TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
CALLS = (Call("look_up", '{"order": "C2390", "é": 1e-05}'), Call("no_json", '{"a":'))
POOLED: Mapping[str, Mapping[str, Any]] = {
    "/v1/embeddings": {"input": ["a b", "é"]},
    **{f"{version}/classify": {"input": "a b"} for version in ("", "/v1")},
    **{f"{version}/pooling": {"input": ["a b", "c"]} for version in ("", "/v1")},
    **{f"{version}/rerank": {"query": "a", "documents": ["b", "c d"]} for version in ("", "/v1", "/v2")},
    **{f"{version}/score": {"query": "a", "documents": ["b"]} for version in ("", "/v1")},
}
CHATS: tuple[Mapping[str, Any], ...] = (
    {},
    {"n": 2},
    {"tools": [TOOL]},
    {"logprobs": True},
    {"logprobs": True, "top_logprobs": 2},
    {"logprobs": True, "top_logprobs": 9},
    {"stream_options": {"include_usage": True}},
    {"stream_options": {"include_usage": True, "continuous_usage_stats": True}, "n": 2},
    {"max_tokens": 1},
)
SCRIPTS: Mapping[str, Script] = {
    "plain": Script(),
    "tools": Script(calls=CALLS),
    "tools, spaces": Script(calls=CALLS, spaces=True, fingerprint="fp"),
    "spaces": Script(text='é \\ " \u2028 \U0001f600 </b>', spaces=True, cached_tokens=2),
    "no usage": Script(usage_shape="none", fingerprint="fp"),
    "usage at the end": Script(usage_shape="last"),
    "empty choice": Script(usage_shape="empty choice", fingerprint="fp"),
    "slow": Script(first_token_delay_s=0.02, keep_alive_s=0.01),
    "error within": Script(error_after=2),
    "refused": Script(status=422, message="é"),
    "failed": Script(status=500),
    "garbage": Script(garbage=True),
    "dead": Script(die_after=0),
}
_RANDOM = re.compile(rb"(call_|fc_call_|toolu_|msg_|resp_)[0-9a-f]{16}")
_OWN = ("date", "x-request-id", "request-id")


@pytest.fixture
async def gateways() -> AsyncIterator[list[Stack]]:
    """One that listens to nothing and one that listens to everything, before the same engine."""
    rates = [{"quality": {"sample_rate": rate}, "watch": {"enabled": False}} for rate in (0.0, 1.0)]
    async with gateways_over({"bf16": FakeEngine()}, {"bf16": ("bf16",)}, rates, serve=("bf16",)) as stacks:
        yield stacks


async def answers(stacks: list[Stack], path: str, body: Mapping[str, Any]) -> list[Any]:
    """Of each gateway: status, headers and bytes, but for what is drawn anew for every request."""
    found = []
    for stack in stacks:
        for replica in stack.gateway.plane.snapshot.pools.replicas():
            replica.breaker.answered()
        async with stack.http.post(stack.url + path, json=body) as response:
            headers = {name: value for name, value in response.headers.items() if name.lower() not in _OWN}
            found.append((response.status, headers, _RANDOM.sub(b"*", await response.read())))
    return found


@pytest.mark.parametrize("name", SCRIPTS)
async def test_no_client_can_tell_whether_it_is_listened_to(gateways: list[Stack], name: str) -> None:
    (engine,) = gateways[0].engines.values()
    engine.script = dataclasses.replace(SCRIPTS[name])
    asked = [
        (CHAT, {"model": "assistant", "messages": [{"role": "user", "content": RECORD}], **more})
        for more in CHATS
    ]
    asked += [
        ("/v1/completions", {"model": "assistant", "prompt": "a b", "n": 2}),
        ("/v1/completions", {"model": "assistant", "prompt": ["a", "b"], "logprobs": 2}),
        (
            "/v1/messages",
            {"model": "assistant", "max_tokens": 9, "messages": [{"role": "user", "content": "a"}]},
        ),
        ("/v1/responses", {"model": "assistant", "input": "a", "store": False}),
    ]
    streamed = [(path, {**body, "stream": True}) for path, body in asked]
    listened = 0
    for path, body in [(path, body) for path, body in asked if "stream_options" not in body] + streamed:
        quiet, heard = await answers(gateways, path, body)
        assert quiet == heard, (path, body)
        listened += engine.requests[-1].get("logprobs") is True and not body.get("logprobs")
    assert listened >= 10, "the second one asked for more than its client"


@pytest.mark.parametrize(
    ("name", "status"), [("plain", 200), ("spaces", 200), ("refused", 422), ("failed", 502), ("dead", 502)]
)
async def test_pooling_is_listened_to_by_nobody(gateways: list[Stack], name: str, status: int) -> None:
    (engine,) = gateways[0].engines.values()
    engine.script = dataclasses.replace(SCRIPTS[name])
    for encoding in ("float", "bytes"):
        for path, body in POOLED.items():
            asked = {"model": "assistant", "encoding_format": encoding, **body}
            quiet, heard = await answers(gateways, path, asked)
            assert quiet == heard, (path, encoding)
            assert quiet[0] == status
            if encoding == "bytes" and status == 200:
                assert quiet[1]["Content-Type"] == "application/octet-stream"
                assert "usage" in quiet[1]["metadata"]
