"""The endpoints that engines answer: what is checked, what is read of the answer, how errors look there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from gateway.errors import GatewayError, envelope
from gateway.proxy.body import (
    CHAT_DECODER,
    Body,
    Decoder,
    RequestFields,
    check_anthropic,
    check_anthropic_prompt,
    check_chat,
    check_common,
    check_embeddings,
    check_prompt,
    check_responses,
)


class Form(Enum):
    """How an answer is streamed, and how errors are written."""

    COMPLETIONS = "completions"
    RESPONSES = "responses"
    ANTHROPIC = "anthropic"
    PLAIN = "plain"
    """Never streamed."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """``prompt`` names the fields that become the engine's prompt, in the order in which they do."""

    path: str
    check: Callable[[Body], None]
    form: Form
    prompt: tuple[str, ...] = ()
    chat: bool = False
    decoder: Decoder[RequestFields] | None = None
    """Reads and checks nearly all bodies at once; ``check`` those that it does not like."""

    @property
    def engine_path(self) -> str:
        """Where an engine serves it: vLLM has some of them without the version."""
        name = self.path.removeprefix("/v1")
        return name if name in _UNVERSIONED else self.path

    def error_body(self, error: GatewayError) -> bytes:
        """The body of an answer that is an error."""
        return json.dumps(self._error(error)).encode()

    def error_event(self, error: GatewayError) -> bytes:
        """The last event of a stream that breaks off."""
        if self.form is Form.ANTHROPIC:
            return b"event: error\ndata: " + self.error_body(error) + b"\n\n"
        if self.form is Form.RESPONSES:
            said = {"type": "error", "sequence_number": 0, **envelope(error)["error"]} | {"type": "error"}
            return b"event: error\ndata: " + json.dumps(said).encode() + b"\n\n"
        return b"data: " + self.error_body(error) + b"\n\n"

    def _error(self, error: GatewayError) -> dict[str, Any]:
        if self.form is Form.ANTHROPIC:
            return {
                "type": "error",
                "error": {"type": _ANTHROPIC.get(error.status, "api_error"), "message": error.message},
            }
        return envelope(error)


_UNVERSIONED = ("/score", "/classify", "/pooling", "/tokenize", "/detokenize")
_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}

CHAT = Endpoint(
    "/v1/chat/completions", check_chat, Form.COMPLETIONS, ("tools", "messages"), True, CHAT_DECODER
)
COMPLETIONS = Endpoint("/v1/completions", check_prompt, Form.COMPLETIONS, ("prompt",))
EMBEDDINGS = Endpoint("/v1/embeddings", check_embeddings, Form.PLAIN, ("input",))
_ALL = (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    Endpoint("/v1/responses", check_responses, Form.RESPONSES, ("instructions", "tools", "input")),
    Endpoint("/v1/messages", check_anthropic, Form.ANTHROPIC, ("tools", "system", "messages")),
    Endpoint("/v1/messages/count_tokens", check_anthropic_prompt, Form.ANTHROPIC),
    *(
        Endpoint(path, check_common, Form.PLAIN)
        for name in ("rerank", "score", "classify", "pooling", "tokenize", "detokenize")
        for path in (f"/v1/{name}", f"/{name}")
    ),
)
ENDPOINTS = {endpoint.path: endpoint for endpoint in _ALL}


def endpoint_of(path: str) -> Endpoint | None:
    """The endpoint at a path; None where engines serve nothing."""
    return ENDPOINTS.get(path)


ANY = Endpoint("", check_common, Form.PLAIN)
"""For errors of requests that name no endpoint."""
