"""The console's page: static files that anybody may read, since no figure is in them."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.responses import RedirectResponse
from starlette.staticfiles import StaticFiles

POLICY = (
    "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


class Files:
    """The routes of the page. Its addresses are relative, so that it works behind a prefix too."""

    def __init__(self) -> None:
        self._files = StaticFiles(directory=Path(__file__).parent / "static")

    def add_to(self, app: FastAPI) -> None:
        app.get("/console", include_in_schema=False)(self.enter)
        app.get("/console/{path:path}", include_in_schema=False)(self.file)

    async def enter(self) -> Response:
        """The page lies in a directory of its own."""
        return RedirectResponse("console/", status_code=308, headers=HEADERS)

    async def file(self, path: str, request: Request) -> Response:
        """The page, or what belongs to it."""
        response = await self._files.get_response(path or "index.html", request.scope)
        response.headers.update(HEADERS)
        return response
