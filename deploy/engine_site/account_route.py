"""One more route of vLLM's server: what the engine says of itself, for comparison with a variant's card.

``GET /tiercel/account`` answers ``{"version": vLLM's, "torch": torch's, "ranks": [account, ...]}``, an
account per worker as :mod:`account_worker` makes it. Without that extension the answer is 501.
"""

from __future__ import annotations

from argparse import Namespace
from importlib.metadata import version
from typing import Any

import vllm
from fastapi import FastAPI, HTTPException, Request
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient

PATH = "/tiercel/account"


class AccountRoute:
    """The plugin; vLLM calls its two methods while it builds the server."""

    name = "tiercel-account"
    required_tasks = ()

    def attach_router(self, app: FastAPI) -> None:
        app.add_api_route(PATH, self.account, methods=["GET"])

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        state.tiercel_account_engine = engine_client

    async def account(self, request: Request) -> dict[str, Any]:
        engine = request.app.state.tiercel_account_engine
        if engine is None:
            raise HTTPException(503, "this server has no engine")
        try:
            ranks = await engine.collective_rpc("tiercel_account", timeout=60)
        except Exception as error:
            raise HTTPException(501, f"the workers have no account: {error}") from None
        return {"version": vllm.__version__, "torch": version("torch"), "ranks": ranks}
