"""Requests of every shape that an engine's own description of its routes names."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MESSAGES = [{"role": "user", "content": "what is my balance"}]
_SHORT = {"max_tokens": 4, "temperature": 0, "seed": 1}
CHAT = {"model": "assistant", "messages": MESSAGES, **_SHORT}
TEXT = {"model": "assistant", "prompt": "what is my balance", **_SHORT}
BASES: Mapping[str, Mapping[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": TEXT,
    "/v1/responses": {"model": "assistant", "input": "hi", "max_output_tokens": 4, "temperature": 0},
    "/v1/messages": {"model": "assistant", "messages": MESSAGES, "max_tokens": 4, "temperature": 0},
    "/v1/messages/count_tokens": {"model": "assistant", "messages": MESSAGES},
    "/v1/chat/completions/batch": CHAT | {"messages": [MESSAGES, MESSAGES]},
    "/tokenize": {"model": "assistant", "prompt": "what is my balance"},
    "/detokenize": {"model": "assistant", "tokens": [5, 6, 7]},
    "/generative_scoring": {"model": "assistant", "query": "a", "items": ["b"], "label_token_ids": [5, 6]},
    "/v1/systemone": {"model": "assistant"},
    "/inference/v1/generate": {
        "model": "assistant",
        "token_ids": [5, 6, 7],
        "sampling_params": {"max_tokens": 4, "temperature": 0},
    },
    "/v1/completions/render": {"model": "assistant", "prompt": ["a", "b"]},
    "/v1/chat/completions/render": {"model": "assistant", "messages": MESSAGES},
    "/v1/embeddings": {"model": "assistant", "input": "what is my balance"},
    "/v2/embed": {"model": "assistant", "texts": ["what is my balance"], "embedding_types": ["float"]},
    "/pooling": {"model": "assistant", "input": "what is my balance"},
    "/score": {"model": "assistant", "queries": "my balance", "documents": ["a", "what is my balance"]},
    "/v1/score": {"model": "assistant", "text_1": "my balance", "text_2": "what is my balance"},
    "/rerank": {"model": "assistant", "query": "my balance", "documents": ["a", "what is my balance"]},
    "/v1/rerank": {"model": "assistant", "query": "my balance", "documents": ["a", "b"], "top_n": 1},
    "/v2/rerank": {"model": "assistant", "query": "my balance", "documents": ["a", "b"]},
}
"""By path, a request that an engine which serves it takes, and soon answers; some write, others pool."""
STREAMED = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/inference/v1/generate",
)
_SPOILED = (*STREAMED, "/v1/embeddings", "/pooling")
"""Paths that are also asked what is no JSON, or is so in a way that few readers agree on."""
VALUES = (
    None,
    True,
    False,
    0,
    1,
    2,
    -1,
    1.0,
    1.5,
    "1",
    "2.0",
    "true",
    "no",
    "abc",
    "",
    [],
    ["a"],
    [5],
    {},
    {"a": 1},
)
_TOOL = {
    "type": "function",
    "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}},
}
_SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
_IMAGE = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}]
VALID: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "/v1/chat/completions": (
        {"tools": [_TOOL]},
        {"tools": [_TOOL], "tool_choice": "none"},
        {"tools": [_TOOL], "tool_choice": {"type": "function", "function": {"name": "look_up"}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": _SCHEMA}}},
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"choice": ["a", "b"]}},
        {"logprobs": True, "top_logprobs": 3},
        {"logprobs": True},
        {"logprobs": False, "top_logprobs": 3},
        {"logprobs": "true", "top_logprobs": 2.0},
        {"logprobs": 1, "top_logprobs": "2"},
        {"logprobs": True, "top_logprobs": -1, "max_tokens": 1},
        {"top_logprobs": 0},
        {"logprob_token_ids": [5]},
        {"logprobs": True, "logprob_token_ids": [5]},
        {"prompt_logprobs": 1},
        {"prompt_logprobs": 1, "top_logprobs": 2},
        {"return_token_ids": True},
        {"return_tokens_as_token_ids": True, "logprobs": True},
        {"n": 2, "temperature": 1},
        {"n": "2", "logprobs": True, "temperature": 1},
        {"use_beam_search": True, "n": 2},
        {"echo": True, "add_generation_prompt": False},
        {"continue_final_message": True, "add_generation_prompt": False},
        {"stop": ["a"], "include_stop_str_in_output": True},
        {"max_tokens": None, "max_completion_tokens": "3"},
        {"messages": [{"role": "robot", "content": "hi"}]},
        {"messages": [{"role": "tool", "content": "hi", "tool_call_id": "a"}]},
        {"messages": [{"role": "developer", "content": [{"type": "text", "text": "hi"}]}]},
        {"messages": [{"role": "user", "content": _IMAGE}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"text": "hi"}, "hi"]}]},
        {"messages": [{"content": "hi"}]},
        {"model": None},
        {"model": ""},
        {"stream": "yes", "stream_options": {"include_usage": "1"}},
        {"stream": True, "stream_options": {}},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        {"stream": True, "stream_options": {"include_usage": False, "continuous_usage_stats": True}},
        {"stream": True, "logprobs": True, "top_logprobs": 2},
        {"stream": True, "top_logprobs": 2},
        {"stream": True, "n": 2, "temperature": 1},
        {"stream": True, "tools": [_TOOL]},
        {"stream": True, "return_token_ids": True},
        {"stream": 0, "stream_options": {"include_usage": True}},
        {"stream": "false"},
    ),
    "/v1/completions": (
        {"echo": True, "max_tokens": 0},
        {"echo": True, "max_tokens": 0, "logprobs": 1},
        {"logprobs": 3},
        {"prompt": ["a", "b"]},
        {"prompt": [5, 6, 7]},
        {"prompt": [[5, 6], [7]]},
        {"prompt_logprobs": 1},
        {"suffix": "a"},
        {"n": 2, "temperature": 1},
        {"n": 2, "best_of": 2, "temperature": 1},
        {"use_beam_search": True, "n": 2},
        {"structured_outputs": {"choice": ["a", "b"]}},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"stream": True, "prompt": ["a", "b"]},
        {"stream": True, "echo": True, "logprobs": 1},
        {"stream": "on", "n": "2", "temperature": 1},
        {"model": None},
    ),
    "/v1/responses": (
        {"instructions": "Be brief."},
        {"input": [{"role": "user", "content": "hi"}]},
        {"input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}]},
        {"tools": [{"type": "function", "name": "look_up", "parameters": {"type": "object"}}]},
        {"text": {"format": {"type": "json_schema", "name": "a", "schema": _SCHEMA}}},
        {"top_logprobs": 2, "include": ["message.output_text.logprobs"]},
        {"previous_response_id": "resp_none"},
        {"store": False},
        {"background": True},
        {"max_output_tokens": "4"},
    ),
    "/v1/messages": (
        {"system": "Be brief."},
        {"system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]},
        {"tools": [{"name": "look_up", "input_schema": {"type": "object", "properties": {}}}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"stream": "true"},
    ),
    "/tokenize": (
        {"prompt": "hi", "return_token_strs": "yes"},
        {"prompt": None, "messages": MESSAGES},
        {"stream": "whatever", "logprobs": {}},
    ),
    "/v1/embeddings": (
        {"input": ["a", "b"]},
        {"input": [5, 6, 7]},
        {"input": [[5, 6], [7]]},
        {"input": None, "messages": MESSAGES},
        {"encoding_format": "base64"},
        {"encoding_format": "bytes"},
        {"encoding_format": "bytes_only"},
        {"encoding_format": "base64", "embed_dtype": "float16", "endianness": "big"},
        {"dimensions": 8},
        {"truncate_prompt_tokens": 2},
        {"truncate_prompt_tokens": -1},
        {"add_special_tokens": "no", "normalize": 0},
        {"stream": True},
    ),
    "/v2/embed": (
        {"texts": ["a", "b"], "embedding_types": ["float", "binary", "base64"]},
        {"input_type": "search_query"},
        {"texts": None, "inputs": [{"content": [{"type": "text", "text": "a"}]}]},
        {"truncate": "END", "max_tokens": 2},
    ),
    "/pooling": (
        {"task": "embed"},
        {"task": "token_embed"},
        {"task": "classify"},
        {"encoding_format": "base64"},
        {"encoding_format": "bytes"},
        {"input": None, "messages": MESSAGES},
    ),
    "/score": (
        {"queries": ["a", "b"], "documents": ["c", "d"]},
        {"queries": ["a", "b"], "documents": ["c"]},
        {"truncate_prompt_tokens": 1},
    ),
    "/rerank": (
        {"top_n": 1},
        {"documents": []},
        {"documents": [{"content": [{"type": "text", "text": "a"}]}]},
    ),
    "/invocations": (CHAT, CHAT | {"stream": True}, TEXT, TEXT | {"stream": True}, {}, {"input": "hi"}),
}
"""What is rarely hit by chance; laid over the path's base."""
_TAILS = (
    b"}",
    b',"temperature":1e400}',
    b',"temperature":NaN}',
    b',"temperature":-Infinity}',
    b',"temperature":"0.5"}',
    b',"seed":%b}' % (b"1" * 5000),
    b',"user":"\\ud800"}',
    b',"user":"a","user":3}',
    b',"max_tokens":"x","max_tokens":1}',
    b',"max_\\u0074okens":1}',
    b',"model":"nothing","mod\\u0065l":"assistant"}',
    b',"stream":"x","stream":false}',
    b',"stream":false,"stre\\u0061m":true}',
    b',"x":%b}' % (b"[" * 600 + b"]" * 600),
    b',"x":"\xed\xa0\x80"}',
    b',"x":"\xff"}',
    b',"x":"\x01"}',
    b"} \n\t",
    b',"metadata":"x"}',
    b',"cache_salt":"a","priority":0}',
)


@dataclass(frozen=True)
class Case:
    path: str
    body: bytes
    rare: bool = False
    """Written by hand: nothing like it is made by trying values."""

    def __str__(self) -> str:
        return f"{self.path} {self.body[:300]!r}"


def cases(description: Mapping[str, Any]) -> Iterator[Case]:
    """``description``: the engine's ``/openapi.json``; routes that are not in it are not asked."""
    served = description["paths"]
    for path, base in BASES.items():
        if path not in served:
            continue
        yield Case(path, json.dumps(base).encode())
        for field in sorted(_fields(description, path) | base.keys()):
            left = {name: value for name, value in base.items() if name != field}
            yield Case(path, json.dumps(left).encode())
            for value in VALUES:
                if field in ("max_tokens", "max_output_tokens", "max_completion_tokens") and value is None:
                    continue  # as long as the context is
                yield Case(path, json.dumps(base | {field: value}).encode())
                if path in STREAMED and value in (True, 1, "abc", []):
                    yield Case(path, json.dumps(base | {"stream": True, field: value}).encode())
    for path, bodies in VALID.items():
        for body in bodies if path in served else ():
            yield Case(path, json.dumps({**BASES.get(path, {}), **body}).encode(), rare=True)
    for path in _SPOILED:
        if path not in served:
            continue
        start = json.dumps(dict(BASES[path]) | {"seed": 1}).encode()[:-1]
        for tail in _TAILS:
            yield Case(path, start + tail, rare=True)
        yield Case(path, b"\xef\xbb\xbf" + start + b"}", rare=True)
        yield Case(path, (start + b"}").decode().encode("utf-16"), rare=True)
        for text in (b"", b"[]", b"{", b"nul", b"{}", b'"a"', start + b"}x"):
            yield Case(path, text, rare=True)


def _fields(description: Mapping[str, Any], path: str) -> set[str]:
    """First-level fields of a route's request."""
    schema = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    found: set[str] = set()
    waiting = [schema]
    while waiting:
        one = waiting.pop()
        if "$ref" in one:
            waiting.append(description["components"]["schemas"][one["$ref"].rpartition("/")[2]])
        waiting += one.get("anyOf", ())
        found |= one.get("properties", {}).keys()
    return found
