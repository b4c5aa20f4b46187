"""Everything that can go wrong with a request, and the one place that turns it into an answer.

GatewayError
├── BadRequestError           400  the client's input; ``param`` names the field
│   ├── MethodNotAllowedError 405
│   ├── NoWebSocketError      426  there are none here; clients that know this status go on over HTTP
│   ├── BodyTooLargeError     413
│   ├── UnsupportedCodingError 415  a content-encoding that is not known
│   ├── PreviousResponseError 400  what previous_response_id names cannot be gone on from
│   ├── ConversationTooLongError 400  it has more turns or bytes than are kept
│   ├── UnknownResponseError  404  no such response of this tenant's
│   ├── RequestTimeoutError   408  the request did not come in time; the connection is closed
│   └── MalformedRequestError 400  no HTTP/1.1 that is read in one way only; the connection is closed
├── UnauthenticatedError      401  no key, or an unknown one
├── ForbiddenError            403  the key may not use this model or role
├── PrecisionTooLowError      403  an explicit variant below what the role's budget allows
├── UnknownModelError         404  with some of the known model ids
├── TooManyInBackgroundError  429  of one tenant; with retry-after
├── NoReplicaError            503  no replica can take it; with retry-after
├── OverloadedError           503  clients have made the gateway hold as much as it may; with retry-after
├── TenantOverloadedError     429  the same, of one tenant's share; with retry-after
├── ShuttingDownError         503  the gateway stops; with retry-after
├── StoreDownError            503  what the gateways share cannot be read or written now
├── UpstreamError             502  the upstream failed
│   ├── UpstreamRefusedError  4xx  the upstream's own answer, its status and envelope kept
│   ├── UpstreamTimeoutError  504
│   ├── UpstreamOverloadedError 503  it says that it has too much to do; with retry-after if it said when
│   └── NeverReachedError     502  no work was done on the request: the only error that is retried
├── ClientGoneError           499  never sent, the client is away; logged and counted
└── UnexpectedError           500  a defect of ours; the log has it, the client does not

``message`` is for the caller and may quote what the caller sent, or what an engine said of it. ``internal``
is for the log, which promises to have no prompt, no answer and no secret: it is our own sentence, made of
our own names, of numbers, statuses and the like, and never of text that a client, an engine or a provider
wrote. Whoever quotes such text in ``message`` gives ``internal`` as well. Exceptions of libraries are
translated where they are caught, never further in.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable
from typing import Any

_WORD = re.compile(r"[\w.\[\]-]{1,64}", re.ASCII)
"""What may be taken over from somebody's error as its type, code or parameter."""
MOST_NAMES = 10
"""Of what there is to choose from, in one text."""


class GatewayError(Exception):
    """The root. Subclasses set the status, and the ``type`` and ``code`` of OpenAI's envelope."""

    status: int = 500
    type: str = "internal_error"
    code: str | int | None = None
    retry_after_s: int | None = None
    retry_after_ms: int | None = None
    """Where an upstream gave it so; besides ``retry_after_s``, which is never less."""

    def __init__(self, message: str, *, param: str | None = None, internal: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.internal = internal

    @property
    def logged(self) -> str:
        """What the log says of it."""
        return self.internal or self.message


class BadRequestError(GatewayError):
    """The client's input cannot be used. The message names the field, what it is, and the fix."""

    status = 400
    type = "invalid_request_error"


class MethodNotAllowedError(BadRequestError):
    status = 405
    code = "method_not_allowed"


class NoWebSocketError(BadRequestError):
    """Codex tries a WebSocket first, and HTTP if it is refused with this status and no other."""

    status = 426
    code = "no_websocket"


class BodyTooLargeError(BadRequestError):
    status = 413
    code = "body_too_large"


class UnsupportedCodingError(BadRequestError):
    status = 415
    code = "unsupported_content_encoding"


class PreviousResponseError(BadRequestError):
    code = "previous_response_not_found"

    def __init__(self, message: str, *, internal: str | None = None) -> None:
        super().__init__(message, param="previous_response_id", internal=internal)


class ConversationTooLongError(BadRequestError):
    """Clients that know this code make their conversation shorter by themselves."""

    code = "context_length_exceeded"

    def __init__(self, message: str) -> None:
        super().__init__(message, param="previous_response_id")


class UnknownResponseError(BadRequestError):
    status = 404


class MalformedRequestError(BadRequestError):
    """What came is not the HTTP that it must be. ``status`` is 400 unless another one says it better."""

    code = "malformed_request"

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class RequestTimeoutError(BadRequestError):
    status = 408
    code = "request_timeout"


class UnauthenticatedError(GatewayError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class ForbiddenError(GatewayError):
    """The key is known, and what it asks for is not among what it may use."""

    status = 403
    type = "permission_error"
    code = "not_allowed"


class PrecisionTooLowError(GatewayError):
    """A client asked for less precision than the role's budget allows; it may only ask for more."""

    status = 403
    type = "permission_error"
    code = "precision_below_budget"


class UnknownModelError(GatewayError):
    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class TooManyInBackgroundError(GatewayError):
    status = 429
    type = "rate_limit_error"
    code = "too_many_in_background"
    retry_after_s = 1


class NoReplicaError(GatewayError):
    status = 503
    type = "service_unavailable"
    code = "no_replica"
    retry_after_s = 1

    def __init__(self, message: str, *, may_wait: bool = True, internal: str | None = None) -> None:
        super().__init__(message, internal=internal)
        self.may_wait = may_wait


class OverloadedError(GatewayError):
    status = 503
    type = "service_unavailable"
    code = "overloaded"
    retry_after_s = 1


class TenantOverloadedError(GatewayError):
    status = 429
    type = "rate_limit_error"
    code = "tenant_overloaded"
    retry_after_s = 1


class ShuttingDownError(GatewayError):
    status = 503
    type = "service_unavailable"
    code = "shutting_down"
    retry_after_s = 5


class StoreDownError(GatewayError):
    status = 503
    type = "service_unavailable"
    code = "store_down"
    retry_after_s = 1


class UpstreamError(GatewayError):
    status = 502
    type = "upstream_error"
    code: str | int | None = "upstream_failed"


class UpstreamTimeoutError(UpstreamError):
    status = 504
    code = "upstream_timeout"


class UpstreamOverloadedError(UpstreamError):
    status = 503
    type = "service_unavailable"
    code = "upstream_overloaded"


class NeverReachedError(UpstreamError):
    """The request provably did no work upstream: it may be sent once more."""

    code = "upstream_unreachable"


class UpstreamRefusedError(UpstreamError):
    """A 4xx of the upstream (a context that is too long, say) that the client should see as it is."""

    def __init__(self, status: int, body: Any, *, retry_after_s: int | None = None) -> None:
        error = body.get("error", body) if isinstance(body, dict) else {}
        error = error if isinstance(error, dict) else {"message": error}
        text = error.get("message") or error.get("detail") or f"the upstream refused the request ({status})"
        super().__init__(str(text), param=error.get("param"))
        self.status = status
        self.retry_after_s = retry_after_s
        self.type = str(error.get("type") or "invalid_request_error")
        self.code = error.get("code")
        said = ", ".join(
            f"{name} {error[name]}"
            for name in ("type", "code", "param")
            if isinstance(error.get(name), str | int) and _WORD.fullmatch(str(error[name]))
        )
        self.internal = f"the upstream refused the request with status {status}{said and ': '}{said}"


class ClientGoneError(GatewayError):
    status = 499
    type = "client_closed_request"


class UnexpectedError(GatewayError):
    def __init__(self, cause: BaseException | str) -> None:
        """``cause``: a sentence, or what was raised; its own text may quote anything and is left out."""
        internal = cause if isinstance(cause, str) else _where(cause)
        super().__init__("The gateway failed; its log has the details.", internal=internal)


def _where(error: BaseException) -> str:
    """An exception's type, and the place that raised it."""
    frames = traceback.extract_tb(error.__traceback__, limit=-1)
    place = f" at {frames[0].filename}:{frames[0].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"


def some_of(names: Iterable[str]) -> str:
    """Names for an error's text: the first few, and how many more there are."""
    known = list(names)
    more = len(known) - MOST_NAMES
    return ", ".join(known[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def envelope(error: GatewayError) -> dict[str, Any]:
    """OpenAI's error body: ``{"error": {"message", "type", "param", "code"}}``."""
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }
