"""The gateway, put together. A request's way is the list in ``_make_pipeline``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
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
from gateway.cards import LOOK_EVERY_S, CardWatch, Read, load_cards
from gateway.config import Config, ConfigError, GatewaySettings, parse_config, parts_of, refuse_fixed
from gateway.console.files import Files
from gateway.control import Commit, Heartbeat, Reloads, Supervisor
from gateway.kept.keeper import Keeper
from gateway.proxy.attempts import Attempts
from gateway.proxy.exchange import Attempt, Exchange
from gateway.proxy.grammars import BoundGrammars
from gateway.proxy.hops import Admit, ChooseRoute, Identify, Keep, Observe, Pace, ReadBody, Settle
from gateway.proxy.large import LargeReader
from gateway.proxy.limits import limits_of
from gateway.proxy.pipeline import Pipeline
from gateway.proxy.plane import DataPlane, Snapshot
from gateway.proxy.record import Record
from gateway.quality.detectors import check_classifier
from gateway.quality.inquiry import Inquiry
from gateway.quality.observe import Observer
from gateway.quality.process import CheckProcess
from gateway.quality.watch import Watch
from gateway.responses.api import ResponseRoutes
from gateway.responses.background import Background
from gateway.responses.hop import ContinueResponse
from gateway.responses.service import Responses, store_url
from gateway.routing.breaker import Clock
from gateway.routing.discovery import INTERVAL_S, Discovery
from gateway.routing.health import Prober
from gateway.routing.hedging import Hedging
from gateway.routing.pace import Paces
from gateway.routing.pools import Pools
from gateway.routing.replicas import Replica
from gateway.routing.router import Router
from gateway.telemetry.counters import Family, GaugeFamily
from gateway.telemetry.engines import EngineReader
from gateway.telemetry.exposition import Exposition, Numbers
from gateway.telemetry.logs import AccessLog
from gateway.telemetry.metrics import Metrics
from gateway.upstream.litellm import LiteLLM
from gateway.upstream.settle import Settlement
from gateway.upstream.vllm import Engines
from gateway.wire.client import ClientConnection
from gateway.workers.board import Board
from gateway.workers.channel import ToParent
from gateway.workers.sheet import Sheet, Sheets
from quantize.card import Card

CHECKS_START_S = 10.0
"""Seconds that the start waits for the checks that answers may have to pass before they are sent."""
LEAST_DRAIN_S = 2.0
"""Seconds for answers to be looked at and prompts to be counted, where requests took all of the time."""


class Gateway:
    """The application for everything that is not hot, and the data plane for what is."""

    def __init__(
        self,
        config: Config,
        cards: Mapping[str, Card],
        registry: CollectorRegistry | None = None,
        clock: Clock = time.monotonic,
        load: Read | None = None,
        worker: int | None = None,
        parent: ToParent | None = None,
        discovery: Discovery | None = None,
        log: AccessLog | None = None,
    ) -> None:
        """``cards`` has the card of every served variant (``load_cards``). ``load`` reads both anew.
        ``worker``: its number, when several processes share the port; ``parent``: the way to theirs."""
        self._discovery = discovery or Discovery()
        self._clock = clock
        self._load = load
        self._parent = parent
        self._board: Board | None = None
        self._sheet: Sheet | None = None
        self._sheets: Sheets | None = None
        if worker is not None:
            directory, workers = config.run_dir / "workers", config.gateway.workers
            self._board = Board(directory / "board", worker, workers)
            self._sheet, self._sheets = Sheet(directory, worker), Sheets(directory, workers)
        self.metrics = Metrics(registry or CollectorRegistry(), config.roles, self._sheet)
        self.log = log or AccessLog()
        self.hedging = Hedging()
        self.paces = Paces(clock)
        self.watch = Watch(config, cards, self.metrics, self._avoid) if config.watch.enabled else None
        self.providers = LiteLLM(config.providers, config.gateway)
        self.checks = CheckProcess("checks", self.metrics)
        self.escalation = CheckProcess("escalation", self.metrics, niceness=0)
        self.keeper = Keeper(config, self.metrics, self.checks)
        self._inquiry = Inquiry(
            config.watch,
            config.references,
            lambda: self.plane.snapshot.pools,
            self.metrics,
            self._ask_provider,
        )
        self.plane = DataPlane(self.metrics, clock, self.log)
        self.responses = Responses(config.responses, store_url(config), self.metrics)
        self._background = Background(self.responses, self.plane.serve, self.plane.intake)
        self.settlement = Settlement(self.metrics, self.plane.ledger.spend)
        self.plane.snapshot = self.make_snapshot(config, cards)
        self._show(cards)
        self.supervisor = Supervisor(self.metrics)
        self.reloads = Reloads(self.build, self._read)
        self.stopping_since: float | None = None
        """By ``time.monotonic``: when the process was told to end."""
        self.app = FastAPI(
            title="Tiercel", lifespan=self._lifespan, docs_url=None, redoc_url=None, responses=REFUSALS
        )
        self.overview = self._add_routes(parent)
        self.plane.app = self.app

    def _add_routes(self, parent: ToParent | None) -> Overview:
        """Everything that FastAPI answers."""
        exposition = Exposition(self.metrics.families, self.metrics.registry, self._numbers)
        replace = parent.replace if parent is not None else self.reloads.replace
        operations = Operations(self.plane, exposition, replace)
        operations.add_to(self.app)
        Models(self.plane, created=int(time.time())).add_to(self.app)
        if self.watch is not None:
            Watching(self.watch, operations.admin).add_to(self.app)
        ResponseRoutes(self.plane, self.responses, self._background).add_to(self.app)
        overview = Overview(self.plane, self.metrics, operations.admin, watch=self.watch, sheets=self._sheets)
        overview.add_to(self.app)
        Files().add_to(self.app)
        add_error_handlers(self.app)
        return overview

    def make_snapshot(
        self, config: Config, cards: Mapping[str, Card], before: Snapshot | None = None
    ) -> Snapshot:
        """What a configuration makes of a request's way. Changes nothing; raises ConfigError."""
        pools = Pools(
            config,
            self._clock,
            before.pools if before is not None else None,
            self._board,
            lambda variant: self._discovery.replicas(config, variant),
        )
        router = Router(
            config,
            cards,
            pools,
            self.hedging,
            lambda *asked: self.metrics.missed.labels(*asked).inc(),
            self.paces,
        )
        if self.watch is not None:
            router.avoid(self.watch.demoted())
        observer = before.observer if before is not None and before.config is config else None
        if observer is None:
            refuse_classifier(config)
            observer = Observer(
                config, self.metrics, self.checks, self.escalation, self.watch, self._inquiry, self.keeper
            )
        return Snapshot(
            config=config,
            cards=cards,
            pools=pools,
            router=router,
            admit=Admit(config),  # the head alone: path, method, key, size
            pipeline=self._make_pipeline(config, router, observer),
            observer=observer,
        )

    def _make_pipeline(self, config: Config, router: Router, observer: Observer) -> Pipeline:
        """What every request goes through that has been admitted, in order."""
        plane, observe, limits, large = self.plane, Observe(observer), limits_of(config), LargeReader()
        names = frozenset(router.known_models())
        return Pipeline(
            before=(
                ReadBody(large),  # what is asked
                BoundGrammars(config, large),  # no grammar that would keep an engine busy
                Identify(),  # who asks: role and session; the key was looked at with the head
                # what `previous_response_id` goes on from, and what is kept to go on from
                ContinueResponse(self.responses, self._background, plane.reply, names),
            ),
            attempts=Attempts(
                limits=limits,
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
                partial(plane.ledger.record, log=config.gateway.access_log),  # books and log
                *((self._end_span,) if plane.traces is not None else ()),
                Settle(self.settlement),  # what no engine has counted
                *((Pace(self.paces),) if limits.paced else ()),  # how soon its pool answers
                observe,  # has answers checked that were listened to
                *((Keep(self.keeper, config.adapters),) if config.kept is not None else ()),  # what is asked
            ),
            known_models=names,
            clock=self._clock,
            ended=plane.ended,
        )

    def _took(self, exchange: Exchange, attempt: Attempt, seconds: float) -> None:
        if exchange.route is not None and exchange.route.kind is not None:
            self.hedging.seconds(exchange.route.kind, seconds)
        if exchange.options.stream and not (exchange.tries or exchange.hedged or exchange.spent):
            self.paces.first_token(attempt.replica.variant, seconds, attempt.replica.in_flight)

    def _escalated(self, observe: Observe, exchange: Exchange, why: str) -> None:
        if exchange.route is not None:
            route = exchange.route
            self.metrics.escalations.labels(route.role, *route.replica.labels, why).inc()
        observe.offer(exchange)

    def _end_span(self, record: Record, exchange: Exchange) -> None:
        if exchange.span is not None and self.plane.traces is not None:
            self.plane.traces.end(exchange.span, record)

    def build(self, config: Config, cards: Mapping[str, Card]) -> Commit:
        """What a configuration needs, ready to be taken over; changes nothing until then. Raises ConfigError
        for one that cannot be used, or that needs a new start."""
        before = self.plane.snapshot
        refuse_fixed(config, before.config)
        snapshot = self.make_snapshot(config, cards, before)
        anew = config is not before.config
        recarded = anew or cards is not before.cards
        watch = self.watch.prepare(config, cards) if self.watch is not None and recarded else None

        def commit() -> None:
            if anew:
                self._inquiry.settings, self._inquiry.references = config.watch, config.references
                self.metrics.know_roles(config.roles)
                served = frozenset(map(parts_of, config.served))
                self.metrics.forget_variants(served, before.config.roles.keys() - config.roles.keys())
                self.providers.know(config.providers)
                self.responses.know(config.responses)
                self.keeper.know(config)
            if recarded:
                self._show(cards)
            if watch is not None:
                watch()
            if self.watch is not None:  # somebody may have been demoted meanwhile
                snapshot.router.avoid(self.watch.demoted())
            self.plane.snapshot = snapshot
            gone = set(before.pools.replicas()) - set(snapshot.pools.replicas())
            for replica in gone:
                replica.connections.close()
            self.metrics.forget((*replica.labels, replica.name) for replica in gone)

        return commit

    async def reload(self) -> None:
        """Read the configuration anew. Raises ConfigError or CardError, and then nothing has changed."""
        if self._load is not None:
            await self.reloads.apply(self._load)

    def _read(self, text: str) -> tuple[Config, Mapping[str, Card]]:
        config = parse_config(text, "the configuration sent", self.plane.snapshot.config.directory)
        return config, load_cards(config)

    def _show(self, cards: Mapping[str, Card]) -> None:
        for variant, card in cards.items():
            self.metrics.weight_bytes.labels(*parts_of(variant)).set(card.weight_bytes)

    def _numbers(self, family: Family[Any]) -> Numbers:
        """What all workers have counted of a metric, and how they are."""
        sheets = self._sheets
        if sheets is not None and family in (self.metrics.worker_age, self.metrics.worker_restarts):
            found = sheets.ages() if family is self.metrics.worker_age else sheets.restarts()
            return {(str(worker),): [value] for worker, value in found.items()}
        if sheets is None or isinstance(family, GaugeFamily):
            return family.numbers()
        return sheets.numbers(family.name)

    def protocol(
        self, *, config: Any, server_state: Any, app_state: Any, _loop: Any = None
    ) -> ClientConnection:
        """A connection's protocol, for uvicorn (``http=``)."""
        return ClientConnection(self.plane, server_state.connections)

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=self.plane.snapshot.config.gateway.connect_timeout_s
        )
        async with aiohttp.ClientSession(timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()) as session:
            await self.providers.load()
            prober = self._begin_jobs(session)
            try:
                with suppress(TimeoutError):
                    async with asyncio.timeout(CHECKS_START_S):
                        await self.plane.snapshot.observer.ready()
                yield
            finally:
                await self._finish()
                await self.supervisor.stop()
                await self.providers.close()
                await prober.stop()
                self._count_dropped()
                await asyncio.to_thread(self.log.writer.close)

    async def _finish(self) -> None:
        """End what runs, and write down what is left to be said of it, as long as the jobs still run."""
        stop_by = (self.stopping_since or time.monotonic()) + self._gateway_settings().shutdown_timeout_s
        await self.plane.close(max(LEAST_DRAIN_S, stop_by - time.monotonic()))
        left_s = max(LEAST_DRAIN_S, stop_by - time.monotonic())
        settled = asyncio.create_task(self.settlement.drain(left_s))
        await self._background.close()
        await self.responses.close()
        await settled

    def _begin_jobs(self, session: aiohttp.ClientSession) -> Prober:
        """Everything that goes on beside requests. What is begun first ends last."""
        jobs, config = self.supervisor, self._gateway_settings
        prober = Prober(session, self._replicas)
        note = self.watch.note_engine if self.watch else None
        reader = EngineReader(session, self.metrics, self.plane.snapshot.config.run_dir, self._clock, note)
        beats = [self._count_dropped, *([self._sheet.beat] if self._sheet else ())]
        if self.watch is not None:
            watch = self.watch
            jobs.keep("watch", watch.run)
            jobs.keep("watch_events", lambda: watch.post_forever(session))
            jobs.keep("inquiry", lambda: self._inquiry.run(session))
        jobs.keep("kept", self.keeper.run)
        jobs.keep("checks", self.checks.run)
        jobs.keep("escalation", self.escalation.run)
        jobs.keep("heartbeat", Heartbeat(self.metrics, *beats).run)
        jobs.keep("sweep", self.plane.sweep_forever)
        jobs.every("probes", lambda: config().health_interval_s, prober.once)
        jobs.every("scrapes", lambda: config().scrape_interval_s, lambda: reader.read(self._replicas))
        jobs.keep("responses", self._background.beat_forever)
        jobs.keep("settlement", lambda: self.settlement.run(session))
        jobs.keep("overview", self.overview.sample_forever)
        jobs.every("discovery", lambda: INTERVAL_S, self._discover)
        if self._load is not None:
            cards = CardWatch(self._present, self.reloads.apply)
            jobs.every("cards", lambda: LOOK_EVERY_S, cards.look)
        return prober

    def _count_dropped(self) -> None:
        self.metrics.log_dropped.labels().inc(self.log.writer.take_dropped())

    async def _ask_provider(self, model: str, body: bytes) -> bytes:
        """A judge that no pool of ours serves. The body is our own."""
        answer = await self.providers.once(model, msgspec.json.decode(body))
        return msgspec.json.encode(answer)

    def _avoid(self, demoted: Mapping[tuple[str, str], str]) -> None:
        self.plane.snapshot.router.avoid(demoted)

    async def _discover(self) -> None:
        """Look replicas up that are known by name; requests that come use what was found."""
        await self._discovery.look(self.plane.snapshot.config)
        if self._discovery.differs(self.plane.snapshot.config, self.plane.snapshot.pools):
            await self.reloads.apply(self._present)

    def _present(self) -> tuple[Config, Mapping[str, Card]]:
        return self.plane.snapshot.config, self.plane.snapshot.cards

    def _gateway_settings(self) -> GatewaySettings:
        return self.plane.snapshot.config.gateway

    def _replicas(self) -> Iterable[Replica]:
        return self.plane.snapshot.pools.replicas()


def refuse_classifier(config: Config) -> None:
    """Raises ConfigError for a classifier that cannot be used."""
    quality = config.quality
    if quality.detector == "classifier" and quality.classifier is not None:
        try:
            check_classifier(quality.classifier)
        except (OSError, ValueError) as error:
            raise ConfigError(f"quality.classifier: {quality.classifier} cannot be used: {error}") from None
