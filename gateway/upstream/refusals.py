"""Errors of engines and providers, as answers and as events within one."""

from __future__ import annotations

import msgspec

from gateway.errors import ClientGoneError, UpstreamError, UpstreamRefusedError
from gateway.upstream.sse import UNREADABLE, object_of


def raise_if_error(payload: bytes, *, always: bool = False) -> None:
    """Raise the error that came as an event: vLLM has sent its 200 by the time it looks closely. ``always``:
    the event is an error by its type, whatever else it says."""
    data = object_of(payload)
    error = data.get("error")
    if not error and not always:
        return
    code = error.get("code") if isinstance(error, dict) else None
    raise refusal(code if type(code) is int and 400 <= code < 600 else 500, payload)


def refusal(status: int, raw: bytes) -> UpstreamError:
    """An answer other than 200: the client's own mistake is passed on, anything else is a 502. So is 499,
    which no server answers: in the books it is a client that left."""
    if 400 <= status < 500 and status != ClientGoneError.status:
        try:
            return UpstreamRefusedError(status, msgspec.json.decode(raw))
        except UNREADABLE:
            return UpstreamRefusedError(status, {})
    internal = f"the engine answered {status}, with {len(raw)} bytes"
    return UpstreamError(f"The engine failed with status {status}; try again.", internal=internal)
