"""What can be done with a response that is kept: see it, see what it was given, cancel it, delete it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from fastapi import FastAPI, Query, Request, Response
from pydantic import BaseModel

from gateway.errors import BadRequestError, UnknownResponseError
from gateway.identity import Identities, owner_of
from gateway.proxy.plane import DataPlane
from gateway.responses import conversation
from gateway.responses.background import Background
from gateway.responses.conversation import ItemPage
from gateway.responses.service import Responses
from gateway.responses.store import Stored

_NO_ENDS = {"first_id": None, "last_id": None}


class Deleted(BaseModel):
    id: str
    object: Literal["response"] = "response"
    deleted: bool = True


class Items(BaseModel):
    """A page of input items."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ResponseRoutes:
    """The routes. Each sees what its caller's tenant has kept, and nothing else."""

    def __init__(self, plane: DataPlane, responses: Responses, background: Background) -> None:
        self._plane = plane
        self._responses = responses
        self._background = background

    def add_to(self, app: FastAPI) -> None:
        path = "/v1/responses/{response_id}"
        app.get(path)(self.retrieve)
        app.delete(path)(self.delete)
        app.get(path + "/input_items", response_model=Items)(self.input_items)
        app.post(path + "/cancel")(self.cancel)

    async def retrieve(self, response_id: str, request: Request, stream: bool = False) -> Response:
        """A response; of one in the background, how far it is."""
        stored = await self._stored(response_id, request)
        if stream:
            raise BadRequestError(
                "stream: a response that is kept is not streamed here; ask again until its status is no "
                "longer queued or in_progress",
                param="stream",
            )
        return _shown(stored)

    async def delete(self, response_id: str, request: Request) -> Deleted:
        """Forget a response, and what it was given. What goes on from it cannot be gone on from any more."""
        owner = self._owner(request)
        if not conversation.is_id(response_id) or not await self._responses.delete(owner, response_id):
            raise _unknown(response_id)
        self._background.forget(owner, response_id)
        return Deleted(id=response_id)

    async def input_items(
        self,
        response_id: str,
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
    ) -> Response:
        """What a response was made from: the whole conversation before it."""
        owner = self._owner(request)
        page = ItemPage(response_id, limit, after, newest_first=order == "desc")
        known = conversation.is_id(response_id) and await self._responses.items(owner, response_id, page)
        if not known:
            raise _unknown(response_id)
        if not page.begun:
            raise BadRequestError(f"after: {(after or '')[:80]!r} is no item of this response", param="after")
        ends = {"first_id": page.ids[0], "last_id": page.ids[-1]} if page.ids else _NO_ENDS
        shown = {"object": "list", "data": page.items, **ends, "has_more": page.has_more}
        return Response(msgspec.json.encode(shown), media_type="application/json")

    async def cancel(self, response_id: str, request: Request) -> Response:
        """End a response that is made in the background; its engine stops."""
        stored = await self._stored(response_id, request)
        if not stored.background:
            raise BadRequestError("Cannot cancel a synchronous response.", param="response_id")
        return _shown(await self._background.cancel(stored) if stored.running else stored)

    async def _stored(self, response_id: str, request: Request) -> Stored:
        owner = self._owner(request)
        stored = await self._responses.get(owner, response_id) if conversation.is_id(response_id) else None
        if stored is None:
            raise _unknown(response_id)
        return await self._background.present(stored)

    def _owner(self, request: Request) -> str:
        """Raises UnauthenticatedError."""
        return owner_of(Identities(self._plane.snapshot.config).key(request.headers))


def _shown(stored: Stored) -> Response:
    response = stored.response
    if stored.running:
        response = conversation.with_fields(response, {"status": msgspec.json.encode(stored.status)})
    return Response(response, media_type="application/json")


def _unknown(response_id: str) -> UnknownResponseError:
    return UnknownResponseError(f"Response with id '{response_id[:80]}' not found.", param="response_id")
