"""What is known of a variant in a role, and what follows from it. No clock, no store, no network here.

A cell is a (variant, version, role). Outcomes are folded into it one by one, in the order of the store; what
comes out are events, of which some change where requests go.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gateway.quality.sequential import Cusum, Decision, Rates, Sprt

LEARNED = 200
"""Answers from which a signal's usual range is learned."""
USUAL = 0.01
"""Share of those on either side that counts as unusual."""
WARN_SHARE = 1 / 3
"""Share of the evidence for an alarm at which a second check supports a first one that alarms."""
FRESH = 100
"""Answers of its own within which that share is enough. In an alarm that lasts (users ask something else by
now, say) every check would come to it some day, so that more is needed then, the logarithm of the time twice:
over all times together that is about as improbable as within these answers."""
HIGHEST = 2.0
"""Alarms' worth of evidence that a check may gather: what has passed is over soon."""


class Status(StrEnum):
    SERVING = "serving"
    DEMOTED = "demoted"
    PROBATION = "probation"
    """Still demoted; copies of its role's requests are sent to it, and their answers judged."""


class EventKind(StrEnum):
    ALARM = "alarm"
    """One check alone: not enough evidence to act."""
    DEMOTED = "demoted"
    HELD_BACK = "held_back"
    """There were too many demotions lately, or a person has pinned the variant."""
    PROBATION = "probation"
    FAILED_PROBATION = "failed_probation"
    RESTORED = "restored"
    PINNED = "pinned"
    UNPINNED = "unpinned"
    DRIFT = "drift"
    """Latency or memory has changed: said, and not acted on."""


class CellKey(BaseModel):
    """Whom a cell is of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    variant: str
    version: str
    role: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """One check of one answer. ``value`` is for signals, whose usual range decides whether they are bad;
    ``probation``: the answer was a copy's, and no client got it."""

    key: CellKey
    check: str
    bad: bool
    at: float
    value: float | None = None
    probation: bool = False


@dataclass(frozen=True, slots=True)
class WatchEvent:
    kind: EventKind
    key: CellKey
    at: float
    """Unix time, seconds."""
    why: str
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @property
    def decides(self) -> bool:
        """Whether requests go elsewhere from now on."""
        return self.kind in (EventKind.DEMOTED, EventKind.RESTORED)


class DemotionPolicy(BaseModel):
    """When to act. Thresholds are nats of evidence."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    alarm: float
    agree: int = Field(description="checks that have to agree before a variant is demoted")
    rates: Mapping[str, tuple[float, float]]
    """Check to the tolerated and the alarming share of bad answers."""
    compared: bool = True
    """A reference is asked about its answers; else rules and signals alone say something of it."""
    said: frozenset[str] = frozenset()
    """Checks whose change is said and not acted upon; only what is above their usual range counts."""
    probation_after_s: float
    alpha: float = Field(description="of probation: a healthy variant that is called harmed")
    beta: float = Field(description="of probation: a harmed variant that is called healthy")

    def rates_of(self, check: str) -> Rates | None:
        """None for a check that is only counted."""
        found = self.rates.get(check)
        return Rates(*found) if found else None


class Track(BaseModel):
    """One check of a cell: all outcomes counted, and the evidence since the change that is likeliest."""

    model_config = ConfigDict(extra="forbid")

    answers: int = 0
    bad: int = 0
    evidence: float = 0.0
    highest: float = 0.0
    alarmed: bool = False
    """An alarm has been said, and the evidence has not been zero since."""
    beside: int = 0
    """Answers that it has looked at while another check alarmed."""
    learned: list[float] = Field(default_factory=list)
    """Values from which the usual range is still being learned."""
    usual: tuple[float, float] | None = None

    def judge(self, value: float, above: bool = False) -> bool | None:
        """Whether a signal is out of its usual range, or ``above`` it; None while that is being learned."""
        if self.usual is None:
            self.learned.append(value)
            if len(self.learned) >= LEARNED:
                ordered = sorted(self.learned)
                cut = int(USUAL * len(ordered))
                self.usual, self.learned = (ordered[cut], ordered[-1 - cut]), []
            return None
        low, high = self.usual
        return value > high or (value < low and not above)

    def add(self, bad: bool, rates: Rates | None, most: float = math.inf) -> None:
        self.answers += 1
        self.bad += bad
        if rates is not None:
            self.evidence = min(most, Cusum(rates, self.evidence).add(bad))
            self.highest = max(self.highest, self.evidence)
            self.alarmed = self.alarmed and self.evidence > 0

    def agrees(self, policy: DemotionPolicy) -> bool:
        """Whether its evidence supports the alarm of another, as long as that has lasted."""
        later = 2 * math.log(max(1.0, self.beside / FRESH))
        return self.evidence >= min(policy.alarm, WARN_SHARE * policy.alarm + later)

    def forget(self) -> None:
        """Begin anew, with all that was counted."""
        self.evidence, self.alarmed, self.beside = 0.0, False, 0


class Cell(BaseModel):
    """One cell's state, as it is stored."""

    model_config = ConfigDict(extra="forbid")

    key: CellKey
    gate: str = Field(default="", description="of the card's evaluation: another one is a new gate")
    status: Status = Status.SERVING
    pinned: Literal["serving", "demoted"] | None = None
    why: str = ""
    since: float = 0.0
    tracks: dict[str, Track] = Field(default_factory=dict)
    probation: dict[str, float] = Field(default_factory=dict, description="check to the SPRT's evidence")
    probation_answers: int = 0
    passed: list[str] = Field(default_factory=list, description="checks that probation has found healthy")
    failed: int = Field(default=0, description="probations in a row that it did not pass")

    @property
    def serves(self) -> bool:
        """Whether routing may choose it."""
        if self.pinned is not None:
            return self.pinned == "serving"
        return self.status is Status.SERVING

    def warned(self, policy: DemotionPolicy) -> list[str]:
        """Checks whose evidence would support an alarm of another."""
        enough = WARN_SHARE * policy.alarm
        return [name for name, one in self._acting(policy) if one.evidence >= enough]

    def _acting(self, policy: DemotionPolicy) -> list[tuple[str, Track]]:
        """Checks that may demote. One without rates has none any more: its evidence is of former times."""
        return [
            (name, one)
            for name, one in self.tracks.items()
            if name in policy.rates and name not in policy.said
        ]

    def fold(self, outcome: Outcome, policy: DemotionPolicy, may_demote: bool = True) -> Iterator[WatchEvent]:
        """Take in an outcome. ``may_demote``: the limit on demotions allows one more."""
        if outcome.probation:
            yield from self._on_probation(outcome, policy)
            return
        track = self.tracks.setdefault(outcome.check, Track())
        bad: bool | None = outcome.bad
        if outcome.value is not None:
            bad = track.judge(outcome.value, above=outcome.check in policy.said)
        if bad is None:
            return
        track.add(bad, policy.rates_of(outcome.check), HIGHEST * policy.alarm)
        others = any(one.alarmed for _, one in self._acting(policy) if one is not track)
        track.beside = track.beside + 1 if others else 0
        if outcome.check in policy.said:
            if track.evidence >= policy.alarm:
                usual, track.evidence, track.usual = (
                    track.usual,
                    0.0,
                    None,
                )  # what is usual now is learned anew
                why = f"{outcome.check} is higher than usual"
                seen = {"value": outcome.value, "usual": usual}
                yield WatchEvent(EventKind.DRIFT, self.key, outcome.at, why, seen)
            return
        if self.status is Status.SERVING:
            yield from self._watch(outcome, track, policy, may_demote)

    def _watch(
        self, outcome: Outcome, track: Track, policy: DemotionPolicy, may_demote: bool
    ) -> Iterator[WatchEvent]:
        alarms = [name for name, one in self._acting(policy) if one.evidence >= policy.alarm]
        if not alarms:
            return
        agreeing = [name for name, one in self._acting(policy) if one.agrees(policy)]
        evidence = {name: round(self.tracks[name].evidence, 2) for name in agreeing}
        if len(agreeing) < policy.agree:
            if not track.alarmed and outcome.check in alarms:
                track.alarmed = True
                why = f"{outcome.check} alone: {policy.agree} checks must agree; not enough evidence"
                yield WatchEvent(EventKind.ALARM, self.key, outcome.at, why, evidence)
            return
        why = f"{' and '.join(agreeing)} have changed"
        if self.pinned == "serving" or not may_demote:
            if not all(self.tracks[name].alarmed for name in agreeing):
                for name in agreeing:
                    self.tracks[name].alarmed = True
                who = "a person pinned it" if self.pinned else "too many demotions lately"
                yield WatchEvent(EventKind.HELD_BACK, self.key, outcome.at, f"{why}; {who}", evidence)
            return
        yield self.demote(why, outcome.at, evidence)

    def _on_probation(self, outcome: Outcome, policy: DemotionPolicy) -> Iterator[WatchEvent]:
        rates = policy.rates_of(outcome.check)
        if self.status is not Status.PROBATION or rates is None or outcome.value is not None:
            return
        self.probation_answers += 1
        if outcome.check in self.passed:
            return
        test = Sprt(rates, policy.alpha, policy.beta, self.probation.get(outcome.check, 0.0))
        decision = test.add(outcome.bad)
        self.probation[outcome.check] = test.value
        if decision is Decision.HARMED:
            self.failed += 1
            self._become(Status.DEMOTED, f"{outcome.check} failed on probation", outcome.at)
            yield WatchEvent(EventKind.FAILED_PROBATION, self.key, outcome.at, self.why, dict(self.probation))
        elif decision is Decision.HEALTHY:
            self.passed.append(outcome.check)
            if self.passed_all(policy):
                yield self.restore(f"passed probation: {', '.join(sorted(self.passed))}", outcome.at)

    def passed_all(self, policy: DemotionPolicy) -> bool:
        """All checks that answers on probation are judged by have found it healthy, the comparison with the
        reference among them, where there is one."""
        needed = "shadow" if policy.compared else "rules"
        return needed in self.passed and set(self.passed) >= set(self.probation)

    def begin_probation(self, policy: DemotionPolicy, at: float) -> WatchEvent | None:
        """When it is time: later and later after each failure."""
        due = self.since + policy.probation_after_s * 2 ** min(self.failed, 10)
        if self.status is not Status.DEMOTED or self.pinned or at < due:
            return None
        self._become(Status.PROBATION, "its answers are judged before anybody gets them", at)
        return WatchEvent(EventKind.PROBATION, self.key, at, self.why)

    def demote(self, why: str, at: float, evidence: Mapping[str, Any] | None = None) -> WatchEvent:
        self._become(Status.DEMOTED, why, at)
        for track in self.tracks.values():
            track.forget()
        return WatchEvent(EventKind.DEMOTED, self.key, at, why, evidence or {})

    def restore(self, why: str, at: float) -> WatchEvent:
        self._become(Status.SERVING, why, at)
        self.failed = 0
        for track in self.tracks.values():
            track.forget()
        return WatchEvent(EventKind.RESTORED, self.key, at, why)

    def pin(self, state: Literal["serving", "demoted"] | None, why: str, at: float) -> WatchEvent:
        """A person's word; None takes it back."""
        self.pinned, self.why = state, why
        kind = EventKind.UNPINNED if state is None else EventKind.PINNED
        return WatchEvent(kind, self.key, at, why if state is None else f"{state}: {why}")

    def _become(self, status: Status, why: str, at: float) -> None:
        self.status, self.why, self.since = status, why, at
        self.probation, self.passed, self.probation_answers = {}, [], 0
