"""What the servers of our own engines (``deploy/llama``, ``deploy/encoder``) have in common: how bodies are
read, and refusals as OpenAI tells them, whatever it was that went wrong."""

from __future__ import annotations

from typing import TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from quantize.core.refusals import first_fault

T = TypeVar("T", bound=BaseModel)
MOST_BYTES = 32 << 20
"""Of a request's body, as at the gateway."""
RETRY_AFTER_S = 1
_CLIENT_GONE = 499


class BadRequestError(Exception):
    """A request that is not served. ``field`` is the one that is at fault, ``status`` of the answer."""

    def __init__(
        self, text: str, field: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(text)
        self.field, self.code, self.status = field, code, status


class FullError(RuntimeError):
    """The line is full."""


class StreamOptions(BaseModel):
    """OpenAI's, and vLLM's: a usage at the end, or in every chunk."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


async def read_body(request: Request, most: int = MOST_BYTES) -> bytes:
    """All of a body. Raises BadRequestError for one of more than ``most`` bytes, before it is read where its
    length is said."""
    said = request.headers.get("content-length", "")
    parts, size = [], int(said) if said.isascii() and said.isdigit() else 0
    if size <= most:
        size = 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > most:
                break
    if size > most:
        text = f"the body has more than {most:,} bytes, which is the most that is read; send less"
        raise BadRequestError(text, status=413)
    return b"".join(parts)


async def asked_of(request: Request, kind: type[T]) -> T:
    """A request's body as JSON of that kind. Raises ValidationError and BadRequestError."""
    return kind.model_validate_json(await read_body(request))


def error_reply(status: int, text: str, field: str | None = None, code: str | None = None) -> JSONResponse:
    """``field`` is the one that is at fault."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": text, "type": kind, "param": field, "code": code}}, status)


def add_handlers(app: FastAPI) -> None:
    """Let the application answer exceptions."""
    app.add_exception_handler(BadRequestError, _bad)
    app.add_exception_handler(ValidationError, _invalid)
    app.add_exception_handler(FullError, _full)
    app.add_exception_handler(HTTPException, _unknown)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _defect)


async def _bad(_: Request, error: Exception) -> Response:
    assert isinstance(error, BadRequestError)
    return error_reply(error.status, str(error), error.field, error.code)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, ValidationError)
    faults = error.errors(include_url=False)
    if not (place := faults[0]["loc"]):
        return error_reply(400, first_fault(error, "the body"))
    alike = [one for one in faults if one["loc"][0] == place[0]]
    if len(alike) == 1:
        return error_reply(400, first_fault(error, "the body"), str(place[0]))
    # of one type or another: what is wrong with the one that it is, not that it is not the other
    told = max(alike, key=lambda one: (not one["type"].endswith("_type"), len(one["loc"])))
    items = [str(part) for part in told["loc"][1:] if isinstance(part, int)]
    return error_reply(400, f"{'.'.join([str(place[0]), *items])}: {told['msg']}", str(place[0]))


async def _full(_: Request, error: Exception) -> Response:
    answer = error_reply(503, f"{error}; ask again in a moment")
    answer.headers["retry-after"] = str(RETRY_AFTER_S)
    return answer


async def _unknown(request: Request, error: Exception) -> Response:
    """Paths and methods that there are not."""
    assert isinstance(error, HTTPException)
    place = request.url.path[:100]
    said = {404: "this engine does not serve it", 405: f"this engine takes no {request.method[:20]} there"}
    answer = error_reply(error.status_code, f"{place}: {said.get(error.status_code, error.detail)}")
    answer.headers.update(error.headers or {})
    return answer


async def _gone(_: Request, error: Exception) -> Response:
    """Nobody reads it."""
    return Response(status_code=_CLIENT_GONE)


async def _defect(_: Request, error: Exception) -> Response:
    """The server's log has the rest."""
    return error_reply(500, f"the engine met a defect ({type(error).__name__}); see its log")
