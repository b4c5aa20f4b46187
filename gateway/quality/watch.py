"""The watch: outcomes of checks go into the store, one gateway folds them, and all of them obey.

What a request costs here is an append to a list. Everything else happens from time to time, in a thread
where it blocks, or at the engines' lowest priority. A store that fails is said in the log and tried again;
requests go on as they went.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import aiohttp

from gateway.config import Config, parts_of
from gateway.errors import BadRequestError, some_of
from gateway.quality.cells import Cell, CellKey, EventKind, Outcome, Status, WatchEvent
from gateway.quality.folding import Action, act, fold
from gateway.quality.rates import Watched
from gateway.quality.report import JudgeErrors, event_as_json, show_buckets, show_cells
from gateway.quality.store import Store
from gateway.quality.webhook import Webhook
from gateway.store.database import StoreError, configured_url
from gateway.telemetry.logs import EVENTS
from gateway.telemetry.metrics import Metrics
from quantize.card import Card

ROUND_S = 0.25
"""Between two rounds where a check has said something: then it is written, folded and read this soon."""
QUIET_S = 0.75
"""Between two rounds otherwise. Figures of engines and times wait as long, and so does what other gateways
have decided."""
LOOK_S = 1.0
"""Cells are read this often though nothing is known to have changed."""
LEADER_SILENT_S = 5.0
PRUNE_S = 600.0
MOST_WAITING = 50_000
"""Outcomes that wait for a store that does not answer; beyond, the newest are dropped and counted."""

T = TypeVar("T")


class Watch:
    """One gateway's part of it. ``changed`` is called with what routing must avoid, (variant, role) to
    why."""

    def __init__(
        self,
        config: Config,
        cards: Mapping[str, Card],
        metrics: Metrics,
        changed: Callable[[Mapping[tuple[str, str], str]], None],
        clock: Callable[[], float] = time.time,
        store: Store | None = None,
    ) -> None:
        """``clock``: Unix time."""
        self._metrics = metrics
        self._changed = changed
        self._clock = clock
        self._holder = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._url = store_url(config)
        self._store = store
        self._thread = ThreadPoolExecutor(1, "watch")
        self._waiting: list[Outcome] = []
        self._urgent = False
        """Something waits that a round is to be made for soon."""
        self._webhook = Webhook(lambda: self._watched.config.watch.webhook, metrics)
        self._events = logging.getLogger(EVENTS)
        self._decisions = -1
        self._beats, self._beats_at = -1, 0.0
        self._pruned = 0.0
        self._looked = float("-inf")
        self._failing = False
        self.leading = False
        self.cells: dict[CellKey, Cell] = {}
        """As they were read last."""
        self.know(config, cards)

    def know(self, config: Config, cards: Mapping[str, Card]) -> None:
        """The configuration in use. The store stays what it was at the start."""
        self.prepare(config, cards)()

    def prepare(self, config: Config, cards: Mapping[str, Card]) -> Callable[[], None]:
        """What a configuration makes of it, for ``know``; nothing changes until the result is called."""
        watched = Watched.of(config, cards)

        def take_over() -> None:
            self._watched = watched

        return take_over

    # what others ask of it

    def key(self, variant: str, role: str) -> CellKey | None:
        """None for what is not watched: the reference that a role's others are held to, and providers."""
        return self._watched.keys.get((variant, role))

    def note(
        self,
        key: CellKey,
        check: str,
        bad: bool,
        value: float | None = None,
        *,
        probation: bool = False,
        soon: bool = True,
    ) -> None:
        """One check of one answer. ``soon``: it is worth a round of its own. A value that is no number says
        nothing."""
        if value is not None and not math.isfinite(value):
            return
        if len(self._waiting) >= MOST_WAITING:
            self._metrics.watch_dropped.labels().inc()
            return
        self._waiting.append(Outcome(key, check, bad, self._clock(), value, probation))
        self._urgent |= soon

    def note_engine(
        self, variant: str, memory: float | None, kv_cache: float | None, preempted: float | None
    ) -> None:
        """What an engine has said of itself: bytes, the share of its KV cache in use, and requests that were
        thrown out of it since it was asked last."""
        key = self._watched.engines.get(variant)
        for check, value in (("memory", memory), ("kv_cache", kv_cache), ("preemptions", preempted)):
            if key is not None and value is not None:
                self.note(key, check, False, value, soon=False)

    def note_latency(self, variant: str, first_token_s: float | None, gap_s: float | None) -> None:
        """Of one streamed answer: seconds to its first token, and the mean between its chunks."""
        key = self._watched.engines.get(variant)
        for check, value in (("first_token", first_token_s), ("token_gap", gap_s)):
            if key is not None and value is not None:
                self.note(key, check, False, value, soon=False)

    def suspected(self, key: CellKey) -> bool:
        """Whether a check has seen enough to ask for another one's opinion."""
        cell, policy = self.cells.get(key), self._watched.policies.get(key)
        return bool(cell and policy and cell.warned(policy))

    def unusual(self, key: CellKey, nll_mean: float) -> bool:
        """Whether an answer's mean -log p is out of the range that has been learned."""
        cell = self.cells.get(key)
        usual = cell.tracks["signals"].usual if cell and "signals" in cell.tracks else None
        return usual is not None and not usual[0] <= nll_mean <= usual[1]

    def on_probation(self, role: str) -> list[CellKey]:
        """Variants whose answers to the role's requests are to be judged before anybody gets them."""
        return [
            key
            for (_, of), key in self._watched.keys.items()
            if of == role
            and (cell := self.cells.get(key))
            and cell.status is Status.PROBATION
            and not cell.pinned
        ]

    def demoted(self) -> dict[tuple[str, str], str]:
        """What routing must avoid, and why."""
        return {
            pair: cell.why
            for pair, key in self._watched.keys.items()
            if (cell := self.cells.get(key)) is not None and not cell.serves
        }

    async def act(self, action: Action, variant: str, role: str, why: str) -> WatchEvent:
        """A person's word, which is obeyed at once. ``variant``: ``model:variant``, or the variant alone
        where one model alone has it. Raises BadRequestError or StoreError."""
        key = self._named(variant, role)
        event = await self._in_thread(lambda: self._act(action, key, why))
        await self._refresh(changed=True)
        self._announce([event])
        return event

    def _named(self, variant: str, role: str) -> CellKey:
        """Raises BadRequestError."""
        keys = self._watched.keys
        if (key := keys.get((variant, role))) is not None:
            return key
        found = {one: key for (one, of), key in keys.items() if of == role and parts_of(one)[1] == variant}
        if len(found) == 1:
            return next(iter(found.values()))
        if found:
            raise BadRequestError(
                f"variant: several models have {variant[:80]!r}; send one of: {some_of(sorted(found))}",
                param="variant",
            )
        known = some_of(sorted({variant for variant, _ in keys})) or "none"
        roles = some_of(sorted(self._watched.config.roles))
        raise BadRequestError(
            f"variant: no watched variant {variant[:80]!r} serves a role {role[:80]!r}; "
            f"variants: {known}; roles: {roles}",
            param="variant",
        )

    async def know_judge(self, errors: JudgeErrors) -> None:
        """How often the judge is wrong, measured on labelled answers. Raises BadRequestError or
        StoreError."""
        judge = self._watched.config.watch.judge
        if judge is None or errors.model != judge.model:
            has = f"the judge is {judge.model!r}" if judge else "there is no judge; set watch.judge"
            raise BadRequestError(f"model: {errors.model[:80]!r} does not judge; {has}", param="model")
        await self._in_thread(lambda: self._open().remember("judge", errors.model_dump()))

    async def report(self, since_s: float = 3600.0, events: int = 100) -> dict[str, Any]:
        """All that is known: cells with their checks, events, and sums over time for charts."""
        since = self._clock() - since_s

        def read() -> tuple[dict[CellKey, Cell], list[WatchEvent], Sequence[Any], dict[str, Any] | None]:
            store = self._open()
            return store.cells(), store.events(events), store.buckets(since), store.remembered("judge")

        cells, happened, buckets, judge = await self._in_thread(read)
        settings = self._watched.config.watch
        known = judge is not None and settings.judge is not None and judge["model"] == settings.judge.model
        errors = JudgeErrors.model_validate(judge) if known else None
        self._obey(cells)
        return {
            "time": self._clock(),
            "leading": self.leading,
            "agree": settings.agree,
            "judge": errors.model_dump() if errors else None,
            "cells": show_cells(self._watched, cells, errors),
            "events": [event_as_json(event) for event in happened],
            "buckets": show_buckets(self._watched, buckets),
        }

    # going

    async def run(self) -> None:
        """Until cancelled; then what is left is written. It may be run again after a failure."""
        try:
            while True:
                await self._round()
                await self._rest()
        except asyncio.CancelledError:
            with contextlib.suppress(Exception):
                await asyncio.shield(self._in_thread(self._leave))
            self._thread.shutdown(wait=False)
            raise

    async def _rest(self) -> None:
        """Until the next round."""
        quiet_until = time.monotonic() + QUIET_S
        while True:
            await asyncio.sleep(ROUND_S)
            if self._urgent or time.monotonic() >= quiet_until:
                return

    async def _round(self) -> None:
        outcomes, self._waiting, self._urgent = self._waiting, [], False
        try:
            events = await self._in_thread(lambda: self._write_and_fold(outcomes))
            changed, outcomes = bool(events or (outcomes and self.leading)), []
            self._announce(events)
            await self._refresh(changed)
            self._failing = False
        except StoreError as error:
            if not self._failing:
                self._events.error("the watch's store fails; it is tried again: %s", error)
            self._failing = True
            self._waiting = (outcomes + self._waiting)[:MOST_WAITING]
        except Exception:
            self._metrics.quality_errors.labels("rounds").inc()
            self._events.exception("a round of the watch failed")

    def _write_and_fold(self, outcomes: Sequence[Outcome]) -> list[WatchEvent]:
        store = self._open()
        now = time.monotonic()
        lost = now - self._beats_at > LEADER_SILENT_S
        leading, beats = store.lead(self._beats, lost and self._beats >= 0)
        if beats != self._beats:
            self._beats, self._beats_at = beats, now
        self.leading = leading
        if not leading:
            store.append(outcomes)
            return []
        if now - self._pruned > PRUNE_S:
            self._pruned = now
            store.prune(self._clock())
        return fold(store, outcomes, self._watched, self._clock(), self._beats)

    def _act(self, action: Action, key: CellKey, why: str) -> WatchEvent:
        store = self._open()
        cell = store.cells().get(key) or Cell(key=key)
        cell.gate = self._watched.gates[key.variant]
        event = act(action, cell, why, self._clock())
        store.change([cell], [event])
        return event

    async def _refresh(self, changed: bool) -> None:
        """Read what all gateways are to obey, if it has changed. ``changed``: this process has changed it."""

        def read() -> tuple[int, dict[CellKey, Cell] | None]:
            store = self._open()
            decisions, now = store.decisions(), time.monotonic()
            if not changed and decisions == self._decisions and now - self._looked < LOOK_S:
                return decisions, None
            self._looked = now
            return decisions, store.cells()

        decisions, cells = await self._in_thread(read)
        if cells is not None:
            self._obey(cells)
        self._decisions = decisions

    def _obey(self, cells: dict[CellKey, Cell]) -> None:
        """What is told, by reports and figures, is what routing does from now on."""
        self.cells = cells
        self._show()
        self._changed(self.demoted())

    def _show(self) -> None:
        for (variant, role), key in self._watched.keys.items():
            cell = self.cells.get(key)
            asked = role, *parts_of(variant)
            self._metrics.demoted.labels(*asked).set(cell is not None and not cell.serves)
            for check, track in cell.tracks.items() if cell else ():
                self._metrics.cusum.labels(*asked, check).set(track.evidence)

    def _announce(self, events: Sequence[WatchEvent]) -> None:
        for event in events:
            serious = event.kind in (EventKind.DEMOTED, EventKind.HELD_BACK, EventKind.FAILED_PROBATION)
            self._events.log(
                logging.WARNING if serious else logging.INFO,
                "watch: %s %s for %s: %s",
                event.key.variant,
                event.kind.value,
                event.key.role,
                event.why,
                extra={"fields": event_as_json(event)},
            )
            labels = event.key.role, *parts_of(event.key.variant), event.kind.value
            self._metrics.watch_events.labels(*labels).inc()
            self._webhook.offer(event)

    async def post_forever(self, session: aiohttp.ClientSession) -> None:
        """Events to the webhook, in order."""
        await self._webhook.run(session)

    def _leave(self) -> None:
        store = self._open()
        store.append(self._waiting)
        self._waiting = []
        store.resign()
        store.close()

    def _open(self) -> Store:
        if self._store is None:
            if self._url.startswith("sqlite:///"):
                self._watched.config.run_dir.mkdir(parents=True, exist_ok=True)
            self._store = Store(self._url, self._holder)
        return self._store

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def store_url(config: Config) -> str:
    """Where the watch keeps what it knows. Raises ConfigError for a variable that is not set."""
    settings = config.watch
    given = configured_url("watch", settings.store, settings.store_env)
    return given or f"sqlite:///{config.run_dir / 'watch.db'}"
