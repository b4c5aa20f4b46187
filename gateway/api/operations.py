"""What is not the hot path: models, health, readiness, metrics, and errors of unknown paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException

from gateway.errors import BadRequestError, GatewayError, UnexpectedError, envelope
from gateway.exchange import request_id
from gateway.routing.pools import Pools


def models_router(models: Sequence[str], created: int) -> APIRouter:
    """``GET /v1/models``: every id that a request may name. ``created`` is Unix time."""
    router = APIRouter()

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        entries = [
            {"id": model, "object": "model", "created": created, "owned_by": "tiercel"} for model in models
        ]
        return {"object": "list", "data": entries}

    return router


def health_router(pools: Pools) -> APIRouter:
    """``GET /health``: the process lives. ``GET /readiness``: every served variant can be reached."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/readiness")
    async def readiness() -> JSONResponse:
        detail = {
            variant: {
                "reachable": pool.reachable,
                "replicas": {
                    replica.name: {
                        "url": replica.url,
                        "reachable": bool(replica.reachable),
                        "usable": replica.breaker.closed,
                        "in_flight": replica.in_flight,
                    }
                    for replica in pool.replicas
                },
            }
            for variant, pool in pools.by_variant.items()
        }
        missing = [variant for variant, pool in pools.by_variant.items() if not pool.reachable]
        body = {"ready": not missing, "not_reachable": missing, "pools": detail}
        return JSONResponse(body, status_code=503 if missing else 200)

    return router


def metrics_router(registry: CollectorRegistry) -> APIRouter:
    """``GET /metrics``: Prometheus text."""
    router = APIRouter()

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return router


def add_error_handlers(app: FastAPI) -> None:
    """Give the errors outside the hot path the same envelope."""

    def answer(
        request: Request, error: GatewayError, status: int, more: Mapping[str, str] | None = None
    ) -> JSONResponse:
        headers = {"x-request-id": request_id(dict(request.headers)), **(more or {})}
        return JSONResponse(envelope(error), status_code=status, headers=headers)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = f"{request.method} {request.url.path}"[:200]
        return answer(request, BadRequestError(f"{what}: {error.detail}."), error.status_code, error.headers)

    async def unexpected(request: Request, error: Exception) -> Response:
        return answer(request, UnexpectedError(repr(error)), 500)

    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(Exception, unexpected)
