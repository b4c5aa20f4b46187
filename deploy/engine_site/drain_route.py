"""One more route of vLLM's server: it is told to take no more requests, before it is stopped.

``POST /tiercel/drain``, from this machine alone, makes ``/health`` answer 503 from then on. Whoever sends it
requests looks at that and sends them elsewhere; what has begun goes on to its end, and nothing is refused.
There is no way back but another start.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from ipaddress import ip_address

from fastapi import FastAPI, HTTPException, Request, Response
from starlette.datastructures import State
from starlette.routing import Route
from vllm.engine.protocol import EngineClient
from vllm.v1.engine.exceptions import EngineDeadError

PATH = "/tiercel/drain"


class DrainRoute:
    """The plugin; vLLM calls its two methods while it builds the server."""

    name = "tiercel-drain"
    required_tasks = ()

    def __init__(self) -> None:
        self.draining = False

    def attach_router(self, app: FastAPI) -> None:
        app.add_api_route(PATH, self.drain, methods=["POST"])
        app.router.routes.insert(
            0, Route("/health", self.health, methods=["GET"])
        )  # the first that fits answers

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        state.tiercel_drain_engine = engine_client

    async def drain(self, request: Request) -> Response:
        if not from_this_machine(request.scope):
            raise HTTPException(403, "an engine is drained from its own machine alone")
        self.draining = True
        return Response(status_code=200)

    async def health(self, request: Request) -> Response:
        """As vLLM's own, but for an engine that is being drained."""
        if self.draining:
            return Response("draining", status_code=503)
        engine = request.app.state.tiercel_drain_engine
        try:
            if engine is not None:
                await engine.check_health()
        except EngineDeadError:
            return Response(status_code=503)
        return Response(status_code=200)


def from_this_machine(scope: Mapping[str, object]) -> bool:
    """Whether a request comes from the address that it goes to, or from a loopback address."""
    client, server = scope.get("client"), scope.get("server")
    if not isinstance(client, list | tuple) or not isinstance(server, list | tuple):
        return False
    try:
        return client[0] == server[0] or ip_address(str(client[0])).is_loopback
    except ValueError:
        return False
