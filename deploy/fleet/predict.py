"""What a layout does under traffic: sessions per second, latency per role, and how busy each device is.

Sessions are simulated step by step, as vLLM goes on (continuous batching): each step writes a token of every
answer under way and computes prompts that wait, as many tokens as a step may have, first come, first served.
Requests' lengths vary about the means that the traffic states (:class:`deploy.fleet.lengths.Lengths`).
Engines that share a GPU without MPS take turns on it, step by step; those that share cores, or a GPU with
MPS, slow each other. Either way their times add up, and each batches its own requests alone.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from deploy.fleet.lengths import Lengths
from deploy.fleet.speed import STEP_TOKENS, EngineSpeed
from deploy.fleet.traffic import RoleTraffic, Traffic

MPS_GAIN = 1.2
"""Work per second of two engines on one GPU with MPS over that of two that take turns. Measured on one H100
with an 8B shape: 0.95-1.0 of one engine's sessions per second against 0.78-0.83."""
SESSIONS = 400
"""Sessions whose ends are counted, at least: enough for a rate within about 1 %."""
STEPS = 300_000
"""Steps after which what has ended by then has to do."""


@dataclass(frozen=True)
class PoolLoad:
    """One pool of a layout: who asks it, how fast its engine is, and how many requests fit."""

    id: str
    """``model:variant``."""
    speed: EngineSpeed
    roles: Mapping[str, RoleTraffic]
    most_together: int
    """Requests at a time: its limit, and what its KV cache holds; others wait."""


@dataclass(frozen=True)
class Device:
    """Pools that compute on the same thing: a GPU, or cores."""

    name: str
    pools: tuple[PoolLoad, ...]
    gain: float | None = None
    """Work per second of several that compute at the same time over that of one; None: they take turns."""
    share: float = 1.0
    """Of its time that is theirs: cores are others' as well."""


@dataclass(frozen=True)
class Latency:
    """Mean seconds of one request."""

    first_token_s: float
    total_s: float


@dataclass(frozen=True)
class Prediction:
    """What a layout does."""

    sessions_per_s: float
    session_s: float
    latencies: Mapping[str, Latency]
    busy: Mapping[str, float]
    """Device to the share of time in which it computes."""


def predict(devices: Sequence[Device], traffic: Traffic) -> Prediction:
    """``traffic.sessions`` sessions on ``devices``, until enough have ended. The same every time."""
    return _Simulation(devices, traffic).run()


@dataclass(eq=False)
class _Request:
    """A request at an engine. Lengths in tokens."""

    number: int
    session: _Session
    role: str
    came: float
    new: int
    """Prompt tokens to compute."""
    cached: int
    answer: int
    computed: int = 0
    """Of ``new``."""
    last: int = 0
    """The number of its engine's step that writes its last token."""


@dataclass(eq=False)
class _Session:
    began: float
    left: deque[str]
    """Roles of the requests that it has not made yet."""


@dataclass(eq=False)
class _Engine:
    """A pool's engine: what waits, what is computed, what is written."""

    load: PoolLoad
    station: _Station
    waiting: deque[_Request] = field(default_factory=deque)
    prompts: list[_Request] = field(default_factory=list)
    answers: list[tuple[int, int, _Request]] = field(default_factory=list)
    """A heap by the step of their last token."""
    contexts: int = 0
    """Tokens in the cache of ``answers``."""
    step: int = 0

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.prompts or self.answers)

    def compute(self) -> tuple[float, list[_Request]]:
        """One step: its seconds, and the requests whose prompt it completes."""
        room = self.load.most_together - len(self.prompts) - len(self.answers)
        while self.waiting and room > 0:
            self.prompts.append(self.waiting.popleft())
            room -= 1
        speed, left, complete = self.load.speed, STEP_TOKENS - len(self.answers), []
        seconds = speed.step_s(len(self.answers), self.contexts)
        for one in self.prompts:
            chunk = min(one.new - one.computed, max(left, 0))
            seconds += speed.prompt_s(chunk, one.cached + one.computed)
            one.computed += chunk
            left -= chunk
            if one.computed == one.new:
                complete.append(one)
        self.step += 1
        return seconds, complete

    def finish(self, complete: Sequence[_Request]) -> list[_Request]:
        """After a step: the requests that it ended."""
        self.contexts += len(self.answers)
        for one in complete:
            self.prompts.remove(one)
            one.last = self.step + one.answer - 1
            heapq.heappush(self.answers, (one.last, one.number, one))
            self.contexts += one.cached + one.new + 1
        ended = []
        while self.answers and self.answers[0][0] <= self.step:
            one = heapq.heappop(self.answers)[2]
            self.contexts -= one.cached + one.new + one.answer
            ended.append(one)
        return ended


@dataclass(eq=False)
class _Station:
    """A device: its engines in the order in which they take turns."""

    device: Device
    engines: deque[_Engine] = field(default_factory=deque)
    computing: set[int] = field(default_factory=set)
    """Engines (by ``id``) in a step."""
    busy_s: float = 0.0
    since: float = 0.0


class _Simulation:
    """Events in the order of their time: an engine's step has ended, or a session begins."""

    def __init__(self, devices: Sequence[Device], traffic: Traffic) -> None:
        self._traffic = traffic
        self._rng = random.Random(0)
        self._lengths = Lengths(self._rng)
        self._events: list[tuple[float, int, tuple[_Engine, list[_Request]] | None]] = []
        self._number = 0
        self._stations = [_Station(device) for device in devices]
        self._engines: dict[str, _Engine] = {}
        for station in self._stations:
            for load in station.device.pools:
                engine = _Engine(load, station)
                station.engines.append(engine)
                self._engines.update(dict.fromkeys(load.roles, engine))
        self._first: dict[str, list[float]] = {role: [] for role in traffic.roles}
        self._total: dict[str, list[float]] = {role: [] for role in traffic.roles}
        self._ends: list[tuple[float, float]] = []
        """When a session ended, and how long it had taken."""

    def run(self) -> Prediction:
        sessions = self._traffic.sessions
        wanted = max(SESSIONS, 4 * sessions)
        warm = max(50, 2 * sessions)
        for _ in range(sessions):
            # Begun apart: within the time that a session alone would take.
            self._at(self._rng.random() * self._alone_s(), None)
        steps = 0
        while len(self._ends) < warm + wanted and (steps < STEPS or len(self._ends) < 2):
            now, _, what = heapq.heappop(self._events)
            if what is None:
                self._begin(now)
                continue
            steps += 1
            self._step_ended(now, *what)
        return self._found(now, min(warm, len(self._ends) // 2))

    def _alone_s(self) -> float:
        seconds = self._traffic.pause_s
        for role, one in self._traffic.roles.items():
            speed = self._engines[role].load.speed
            each = speed.prompt_s(one.new_tokens) + one.answer_tokens * speed.step_s(1, one.context)
            seconds += one.requests * each
        return seconds

    def _at(self, time: float, what: tuple[_Engine, list[_Request]] | None) -> None:
        self._number += 1
        heapq.heappush(self._events, (time, self._number, what))

    def _begin(self, now: float) -> None:
        self._next(now, _Session(now, deque(self._roles())))

    def _roles(self) -> Iterator[str]:
        """The roles of a session's requests: each as often as it should be, on average."""
        sofar = self._rng.random()
        for role, one in self._traffic.roles.items():
            count = math.floor(sofar + one.requests + 1e-9)
            yield from [role] * count
            sofar += one.requests - count

    def _next(self, now: float, session: _Session) -> None:
        """The session's next request, or its end and the beginning of the next one."""
        if not session.left:
            pause = self._traffic.pause_s
            self._ends.append((now, now - session.began + pause))
            self._at(now + pause, None)
            return
        self._number += 1
        role = session.left.popleft()
        asked, share = self._traffic.roles[role], self._lengths.share((role, "prompt"))
        engine = self._engines[role]
        engine.waiting.append(
            _Request(
                self._number,
                session,
                role,
                now,
                new=max(1, round(asked.new_tokens * share)),
                cached=round((asked.prompt_tokens - asked.new_tokens) * share),
                answer=self._lengths.draw((role, "answer"), asked.answer_tokens),
            )
        )
        self._go_on(now, engine.station)

    def _go_on(self, now: float, station: _Station) -> None:
        """Let a device's engines begin a step where they may."""
        gain = station.device.gain
        for _ in range(len(station.engines)):
            if station.computing and gain is None:
                return
            engine = station.engines[0]
            station.engines.rotate(-1)
            if engine.idle or id(engine) in station.computing:
                continue
            seconds, complete = engine.compute()
            seconds /= station.device.share
            working = sum(not one.idle for one in station.engines)
            if gain is not None and working > 1:
                seconds *= working / gain
            if not station.computing:
                station.since = now
            station.computing.add(id(engine))
            self._at(now + seconds, (engine, complete))

    def _step_ended(self, now: float, engine: _Engine, complete: list[_Request]) -> None:
        station = engine.station
        station.computing.discard(id(engine))
        if not station.computing:
            station.busy_s += now - station.since
        for one in complete:
            self._first[one.role].append(now - one.came)
        for one in engine.finish(complete):
            self._total[one.role].append(now - one.came)
            self._next(now, one.session)
        self._go_on(now, station)

    def _found(self, now: float, warm: int) -> Prediction:
        began = self._ends[warm - 1][0] if warm else 0.0
        counted = self._ends[warm:]
        latencies = {
            role: Latency(_mean(self._first[role]), _mean(self._total[role])) for role in self._traffic.roles
        }
        return Prediction(
            len(counted) / (self._ends[-1][0] - began),
            _mean([taken for _, taken in counted]),
            latencies,
            {one.device.name: min(1.0, one.busy_s / now) for one in self._stations},
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
