"""What the watch knows, and a person's word to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Query, Request
from pydantic import BaseModel, Field

from gateway.errors import StoreDownError
from gateway.quality.report import JudgeErrors, event_as_json
from gateway.quality.watch import Watch
from gateway.store.database import StoreError


class Order(BaseModel):
    """Take a variant out of a role's choice, put it back, or keep it there whatever the checks say."""

    action: Literal["demote", "restore", "pin_serving", "pin_demoted", "unpin"]
    variant: str = Field(
        min_length=1, description="model:variant, or the variant alone where one model alone has it"
    )
    role: str = Field(min_length=1)
    why: str = Field(default="by hand", max_length=500, description="for whoever reads the events")


class Watching:
    """The routes of the watch."""

    def __init__(self, watch: Watch, admin: Callable[[Request], None]) -> None:
        self._watch = watch
        self._admin = admin

    def add_to(self, app: FastAPI) -> None:
        admin = [Depends(self._admin)]
        app.get("/admin/watch", dependencies=admin)(self.show)
        app.post("/admin/watch", dependencies=admin)(self.order)
        app.post("/admin/watch/judge", dependencies=admin)(self.judge)

    async def show(
        self,
        since_s: Annotated[float, Query(gt=0, le=14 * 86_400)] = 3600.0,
        events: Annotated[int, Query(ge=0, le=10_000)] = 100,
    ) -> dict[str, Any]:
        """Every variant in every role with its checks; the newest events; sums over time."""
        try:
            return await self._watch.report(since_s, events)
        except StoreError as error:
            raise StoreDownError(str(error)) from None

    async def judge(self, errors: JudgeErrors) -> dict[str, bool]:
        """How often the judge is wrong: shares that it finds are corrected by it from now on."""
        try:
            await self._watch.know_judge(errors)
        except StoreError as error:
            raise StoreDownError(str(error)) from None
        return {"known": True}

    async def order(self, order: Order) -> dict[str, Any]:
        """A person's word, obeyed by every gateway within a second."""
        try:
            return event_as_json(await self._watch.act(order.action, order.variant, order.role, order.why))
        except StoreError as error:
            raise StoreDownError(str(error)) from None
