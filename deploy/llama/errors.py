"""Errors as OpenAI tells them."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from deploy.llama.engine import FullError
from deploy.llama.requests import BadRequestError
from deploy.llama.template import BadConversationError

RETRY_AFTER_S = 1


def error_reply(status: int, text: str, field: str | None = None, code: str | None = None) -> JSONResponse:
    """``field`` is the one that is at fault."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": text, "type": kind, "param": field, "code": code}}, status)


def add_handlers(app: FastAPI) -> None:
    """Let the application answer exceptions."""
    app.add_exception_handler(BadRequestError, _bad)
    app.add_exception_handler(BadConversationError, _bad)
    app.add_exception_handler(ValidationError, _invalid)
    app.add_exception_handler(FullError, _full)


async def _bad(_: Request, error: Exception) -> Response:
    return error_reply(400, str(error), getattr(error, "field", None), getattr(error, "code", None))


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, ValidationError)
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"])) or "the body"
    return error_reply(400, f"{place}: {first['msg']}", place)


async def _full(_: Request, error: Exception) -> Response:
    answer = error_reply(503, f"{error}; ask again in a moment")
    answer.headers["retry-after"] = str(RETRY_AFTER_S)
    return answer
