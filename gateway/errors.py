"""Everything that can go wrong with a request, and the one place that turns it into an answer.

GatewayError
├── BadRequest            400  the client's input; ``param`` names the field
│   └── BodyTooLarge      413
├── PrecisionTooLow       403  an explicit variant below what the role's budget allows
├── UnknownModel          404  with the known model ids
├── NoReplica             503  no replica can take it; with retry-after
├── ShuttingDown          503  the gateway stops; with retry-after
├── UpstreamError         502  the upstream failed
│   ├── UpstreamRefused   4xx  the upstream's own answer, its status and envelope kept
│   ├── UpstreamTimeout   504
│   └── NeverReached      502  no byte of the request was worked on: the only error that is retried
├── ClientGone            499  never sent, the client is away; logged and counted
└── Unexpected            500  a defect of ours; the log has it, the client does not

``message`` is for the caller; ``internal`` is for the log only. Exceptions of libraries are
translated where they are caught, never further in.
"""

from __future__ import annotations

from typing import Any, ClassVar


class GatewayError(Exception):
    """The root. Subclasses set the status, and the ``type`` and ``code`` of OpenAI's envelope."""

    status: int = 500
    type: ClassVar[str] = "internal_error"
    code: ClassVar[str | None] = None
    retry_after_s: int | None = None

    def __init__(self, message: str, *, param: str | None = None, internal: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.internal = internal


class BadRequest(GatewayError):
    """The client's input cannot be used. The message names the field, what it is, and the fix."""

    status = 400
    type = "invalid_request_error"


class BodyTooLarge(BadRequest):
    status = 413
    code = "body_too_large"


class PrecisionTooLow(GatewayError):
    """A client asked for less precision than the role's budget allows; it may only ask for more."""

    status = 403
    type = "permission_error"
    code = "precision_below_budget"


class UnknownModel(GatewayError):
    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class NoReplica(GatewayError):
    status = 503
    type = "service_unavailable"
    code = "no_replica"
    retry_after_s = 1


class ShuttingDown(GatewayError):
    status = 503
    type = "service_unavailable"
    code = "shutting_down"
    retry_after_s = 5


class UpstreamError(GatewayError):
    status = 502
    type = "upstream_error"
    code = "upstream_failed"


class UpstreamTimeout(UpstreamError):
    status = 504
    code = "upstream_timeout"


class NeverReached(UpstreamError):
    """The request provably did no work upstream. ``stale``: a pooled connection had been closed."""

    code = "upstream_unreachable"

    def __init__(self, message: str, *, stale: bool = False, internal: str | None = None) -> None:
        super().__init__(message, internal=internal)
        self.stale = stale


class UpstreamRefused(UpstreamError):
    """A 4xx of the upstream (a context that is too long, say) that the client should see as it is."""

    def __init__(self, status: int, body: Any, *, retry_after_s: int | None = None) -> None:
        error = body.get("error", body) if isinstance(body, dict) else {}
        error = error if isinstance(error, dict) else {"message": error}
        text = error.get("message") or error.get("detail") or f"the upstream refused the request ({status})"
        super().__init__(str(text), param=error.get("param"))
        self.status = status
        self.retry_after_s = retry_after_s
        self.upstream_type = str(error.get("type") or "invalid_request_error")
        self.upstream_code = error.get("code")


class ClientGone(GatewayError):
    status = 499
    type = "client_closed_request"


class Unexpected(GatewayError):
    def __init__(self, internal: str) -> None:
        super().__init__("The gateway failed; its log has the details.", internal=internal)


def envelope(error: GatewayError) -> dict[str, Any]:
    """OpenAI's error body: ``{"error": {"message", "type", "param", "code"}}``."""
    refused = isinstance(error, UpstreamRefused)
    return {
        "error": {
            "message": error.message,
            "type": error.upstream_type if refused else error.type,
            "param": error.param,
            "code": error.upstream_code if refused else error.code,
        }
    }
