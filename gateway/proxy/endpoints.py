"""The endpoints that engines answer: by which paths clients reach them, what is read of request and answer,
how errors look there.

Of vLLM's routes those that infer are here, each under its own path and its aliases (with and without the
version, with a slash at the end). ``/v1/models``, ``/health``, ``/ping``, ``/version`` and ``/load`` are the
gateway's own (``api/``). The rest stays closed, as ``CLOSED`` says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from gateway.errors import GatewayError, envelope
from gateway.proxy.body import Body, Reads


class Form(Enum):
    """How an answer is streamed, and how errors are written."""

    COMPLETIONS = "completions"
    RESPONSES = "responses"
    ANTHROPIC = "anthropic"
    PLAIN = "plain"
    """Never streamed."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """``path`` is its name, in metrics and logs as well; ``prompt`` names the fields that become the engine's
    prompt, in the order in which they do."""

    path: str
    form: Form
    prompt: tuple[str, ...] = ()
    chat: bool = False
    engine: str = ""
    """Where an engine serves it, if that is not ``path``."""
    aliases: tuple[str, ...] = ()
    text: bool = True
    """Its answers are text, which can be listened to; else token ids."""
    bare: bool = False
    """Engines take its fields and no others: nothing is added to a body."""
    reads: Reads = field(init=False)
    """How much of a request's body is looked at."""

    def __post_init__(self) -> None:
        other = Reads.NAMES if self.form is Form.PLAIN else Reads.STREAM
        object.__setattr__(self, "reads", Reads.OPTIONS if self.form is Form.COMPLETIONS else other)

    @property
    def engine_path(self) -> str:
        """Where an engine serves it."""
        return self.engine or self.path

    def of(self, body: Body) -> Endpoint:
        """The endpoint that a request really asks: ``/invocations`` takes bodies of several."""
        if self is not INVOCATIONS:
            return self
        if "messages" in body:
            return INVOCATIONS_CHAT
        if list(body) == ["requestType"]:
            return INVOCATIONS_SESSION  # with anything beside it, some engines infer: that is theirs to say
        return INVOCATIONS if "prompt" in body else INVOCATIONS_PLAIN

    def id_lines(self, request_id: bytes) -> bytes:
        """The header lines of an answer that name the request: Anthropic's clients look for their own."""
        if self.form is Form.ANTHROPIC:
            return b"x-request-id: %b\r\nrequest-id: %b\r\n" % (request_id, request_id)
        return b"x-request-id: %b\r\n" % request_id

    def error_body(self, error: GatewayError) -> bytes:
        """The body of an answer that is an error."""
        return json.dumps(self.error(error)).encode()

    def error_event(self, error: GatewayError) -> bytes:
        """The last event of a stream that breaks off."""
        if self.form is Form.ANTHROPIC:
            return b"event: error\ndata: " + self.error_body(error) + b"\n\n"
        if self.form is Form.RESPONSES:
            said = {"type": "error", "sequence_number": 0, **envelope(error)["error"]} | {"type": "error"}
            return b"event: error\ndata: " + json.dumps(said).encode() + b"\n\n"
        return b"data: " + self.error_body(error) + b"\n\n"

    def error(self, error: GatewayError) -> dict[str, Any]:
        """The same as ``error_body``, not yet as JSON."""
        if self.form is Form.ANTHROPIC:
            return {
                "type": "error",
                "error": {"type": _ANTHROPIC.get(error.status, "api_error"), "message": error.message},
            }
        return envelope(error)


_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}

_CHAT_PROMPT = ("tools", "messages")
CHAT = Endpoint("/v1/chat/completions", Form.COMPLETIONS, _CHAT_PROMPT, chat=True)
COMPLETIONS = Endpoint("/v1/completions", Form.COMPLETIONS, ("prompt",))
EMBEDDINGS = Endpoint("/v1/embeddings", Form.PLAIN, ("input",))
INVOCATIONS = Endpoint("/invocations", Form.COMPLETIONS, ("prompt",))
INVOCATIONS_CHAT = Endpoint("/invocations", Form.COMPLETIONS, _CHAT_PROMPT, chat=True)
INVOCATIONS_PLAIN = Endpoint("/invocations", Form.PLAIN, ("input",))
INVOCATIONS_SESSION = Endpoint("/invocations", Form.PLAIN, bare=True)
"""SageMaker's sessions, begun and ended."""
_RESPONSES_PROMPT = ("instructions", "tools", "input")
_ANTHROPIC_PROMPT = ("tools", "system", "messages")
_ALL = (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    Endpoint("/v1/responses", Form.RESPONSES, _RESPONSES_PROMPT),
    Endpoint("/v1/messages", Form.ANTHROPIC, _ANTHROPIC_PROMPT),
    Endpoint("/v1/messages/count_tokens", Form.ANTHROPIC, _ANTHROPIC_PROMPT),
    Endpoint("/v1/chat/completions/batch", Form.PLAIN, _CHAT_PROMPT),
    Endpoint("/v2/embed", Form.PLAIN, ("texts",)),
    Endpoint("/v1/score", Form.PLAIN),
    Endpoint("/v1/rerank", Form.PLAIN, aliases=("/v2/rerank",)),
    *(
        Endpoint(f"/v1/{name}", Form.PLAIN, engine=f"/{name}")
        for name in ("classify", "pooling", "tokenize", "detokenize")
    ),
    # of newer engines; those that lack one, or were not told to serve it, say so themselves
    Endpoint("/v1/responses/compact", Form.PLAIN, _RESPONSES_PROMPT),
    Endpoint("/v1/responses/input_tokens", Form.PLAIN, _RESPONSES_PROMPT),
    Endpoint("/v1/systemone", Form.PLAIN),
    Endpoint("/generative_scoring", Form.PLAIN),
    Endpoint("/inference/v1/generate", Form.COMPLETIONS, ("token_ids",), text=False),
    *(
        Endpoint(f"/v1/{name}/render", Form.PLAIN)
        for name in ("chat/completions", "completions", "responses")
    ),
    Endpoint("/v1/messages/render", Form.ANTHROPIC),
    *(Endpoint(f"/v1/{name}/derender", Form.PLAIN) for name in ("chat/completions", "completions")),
    INVOCATIONS,
)

CLOSED = (
    "/sleep /wake_up /is_sleeping /release_kv_cache_memory /pause /resume /is_paused /abort_requests "
    "/inference/v1/abort_requests /collective_rpc /server_info /reset_prefix_cache /reset_mm_cache "
    "/reset_encoder_cache /start_profile /stop_profile /v1/load_lora_adapter /v1/unload_lora_adapter "
    "/tokenizer_info /kv_event_sources /scale_elastic_ep /is_scaling_elastic_ep /fault_tolerance/apply "
    "/fault_tolerance/status /init_weight_transfer_engine /shutdown_weight_transfer_engine "
    "/adapters /start_weight_update /start_draft_weight_update /update_weights /finish_weight_update "
    "/update_weight_version /weight_info /weight_checker /get_world_size"
).split()
"""Routes of vLLM that change an engine, or show what belongs to all who use it: only who runs it may ask."""
MISSING = ("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/realtime", "/cohere/v2/chat")
"""Routes of vLLM that infer and that the gateway does not speak: forms, a WebSocket, Cohere's chat."""


def _paths(endpoint: Endpoint) -> Iterator[str]:
    for path in (endpoint.path, *endpoint.aliases):
        yield path
        if path.startswith("/v1/"):
            yield path.removeprefix("/v1")


_BY_PATH = {
    spelled: endpoint for endpoint in _ALL for path in _paths(endpoint) for spelled in (path, path + "/")
}
endpoint_of = _BY_PATH.get
"""The endpoint that a path means, or None: ``endpoint_of(path)``."""
KNOWN_PATHS = tuple(dict.fromkeys(endpoint.path for endpoint in _ALL))
ANY = Endpoint("", Form.PLAIN)
"""For errors of requests that name no endpoint."""
ANY_ANTHROPIC = Endpoint("", Form.ANTHROPIC)


def errors_of(path: str) -> Endpoint:
    """In whose form an error is told, also at paths that are not served."""
    if (endpoint := endpoint_of(path)) is not None:
        return endpoint
    return ANY_ANTHROPIC if _within(path, "/v1/messages") or _within(path, "/messages") else ANY


def not_found(path: str) -> str:
    """What a client is told of a path that is not served."""
    shown = path[:100]
    if path.rstrip("/") in CLOSED or path.startswith("/adapters/"):
        return f"{shown}: is for those who run the engines, and closed here; ask the engine itself."
    if path.rstrip("/") in MISSING:
        return f"{shown}: the gateway does not serve this one; ask the engine itself."
    return f"{shown}: there is no such path; known are {', '.join(KNOWN_PATHS)} and /v1/models."


def _within(path: str, root: str) -> bool:
    return path == root or path.startswith(root + "/")
