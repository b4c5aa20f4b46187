"""What is not the hot path: health, readiness, metrics, the route of a request that is not made, and the
configuration."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from importlib import metadata
from typing import Annotated, Any

from fastapi import Body, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field

from gateway.config import ConfigError, is_loopback, shown, shown_url, with_secrets
from gateway.errors import BadRequestError, ForbiddenError, GatewayError
from gateway.identity import Identities
from gateway.proxy.fields import RequestFields
from gateway.proxy.plane import DataPlane
from gateway.routing.pools import Pool
from gateway.telemetry.exposition import Exposition
from quantize.card import CardError

Replace = Callable[[str], Awaitable[None]]
"""Has the gateway, all its workers, use another configuration, given as YAML. Raises ConfigError or
CardError, and then nothing has changed."""


class RouteQuestion(BaseModel):
    """A request as far as its route depends on it; its headers count as those of a real one do."""

    model: str = Field(min_length=1)
    metadata: dict[str, Any] | None = None
    vllm_xargs: dict[str, Any] | None = None
    user: str | None = None
    prompt_cache_key: str | None = None
    litellm_session_id: str | None = None


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | int | None


class ErrorEnvelope(BaseModel):
    """OpenAI's."""

    error: ErrorBody


REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorEnvelope, "description": "The request cannot be used; the message says why."},
    401: {"model": ErrorEnvelope, "description": "No key, or an unknown one."},
    403: {"model": ErrorEnvelope, "description": "The key may not do this."},
    404: {"model": ErrorEnvelope, "description": "There is no such thing."},
}
_PROMETHEUS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}}}
_UNREADY: dict[int | str, dict[str, Any]] = {
    503: {"description": "There is no role that a pool could serve, or not every pool was asked yet."}
}


class Operations:
    """The routes of the application."""

    def __init__(self, plane: DataPlane, exposition: Exposition, replace: Replace) -> None:
        self._plane = plane
        self._exposition = exposition
        self._replace = replace

    def add_to(self, app: FastAPI) -> None:
        known, admin = [Depends(self._known)], [Depends(self.admin)]
        app.post("/v1/route", dependencies=known)(self.route)
        app.get("/health")(self.health)
        app.get("/version")(self.version)
        app.get("/load")(self.load)
        for method in (app.get, app.post):
            method("/ping", include_in_schema=False)(self.health)
        app.get("/readiness", responses=_UNREADY)(self.readiness)
        app.get("/metrics", responses=_PROMETHEUS, response_class=PlainTextResponse)(self.show_metrics)
        app.get("/admin/config", dependencies=admin)(self.config)
        app.put("/admin/config", dependencies=admin)(self.set_config)

    async def route(self, question: RouteQuestion, request: Request) -> dict[str, Any]:
        """Which variant would serve a request, and why: nothing is asked of an engine."""
        snapshot = self._plane.snapshot
        identities = Identities(snapshot.config)
        asked = RequestFields(**question.model_dump())
        caller = identities.sender(request.headers).caller(asked)
        found = snapshot.router.explain(caller, question.model)
        pools = snapshot.pools.by_variant
        usable = [variant for variant in found.ladder if pools[variant].usable()]
        return {
            **asdict(found),
            "session": caller.session,
            "parent_session": caller.parent,
            "variant": usable[0] if usable else None,
            "usable": usable,
            "when_full": snapshot.config.roles[caller.role].when_full.value,
            "expected_s": self._expected(caller.role),
        }

    def _expected(self, role: str) -> dict[str, dict[str, float | None]] | None:
        """Where the role has a target, and where it goes by itself."""
        snapshot = self._plane.snapshot
        if snapshot.config.roles[role].target is None:
            return None
        found = snapshot.router.expected(role)
        return {name: {"ttft_s": first, "total_s": total} for name, (first, total) in found.items()}

    async def health(self) -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    async def version(self) -> dict[str, str]:
        """The gateway's own; engines say theirs to whoever runs them."""
        try:
            return {"version": metadata.version("tiercel")}
        except metadata.PackageNotFoundError:  # run from its sources
            return {"version": "unknown"}

    async def load(self) -> dict[str, int]:
        """Requests under way, as vLLM's servers tell a load balancer."""
        return {"server_load": len(self._plane.active)}

    async def readiness(self, request: Request) -> JSONResponse:
        """Some role can be served, and after a start every pool has been asked; what is missing for more.
        For an admin also the replicas, and where they are.

        A role that nobody can serve takes no gateway out of a load balancer, where all others would go with
        it: who asks for that role is told so.
        """
        snapshot = self._plane.snapshot
        pools = snapshot.pools.by_variant
        missing = [variant for variant, pool in pools.items() if not pool.reachable]
        unserved = [
            role
            for role in snapshot.config.roles
            if not any(pools[variant].reachable for variant in snapshot.router.ladder(role))
        ]
        asked = all(one.reachable is not None for pool in pools.values() for one in pool.replicas)
        ready = not unserved or (asked and len(unserved) < len(snapshot.config.roles))
        body: dict[str, Any] = {"ready": ready, "unserved": unserved, "not_reachable": missing}
        if self._is_admin(request):
            body["pools"] = {variant: _detail(pool) for variant, pool in pools.items()}
        return JSONResponse(body, status_code=200 if ready else 503)

    async def show_metrics(self) -> Response:
        """Prometheus text."""
        return Response(await self._exposition.text(), media_type=CONTENT_TYPE_LATEST)

    async def config(self) -> dict[str, Any]:
        """The configuration that is in use, without its secrets: keys' hashes, passwords in URLs, the
        environment of engines."""
        return shown(self._plane.snapshot.config)

    async def set_config(self, text: Annotated[str, Body(media_type="application/yaml")]) -> dict[str, Any]:
        """Use another configuration from now on, until the next start or reload; the file is left alone.

        It is checked whole first: one that cannot be used changes nothing. What ``GET`` shows can be sent
        back: what is hidden stays as it is.
        """
        try:
            await self._replace(with_secrets(text, self._plane.snapshot.config))
        except (ConfigError, CardError) as error:
            raise BadRequestError(str(error)) from None
        new = self._plane.snapshot.config
        return {"applied": True, "served": list(new.served), "roles": list(new.roles)}

    def _known(self, request: Request) -> None:
        Identities(self._plane.snapshot.config).key(request.headers)

    def _is_admin(self, request: Request) -> bool:
        try:
            self.admin(request)
        except GatewayError:
            return False
        return True

    def admin(self, request: Request) -> None:
        """Refuses who may not change anything. Raises ForbiddenError or UnauthenticatedError."""
        config = self._plane.snapshot.config
        key = Identities(config).key(request.headers)
        if not config.keys and not is_loopback(request.url.hostname or ""):
            # A web page can give its own name this machine's address, and would then be let in.
            named = (request.url.hostname or "")[:80]
            raise ForbiddenError(
                f"host: {named!r} is not this machine, and there are no keys; add keys (`tiercel keys new` "
                "makes one), or ask 127.0.0.1"
            )
        if key is not None and not key.admin:
            raise ForbiddenError("authorization: this key is no admin's; use one with `admin: true`")


def _detail(pool: Pool) -> dict[str, Any]:
    return {
        "reachable": pool.reachable,
        "replicas": {
            replica.name: {
                "url": shown_url(replica.url),
                "reachable": bool(replica.reachable),
                "usable": replica.breaker.free,
                "in_flight": replica.in_flight,
            }
            for replica in pool.replicas
        },
    }
