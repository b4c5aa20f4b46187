"""The watch: outcomes of checks go into the store, one gateway folds them, and all of them obey.

What a request costs here is an append to a list. Everything else happens from time to time, in a thread
where it blocks, or at the engines' lowest priority. A store that fails is said in the log and tried again;
requests go on as they went.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, Literal, TypeVar

import aiohttp
from pydantic import BaseModel, Field

from gateway.config import Config, ConfigError
from gateway.errors import BadRequestError
from gateway.quality.cells import Cell, Event, EventKind, Key, Outcome, Policy, Status
from gateway.quality.sequential import confidence_sequence, corrected_share, threshold
from gateway.quality.store import Store, StoreError
from gateway.telemetry.logs import EVENTS
from gateway.telemetry.metrics import Metrics
from quantize.card import Card

ROUND_S = 0.25
"""Between two rounds: outcomes are written, folded and read this often."""
LEADER_SILENT_S = 5.0
PRUNE_S = 600.0
MOST_WAITING = 50_000
"""Outcomes that wait for a store that does not answer; beyond, the newest are dropped and counted."""
WEBHOOK_TRIES, WEBHOOK_TIMEOUT_S = 4, 5.0

DEFAULT_RATES: Mapping[str, tuple[float, float]] = {
    "shadow": (0.05, 0.2),
    "regenerated": (0.1, 0.3),
    "signals": (0.1, 0.35),
    "rules": (0.02, 0.12),
    "judge": (0.1, 0.3),
}
"""Check to the tolerated and the alarming share, where neither the role nor the card says another one. The
rules for grounded answers have none: how often they are wrong depends on the role, which its card knows."""

ENGINE = "(engine)"
"""What stands for the role in the cells of engines themselves."""
SAID: Mapping[str, tuple[float, float]] = {
    "first_token": (0.1, 0.5),
    "token_gap": (0.1, 0.5),
    "memory": (0.1, 0.5),
    "kv_cache": (0.1, 0.5),
    "preemptions": (0.1, 0.5),
}
"""Seconds to the first token and between tokens, bytes of an engine's processes, share of its KV cache, and
requests thrown out of it: a change for the worse is said, and nobody is demoted for it."""

T = TypeVar("T")
Action = Literal["demote", "restore", "pin_serving", "pin_demoted", "unpin"]


class JudgeErrors(BaseModel):
    """A judge on labelled answers: the shares of bad and of good ones that it called so, and their
    numbers."""

    model: str
    sensitivity: float = Field(ge=0, le=1)
    specificity: float = Field(ge=0, le=1)
    bad: int = Field(ge=1)
    good: int = Field(ge=1)

    def corrected(self, found: int, answers: int) -> dict[str, float] | None:
        """The true share of bad answers with its 95 % interval, by Rogan and Gladen; None for a judge that
        does no better than chance."""
        share = corrected_share(found, answers, self.sensitivity, self.specificity, (self.bad, self.good))
        return asdict(share) if share else None


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
        self._to_post: asyncio.Queue[Event] = asyncio.Queue(1000)
        self._events = logging.getLogger(EVENTS)
        self._decisions = -1
        self._beats, self._beats_at = -1, 0.0
        self._pruned = 0.0
        self._failing = False
        self.leading = False
        self._judge: JudgeErrors | None = None
        self.cells: dict[Key, Cell] = {}
        """As they were read last."""
        self.know(config, cards)

    def know(self, config: Config, cards: Mapping[str, Card]) -> None:
        """The configuration in use. The store stays what it was at the start."""
        self.prepare(config, cards)()

    def prepare(self, config: Config, cards: Mapping[str, Card]) -> Callable[[], None]:
        """What a configuration makes of it, for ``know``; nothing changes until the result is called."""
        keys = {
            (variant, role): Key(variant=variant, version=card.version, role=role)
            for variant, card in cards.items()
            for role in config.roles
            if variant != config.reference
        }
        engines = {
            variant: Key(variant=variant, version=card.version, role=ENGINE)
            for variant, card in cards.items()
        }
        policies = {key: policy_of(config, cards[variant], role) for (variant, role), key in keys.items()}
        of_engines = Policy(
            alarm=threshold(config.watch.answers_per_false_alarm, len(SAID)),
            agree=config.watch.agree,
            rates=SAID,
            said=frozenset(SAID),
            probation_after_s=config.watch.probation_after_s,
            alpha=0.05,
            beta=0.01,
        )
        policies |= dict.fromkeys(engines.values(), of_engines)
        gates = {variant: gate_of(card) for variant, card in cards.items()}

        def take_over() -> None:
            self._config, self._cards = config, cards
            self._keys, self._engines, self._policies, self._gates = keys, engines, policies, gates

        return take_over

    # what others ask of it

    def key(self, variant: str, role: str) -> Key | None:
        """None for what is not watched: the reference, and providers."""
        return self._keys.get((variant, role))

    def note(
        self, key: Key, check: str, bad: bool, value: float | None = None, *, probation: bool = False
    ) -> None:
        """One check of one answer."""
        if len(self._waiting) >= MOST_WAITING:
            self._metrics.watch_dropped.labels().inc()
            return
        self._waiting.append(Outcome(key, check, bad, self._clock(), value, probation))

    def note_engine(
        self, variant: str, memory: float | None, kv_cache: float | None, preempted: float | None
    ) -> None:
        """What an engine has said of itself: bytes, the share of its KV cache in use, and requests that were
        thrown out of it since it was asked last."""
        key = self._engines.get(variant)
        for check, value in (("memory", memory), ("kv_cache", kv_cache), ("preemptions", preempted)):
            if key is not None and value is not None:
                self.note(key, check, False, value)

    def note_latency(self, variant: str, first_token_s: float | None, gap_s: float | None) -> None:
        """Of one streamed answer: seconds to its first token, and the mean between its chunks."""
        key = self._engines.get(variant)
        for check, value in (("first_token", first_token_s), ("token_gap", gap_s)):
            if key is not None and value is not None:
                self.note(key, check, False, value)

    def suspected(self, key: Key) -> bool:
        """Whether a check has seen enough to ask for another one's opinion."""
        cell, policy = self.cells.get(key), self._policies.get(key)
        return bool(cell and policy and cell.warned(policy))

    def unusual(self, key: Key, nll_mean: float) -> bool:
        """Whether an answer's mean -log p is out of the range that has been learned."""
        cell = self.cells.get(key)
        usual = cell.tracks["signals"].usual if cell and "signals" in cell.tracks else None
        return usual is not None and not usual[0] <= nll_mean <= usual[1]

    def on_probation(self, role: str) -> list[Key]:
        """Variants whose answers to the role's requests are to be judged before anybody gets them."""
        return [
            key
            for (_, of), key in self._keys.items()
            if of == role
            and (cell := self.cells.get(key))
            and cell.status is Status.PROBATION
            and not cell.pinned
        ]

    def demoted(self) -> dict[tuple[str, str], str]:
        """What routing must avoid, and why."""
        return {
            pair: cell.why
            for pair, key in self._keys.items()
            if (cell := self.cells.get(key)) is not None and not cell.serves
        }

    async def act(self, action: Action, variant: str, role: str, why: str) -> Event:
        """A person's word, which is obeyed at once. Raises BadRequestError or StoreError."""
        key = self._keys.get((variant, role))
        if key is None:
            known = ", ".join(sorted({variant for variant, _ in self._keys})) or "none"
            roles = ", ".join(sorted(self._config.roles))
            raise BadRequestError(
                f"variant: no quantized variant {variant[:80]!r} serves a role {role[:80]!r}; "
                f"variants: {known}; roles: {roles}",
                param="variant",
            )
        event = await self._in_thread(lambda: self._act(action, key, why))
        await self._refresh()
        self._announce([event])
        return event

    async def know_judge(self, errors: JudgeErrors) -> None:
        """How often the judge is wrong, measured on labelled answers. Raises BadRequestError or
        StoreError."""
        judge = self._config.watch.judge
        if judge is None or errors.model != judge.model:
            has = f"the judge is {judge.model!r}" if judge else "there is no judge; set watch.judge"
            raise BadRequestError(f"model: {errors.model[:80]!r} does not judge; {has}", param="model")
        await self._in_thread(lambda: self._open().remember("judge", errors.model_dump()))

    async def report(self, since_s: float = 3600.0, events: int = 100) -> dict[str, Any]:
        """All that is known: cells with their checks, events, and sums over time for charts."""
        since = self._clock() - since_s

        def read() -> tuple[dict[Key, Cell], list[Event], Sequence[Any], dict[str, Any] | None]:
            store = self._open()
            return store.cells(), store.events(events), store.buckets(since), store.remembered("judge")

        cells, happened, buckets, judge = await self._in_thread(read)
        judging = self._config.watch.judge
        known = judge is not None and judging is not None and judge["model"] == judging.model
        self._judge = JudgeErrors.model_validate(judge) if known else None
        self.cells = cells
        current = {*self._keys.values(), *self._engines.values()}
        many = max(1, len(self._keys))
        return {
            "time": self._clock(),
            "leading": self.leading,
            "agree": self._config.watch.agree,
            "judge": self._judge.model_dump() if self._judge else None,
            "cells": [
                self._shown(cells.get(key) or Cell(key=key), many)
                for key in sorted(current, key=lambda key: (key.role, key.variant))
                if key.role != ENGINE or key in cells
            ],
            "events": [event_as_json(event) for event in happened],
            "buckets": [
                {
                    "start": one.start,
                    **one.key.model_dump(),
                    "check": one.check,
                    "answers": one.answers,
                    "bad": one.bad,
                    "total": one.total,
                }
                for one in buckets
                if one.key in current
            ],
        }

    # going

    async def run(self) -> None:
        """Until cancelled; then what is left is written. It may be run again after a failure."""
        try:
            while True:
                await self._round()
                await asyncio.sleep(ROUND_S)
        except asyncio.CancelledError:
            with contextlib.suppress(Exception):
                await asyncio.shield(self._in_thread(self._leave))
            self._thread.shutdown(wait=False)
            raise

    async def _round(self) -> None:
        outcomes, self._waiting = self._waiting, []
        try:
            events = await self._in_thread(lambda: self._write_and_fold(outcomes))
            outcomes = []
            self._announce(events)
            await self._refresh()
            self._failing = False
        except StoreError as error:
            if not self._failing:
                self._events.error("the watch's store fails; it is tried again: %s", error)
            self._failing = True
            self._waiting = (outcomes + self._waiting)[:MOST_WAITING]
        except Exception:
            self._events.exception("a round of the watch failed")

    def _write_and_fold(self, outcomes: Sequence[Outcome]) -> list[Event]:
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
        return self._fold(store, outcomes)

    def _fold(self, store: Store, mine: Sequence[Outcome]) -> list[Event]:
        """Take all outcomes in, this process's own and what others have written, and do what is due."""
        rows, cells = store.unfolded()
        outcomes = [*(outcome for _, outcome in rows), *mine]
        now = self._clock()
        changed: dict[Key, Cell] = {}
        events: list[Event] = []
        allowed: int | None = None

        def cell_of(key: Key) -> Cell:
            cell = changed.get(key) or cells.get(key) or Cell(key=key, gate=self._gates.get(key.variant, ""))
            changed[key] = cell
            return cell

        for key in self._keys.values():
            known = cells.get(key)
            if known is None or known.status is Status.SERVING:
                continue
            if known.gate != self._gates[key.variant]:
                cell = cell_of(key)
                cell.gate = self._gates[key.variant]
                events.append(cell.restore("it has passed a new gate", now))
            elif (begun := known.begin_probation(self._policies[key], now)) is not None:
                cell_of(key)
                events.append(begun)
        for outcome in outcomes:
            policy = self._policies.get(outcome.key)
            if policy is None:
                continue  # of a version or a role that is no longer served
            if allowed is None:
                lately = store.events(10_000, now - 3600, EventKind.DEMOTED)
                allowed = self._config.watch.demotions_per_hour - len(lately)
            for event in cell_of(outcome.key).fold(outcome, policy, may_demote=allowed > 0):
                events.append(event)
                allowed -= event.kind is EventKind.DEMOTED
        if outcomes or changed:
            numbers = [number for number, _ in rows]
            store.folded(numbers, outcomes, changed.values(), events, self._beats)
        return events

    def _act(self, action: Action, key: Key, why: str) -> Event:
        store, now = self._open(), self._clock()
        cell = store.cells().get(key) or Cell(key=key)
        cell.gate = self._gates[key.variant]
        match action:
            case "demote":
                cell.pinned = None
                event = cell.demote(why, now)
            case "restore":
                cell.pinned = None
                event = cell.restore(why, now)
            case "pin_serving":
                event = cell.pin("serving", why, now)
            case "pin_demoted":
                event = cell.pin("demoted", why, now)
            case "unpin":
                event = cell.pin(None, why, now)
        store.change([cell], [event])
        return event

    async def _refresh(self) -> None:
        """Read what all gateways are to obey, if it has changed."""

        def read() -> tuple[int, dict[Key, Cell] | None]:
            store = self._open()
            decisions = store.decisions()
            stale = decisions != self._decisions or self.leading
            return decisions, store.cells() if stale or self._suspicious() else None

        decisions, cells = await self._in_thread(read)
        if cells is not None:
            self.cells = cells
            self._show()
        if decisions != self._decisions:
            self._decisions = decisions
            self._changed(self.demoted())

    def _suspicious(self) -> bool:
        """Whether cells are to be read although nothing was decided: from time to time."""
        return int(time.monotonic() / ROUND_S) % 4 == 0

    def _show(self) -> None:
        for (variant, role), key in self._keys.items():
            cell = self.cells.get(key)
            self._metrics.demoted.labels(variant, role).set(cell is not None and not cell.serves)
            for check, track in cell.tracks.items() if cell else ():
                self._metrics.cusum.labels(role, variant, check).set(track.evidence)

    def _shown(self, cell: Cell, many: int) -> dict[str, Any]:
        """A cell for people. Intervals hold at all times, for all cells together, with 95 %."""
        policy = self._policies.get(cell.key)
        checks: dict[str, dict[str, Any]] = {}
        for name, track in sorted(cell.tracks.items()):
            rates = policy.rates.get(name) if policy else None
            low, high = confidence_sequence(track.bad, track.answers, 0.05 / many)
            checks[name] = {
                "answers": track.answers,
                "bad": track.bad,
                "share": track.bad / track.answers if track.answers else None,
                "low": low,
                "high": high,
                "tolerated": rates[0] if rates else None,
                "alarming": rates[1] if rates else None,
                "evidence": track.evidence,
                "alarm": policy.alarm if policy and rates else None,
                "learning": len(track.learned) if track.usual is None and track.learned else None,
                "usual": track.usual,
            }
            if name == "judge" and self._judge is not None:
                checks[name]["corrected"] = self._judge.corrected(track.bad, track.answers)
        return {
            **cell.key.model_dump(),
            "status": cell.status.value,
            "serves": cell.serves,
            "pinned": cell.pinned,
            "why": cell.why,
            "since": cell.since or None,
            "verdict": _verdict(cell, policy),
            "probation_answers": cell.probation_answers,
            "checks": checks,
        }

    def _announce(self, events: Sequence[Event]) -> None:
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
            self._metrics.watch_events.labels(event.key.role, event.key.variant, event.kind.value).inc()
            if self._config.watch.webhook:
                with contextlib.suppress(asyncio.QueueFull):
                    self._to_post.put_nowait(event)

    async def post_forever(self, session: aiohttp.ClientSession) -> None:
        """Events to the webhook, in order, each a few times at most."""
        while True:
            event = await self._to_post.get()
            url = self._config.watch.webhook
            for number in range(WEBHOOK_TRIES if url else 0):
                try:
                    timeout = aiohttp.ClientTimeout(total=WEBHOOK_TIMEOUT_S)
                    async with session.post(str(url), json=event_as_json(event), timeout=timeout) as answer:
                        if answer.status < 500:
                            break
                except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                    if number == WEBHOOK_TRIES - 1:
                        self._events.error("watch.webhook: %s: %r; the event is in the store", url, error)
                await asyncio.sleep(0.25 * 2**number)

    def _leave(self) -> None:
        store = self._open()
        store.append(self._waiting)
        self._waiting = []
        store.resign()
        store.close()

    def _open(self) -> Store:
        if self._store is None:
            if self._url.startswith("sqlite:///"):
                self._config.run_dir.mkdir(parents=True, exist_ok=True)
            self._store = Store(self._url, self._holder)
        return self._store

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _verdict(cell: Cell, policy: Policy | None) -> str:
    """What a person is told at a glance."""
    if not cell.serves:
        return "demoted"
    if policy is None or not any(t.answers for name, t in cell.tracks.items() if name in policy.rates):
        return "no evidence"
    alarms = [name for name, track in cell.tracks.items() if track.evidence >= policy.alarm]
    if alarms:
        return "not enough evidence"  # one check alone, or the limit on demotions
    return "suspected" if cell.warned(policy) else "healthy"


def event_as_json(event: Event) -> dict[str, Any]:
    return {
        "kind": event.kind.value,
        **event.key.model_dump(),
        "time": event.at,
        "why": event.why,
        "evidence": dict(event.evidence),
    }


def store_url(config: Config) -> str:
    """Where the watch keeps what it knows. Raises ConfigError for a variable that is not set."""
    settings = config.watch
    if settings.store_env is not None:
        if not (url := os.environ.get(settings.store_env)):
            raise ConfigError(
                f"watch.store_env: the environment has no {settings.store_env!r}; set it to a database's URL"
            )
        return url
    return settings.store or f"sqlite:///{config.run_dir / 'watch.db'}"


def gate_of(card: Card) -> str:
    """Changes whenever a card has been evaluated and judged anew."""
    if card.evaluation is None:
        return ""
    return hashlib.sha256(card.evaluation.model_dump_json().encode()).hexdigest()[:16]


def policy_of(config: Config, card: Card, role: str) -> Policy:
    """What is tolerated of a variant in a role: what the role says, else what the gate accepted, else a
    default.

    The gate has counted how many of the variant's answers differ from the reference's on held-out items. The
    watch asks less of an answer than to be the same, so that share is tolerated, and 15 points more alarms.
    """
    settings = config.watch
    rates = dict(DEFAULT_RATES)
    figures = card.evaluation.roles.get(role) if card.evaluation else None
    if figures is not None:
        for check in ("shadow", "regenerated"):
            rates[check] = _wider(rates[check], 1 - figures.agreement)
        if figures.grounded is not None:
            lowest = (0.05, 0.2)
            rates["grounded"] = _wider(lowest, 1 - figures.grounded.good / figures.grounded.items)
    rates.update(config.roles[role].rates)
    return Policy(
        alarm=threshold(settings.answers_per_false_alarm, len(rates)),
        agree=settings.agree,
        rates=rates,
        probation_after_s=settings.probation_after_s,
        alpha=0.05,
        beta=0.01,
    )


def _wider(least: tuple[float, float], accepted: float) -> tuple[float, float]:
    tolerated = min(0.5, max(least[0], accepted))
    return tolerated, max(least[1], min(0.9, tolerated + 0.15))
