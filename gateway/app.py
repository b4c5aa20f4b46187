"""The gateway, put together. A request's way is the list in ``make_snapshot``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, nullcontext, suppress
from typing import Any

import aiohttp
import msgspec
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from gateway.api.operations import REFUSALS, Operations, add_error_handlers
from gateway.api.overview import Overview
from gateway.api.watching import Watching
from gateway.config import Config, ConfigError
from gateway.console.files import Files
from gateway.proxy.hops import AskUpstream, ChooseRoute, Identify
from gateway.proxy.plane import DataPlane, Snapshot
from gateway.quality.detectors import check_classifier
from gateway.quality.inquiry import Inquiry
from gateway.quality.observe import Observer
from gateway.quality.process import CheckProcess
from gateway.quality.watch import Watch
from gateway.routing.breaker import Clock
from gateway.routing.discovery import INTERVAL_S, Discovery
from gateway.routing.health import probe_forever
from gateway.routing.pools import Pools
from gateway.routing.router import Router
from gateway.telemetry.engines import EngineReader
from gateway.telemetry.latencies import Latencies
from gateway.telemetry.metrics import Metrics
from gateway.upstream.litellm import LiteLLM
from gateway.wire.client import ClientConnection
from gateway.workers import Board, Siblings
from quantize.card import Card

CHECKS_START_S = 10.0
"""Seconds that the start waits for the checks that answers may have to pass before they are sent."""


class Gateway:
    """The application for everything that is not hot, and the data plane for what is."""

    def __init__(
        self,
        config: Config,
        cards: Mapping[str, Card],
        registry: CollectorRegistry | None = None,
        clock: Clock = time.monotonic,
        load: Callable[[], tuple[Config, Mapping[str, Card]]] | None = None,
        worker: int | None = None,
        discovery: Discovery | None = None,
    ) -> None:
        """``cards`` has the card of every served variant (``load_cards``). ``load`` reads both anew.
        ``worker``: its number, when several processes share the port."""
        self._discovery = discovery or Discovery()
        self._clock = clock
        self._load = load
        self._board: Board | None = None
        self.metrics = Metrics(registry or CollectorRegistry(), config.roles)
        self._siblings: Siblings | None = None
        if worker is not None:
            directory, workers = config.run_dir / "workers", config.gateway.workers
            self._board = Board(directory / "board", worker, workers)
            self._siblings = Siblings(directory, worker, workers, self.metrics)
        self.latencies = Latencies()
        self.watch = Watch(config, cards, self.metrics, self._avoid) if config.watch.enabled else None
        self.providers = LiteLLM(config.providers, config.gateway)
        self.checks = CheckProcess("checks", self.metrics)
        self.escalation = CheckProcess("escalation", self.metrics, niceness=0)
        self._inquiry = Inquiry(
            config.watch,
            config.model.name,
            lambda: self.plane.snapshot.pools,
            self.metrics,
            self._ask_provider,
        )
        self.plane = DataPlane(self.make_snapshot(config, cards), self.metrics, self.latencies, clock)
        self.app = FastAPI(
            title="Tiercel", lifespan=self._lifespan, docs_url=None, redoc_url=None, responses=REFUSALS
        )
        operations = Operations(
            self.plane, self.metrics, created=int(time.time()), apply=self.apply, siblings=self._siblings
        )
        operations.add_to(self.app)
        if self.watch is not None:
            Watching(self.watch, operations.admin).add_to(self.app)
        self.overview = Overview(
            self.plane, self.metrics, operations.admin, watch=self.watch, siblings=self._siblings
        )
        self.overview.add_to(self.app)
        Files().add_to(self.app)
        add_error_handlers(self.app)
        self.plane.app = self.app

    def make_snapshot(
        self, config: Config, cards: Mapping[str, Card], before: Pools | None = None
    ) -> Snapshot:
        """What a configuration makes of a request's way."""
        pools = Pools(
            config,
            self._clock,
            before,
            self._board,
            lambda variant: self._discovery.replicas(config, variant),
        )
        router = Router(
            config, cards, pools, self.latencies, lambda *asked: self.metrics.missed.labels(*asked).inc()
        )
        if self.watch is not None:
            router.avoid(self.watch.demoted())
        quality = config.quality
        if quality.detector == "classifier" and quality.classifier is not None:
            try:
                check_classifier(quality.classifier)
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"quality.classifier: {quality.classifier} cannot be used: {error}"
                ) from None
        observer = Observer(config, self.metrics, self.checks, self.escalation, self.watch, self._inquiry)
        for variant, card in cards.items():
            self.metrics.weight_bytes.labels(variant).set(card.weight_bytes)
        ask = AskUpstream(config, router, self.providers)
        return Snapshot(
            config=config,
            cards=cards,
            pools=pools,
            router=router,
            before=(
                Identify(config),  # who asks: the key, and then the body, the role and the session
            ),
            onward=(
                ChooseRoute(router),  # which precision, which replica, and why
                ask,  # there, as bytes; retried only if it never reached an engine
            ),
            # then, part by part as the engine answers: a reader observes (upstream/readers.py), and the
            # client gives the client what it asked for (wire/client.py)
            ask=ask,
            observer=observer,
            known_models=frozenset(router.known_models()),
            model=config.model.name,
        )

    def apply(self, config: Config, cards: Mapping[str, Card]) -> None:
        """A new configuration, for the requests that come from now on. Raises ConfigError for one that
        needs a new start, and then nothing has changed."""
        old = self.plane.snapshot.config.gateway
        for field in ("host", "port", "workers", "tls_certificate", "tls_key"):
            if getattr(config.gateway, field) != getattr(old, field):
                raise ConfigError(f"gateway.{field}: cannot change while the gateway runs; start it anew")
        watched = self.plane.snapshot.config.watch
        for field in ("enabled", "store", "store_env", "in_flight"):
            if getattr(config.watch, field) != getattr(watched, field):
                raise ConfigError(f"watch.{field}: cannot change while the gateway runs; start it anew")
        if self.watch is not None:
            self.watch.know(config, cards)
        self._inquiry.settings = config.watch
        snapshot = self.make_snapshot(config, cards, before=self.plane.snapshot.pools)
        self.metrics.know_roles(config.roles)
        self.metrics.forget_variants(
            config.serve, self.plane.snapshot.config.roles.keys() - config.roles.keys()
        )
        self.providers.know(config.providers)
        self.plane.snapshot = snapshot

    def reload(self) -> None:
        """Read the configuration anew. Raises ConfigError or CardError, and then nothing has changed."""
        if self._load is not None:
            self.apply(*self._load())

    def protocol(
        self, *, config: Any, server_state: Any, app_state: Any, _loop: Any = None
    ) -> ClientConnection:
        """A connection's protocol, for uvicorn (``http=``)."""
        return ClientConnection(self.plane, server_state.connections)

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        limits = self.plane.snapshot.config.gateway
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=limits.connect_timeout_s)
        siblings = self._siblings.listening() if self._siblings else nullcontext()
        jar = aiohttp.DummyCookieJar()
        async with aiohttp.ClientSession(timeout=timeout, cookie_jar=jar) as session, siblings:
            await self.providers.load()
            run_dir = self.plane.snapshot.config.run_dir
            note = self.watch.note_engine if self.watch else None
            reader = EngineReader(session, self.metrics, run_dir, self._clock, note)
            async with _in_background(
                probe_forever(session, self._replicas, limits.health_interval_s),
                reader.read_forever(self._replicas, limits.scrape_interval_s),
                self.plane.sweep_forever(),
                self.overview.sample_forever(),
                *((self.watch.run(session), self._inquiry.run(session)) if self.watch else ()),
                self.checks.run(),
                self.escalation.run(),
                self._discover_forever(),
            ):
                with suppress(TimeoutError):
                    async with asyncio.timeout(CHECKS_START_S):
                        await self.plane.snapshot.observer.ready()
                yield
                await self.plane.close()

    async def _ask_provider(self, model: str, body: bytes) -> bytes:
        """A judge that no pool of ours serves. The body is our own."""
        answer = await self.providers.once(model, msgspec.json.decode(body))
        return msgspec.json.encode(answer)

    def _avoid(self, demoted: Mapping[tuple[str, str], str]) -> None:
        self.plane.snapshot.router.avoid(demoted)

    async def _discover_forever(self) -> None:
        """Look replicas up that are known by name; requests that come use what was found."""
        while True:
            snapshot = self.plane.snapshot
            if await self._discovery.look(snapshot.config) and self.plane.snapshot is snapshot:
                self.apply(snapshot.config, snapshot.cards)
                left = set(snapshot.pools.replicas()) - set(self._replicas())
                self.metrics.forget((replica.variant, replica.name) for replica in left)
            await asyncio.sleep(INTERVAL_S)

    def _replicas(self) -> Any:
        return self.plane.snapshot.pools.replicas()


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
