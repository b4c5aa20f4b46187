"""Errors of what is not the hot path, in the same envelopes as its own."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import Route

from gateway.errors import BadRequestError, GatewayError, UnexpectedError
from gateway.proxy.endpoints import ANY, ANY_ANTHROPIC, errors_of, not_found
from gateway.proxy.exchange import request_id

_NO_ROUTE = "Not Found"
"""Starlette's words for a path that no route has."""


def add_error_handlers(app: FastAPI) -> None:
    """Give the errors outside the hot path the envelope of the API that the client speaks."""

    def answer(
        request: Request, error: GatewayError, status: int, more: Mapping[str, str] | None = None
    ) -> JSONResponse:
        form = errors_of(request.url.path)
        if form is ANY and "anthropic-version" in request.headers:
            form = ANY_ANTHROPIC
        identity = request_id(request.headers.get("x-request-id"))
        headers = {"x-request-id": identity, **(more or {})}
        if form is ANY_ANTHROPIC:
            headers["request-id"] = identity
        return JSONResponse(form.error(error), status_code=status, headers=headers)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = f"{request.method} {request.url.path}"[:200]
        headers = {name.lower(): value for name, value in (error.headers or {}).items()}
        said = f"{what}: {error.detail}."
        if error.status_code == 405:
            headers["allow"] = ", ".join(_methods(app, request.url.path))
            said = f"{what}: this path takes {headers['allow']}."
        elif error.status_code == 404 and error.detail == _NO_ROUTE:
            said = f"{request.method} {not_found(request.url.path)}"
        shown = BadRequestError(said)
        shown.status = error.status_code
        return answer(request, shown, error.status_code, headers)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"] if part != "body")[:100] or "body"
        return answer(request, BadRequestError(f"{field}: {first['msg']}", param=field), 400)

    async def ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, GatewayError)
        more = {}
        if error.retry_after_s is not None:
            more["retry-after"] = str(error.retry_after_s)
        if error.status == 401:
            more["www-authenticate"] = "Bearer"
        return answer(request, error, error.status, more)

    async def unexpected(request: Request, error: Exception) -> Response:
        return answer(request, UnexpectedError(error), 500)

    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(GatewayError, ours)
    app.add_exception_handler(Exception, unexpected)


def _methods(app: FastAPI, path: str) -> list[str]:
    """What can be done with a path: each of its routes knows its own methods only. HEAD is GET without the
    body (``wire/asgi.py``)."""
    routes = [route for route in app.routes if isinstance(route, Route) and route.path_regex.match(path)]
    methods = {method for route in routes for method in route.methods or ()}
    return sorted(methods | ({"HEAD"} if "GET" in methods else set()))
