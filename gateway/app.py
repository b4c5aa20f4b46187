"""The gateway, put together. A request's way is the list in ``create_app``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from starlette.routing import Route

from gateway.api.completions import Completions
from gateway.api.operations import add_error_handlers, health_router, metrics_router, models_router
from gateway.config import Config
from gateway.exchange import CHAT
from gateway.hops import AnswerClient, AskUpstream, ChooseRoute, Identify, Listen
from gateway.quality.observe import Observer
from gateway.routing.breaker import Clock
from gateway.routing.health import probe_forever
from gateway.routing.pools import Pools
from gateway.routing.router import Router
from gateway.telemetry.engines import EngineReader
from gateway.telemetry.ledger import Ledger
from gateway.telemetry.metrics import Metrics
from gateway.upstream.litellm import LiteLLM
from gateway.upstream.vllm import VLLM
from quantize.card import Card

COMPLETIONS = "/v1/completions"


def create_app(
    config: Config,
    cards: Mapping[str, Card],
    registry: CollectorRegistry | None = None,
    clock: Clock = time.monotonic,
) -> FastAPI:
    """The ASGI application. ``cards`` has the card of every served variant (``load_cards``)."""
    pools = Pools(config, clock)
    router = Router(config, cards, pools)
    metrics = Metrics(registry or CollectorRegistry(), config.roles)
    for variant, card in cards.items():
        metrics.weight_bytes.labels(variant).set(card.weight_bytes)
    observer = Observer(config, metrics)
    engines = VLLM(config.gateway)
    providers = LiteLLM(config.providers, config.gateway)

    hops = (
        Identify(config),  # who asks: role and session
        ChooseRoute(router),  # which precision, which replica, and why
        AskUpstream(config, router, engines, providers),  # retries only what never reached an engine
        Listen(observer),  # looks at an event after it was handed on
        AnswerClient(),  # gives the client what it asked for
    )
    ledger = Ledger(metrics, frozenset(router.known_models()))
    completions = Completions(hops, ledger, observer, config.gateway.max_body_bytes, clock)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        limits = config.gateway
        async with engines.connected() as session, providers.loaded():
            reader = EngineReader(session, metrics, config.run_dir)
            async with _in_background(
                probe_forever(session, pools.replicas(), limits.health_interval_s),
                reader.read_forever(pools.replicas(), limits.scrape_interval_s),
            ):
                yield

    app = FastAPI(title="Tiercel", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.router.routes += [
        Route(CHAT, completions, methods=["POST"]),
        Route(COMPLETIONS, completions, methods=["POST"]),
    ]
    app.include_router(models_router(router.known_models(), created=int(time.time())))
    app.include_router(health_router(pools))
    app.include_router(metrics_router(metrics.registry))
    add_error_handlers(app)
    return app


@asynccontextmanager
async def _in_background(*jobs: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run the jobs for as long as the block lasts."""
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
