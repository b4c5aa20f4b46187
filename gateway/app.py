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

from gateway.api.failures import add_error_handlers
from gateway.api.models import Models
from gateway.api.operations import REFUSALS, Operations
from gateway.api.overview import Overview
from gateway.api.watching import Watching
from gateway.config import Config, ConfigError
from gateway.console.files import Files
from gateway.proxy.attempts import Attempts, Limits
from gateway.proxy.exchange import Exchange
from gateway.proxy.hops import Admit, ChooseRoute, Identify, Observe, ReadBody
from gateway.proxy.pipeline import Pipeline
from gateway.proxy.plane import DataPlane, Snapshot
from gateway.proxy.record import Record
from gateway.quality.detectors import check_classifier
from gateway.quality.inquiry import Inquiry
from gateway.quality.observe import Observer
from gateway.quality.process import CheckProcess
from gateway.quality.watch import Watch
from gateway.routing.breaker import Clock
from gateway.routing.discovery import INTERVAL_S, Discovery
from gateway.routing.health import probe_forever
from gateway.routing.hedging import Hedging
from gateway.routing.pools import Pools
from gateway.routing.router import Router
from gateway.telemetry.engines import EngineReader
from gateway.telemetry.metrics import Metrics
from gateway.upstream.litellm import LiteLLM
from gateway.upstream.vllm import Engines
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
        self.hedging = Hedging()
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
        self.plane = DataPlane(self.metrics, clock)
        self.plane.snapshot = self.make_snapshot(config, cards)
        self.app = FastAPI(
            title="Tiercel", lifespan=self._lifespan, docs_url=None, redoc_url=None, responses=REFUSALS
        )
        operations = Operations(self.plane, self.metrics, apply=self.apply, siblings=self._siblings)
        operations.add_to(self.app)
        Models(self.plane, created=int(time.time())).add_to(self.app)
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
            config, cards, pools, self.hedging, lambda *asked: self.metrics.missed.labels(*asked).inc()
        )
        if self.watch is not None:
            router.avoid(self.watch.demoted())
        observer = make_observer(
            config, self.metrics, self.checks, self.escalation, self.watch, self._inquiry
        )
        for variant, card in cards.items():
            self.metrics.weight_bytes.labels(variant).set(card.weight_bytes)
        plane, observe = self.plane, Observe(observer)
        names = (config.model.name, *config.roles, *config.adapters, *router.known_models())
        pipeline = Pipeline(
            before=(
                ReadBody(config),  # what is asked
                Identify(),  # who asks: role and session; the key was looked at with the head
            ),
            attempts=Attempts(
                limits=limits_of(config),
                choose=ChooseRoute(router),  # which precision, which replica, and why
                router=router,
                engines=Engines(config),  # there, as bytes
                providers=self.providers,
                reply=plane.reply,  # what the client gets of it, part by part
                lines=plane.lines,
                clock=self._clock,
                checks=observer,
                took=self._took,
                escalated=lambda exchange, why: self._escalated(observe, exchange, why),
                may_hedge=self.hedging.allow,
            ),
            reply=plane.reply,
            after=(
                lambda record, _: plane.ledger.record(record, log=config.gateway.access_log),
                lambda record, exchange: self._end_span(record, exchange, config.model.name),
                observe,  # has answers checked that were listened to
            ),
            known_models=frozenset(names),
            clock=self._clock,
            ended=plane.ended,
        )
        return Snapshot(
            config=config,
            cards=cards,
            pools=pools,
            router=router,
            admit=Admit(config),  # the head alone: path, method, key, size
            pipeline=pipeline,
            observer=observer,
            model=config.model.name,
        )

    def _took(self, exchange: Exchange, seconds: float) -> None:
        if exchange.route is not None and exchange.route.kind is not None:
            self.hedging.seconds(exchange.route.kind, seconds)

    def _escalated(self, observe: Observe, exchange: Exchange, why: str) -> None:
        if exchange.route is not None:
            self.metrics.escalations.labels(exchange.route.role, exchange.route.variant, why).inc()
        observe.offer(exchange)

    def _end_span(self, record: Record, exchange: Exchange, model: str) -> None:
        if exchange.span is not None and self.plane.traces is not None:
            self.plane.traces.end(exchange.span, record, model)

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
            await self.providers.close()

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


def make_observer(
    config: Config,
    metrics: Metrics,
    checks: CheckProcess,
    escalation: CheckProcess,
    watch: Watch | None,
    inquiry: Inquiry | None,
) -> Observer:
    """Raises ConfigError for a classifier that cannot be used."""
    quality = config.quality
    if quality.detector == "classifier" and quality.classifier is not None:
        try:
            check_classifier(quality.classifier)
        except (OSError, ValueError) as error:
            raise ConfigError(f"quality.classifier: {quality.classifier} cannot be used: {error}") from None
    return Observer(config, metrics, checks, escalation, watch, inquiry)


def limits_of(config: Config) -> Limits:
    """What attempts may take and do, by the configuration."""
    gateway, quality = config.gateway, config.quality
    return Limits(
        first_byte_s=gateway.first_byte_timeout_s,
        answer_s=gateway.answer_timeout_s,
        idle_s=gateway.idle_timeout_s,
        total_s=gateway.total_timeout_s,
        wait_s={name: role.wait_s for name, role in config.roles.items()},
        escalates=frozenset(name for name, role in config.roles.items() if role.escalate),
        escalated_share=config.watch.escalated_share,
        listened_share=quality.sample_rate if quality.logprobs else 0.0,
        adapters=frozenset(config.adapters),
    )


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
