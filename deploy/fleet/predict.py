"""What a layout does under traffic: sessions per second, latency per role, and how busy each device is.

Sessions are customers of a closed network whose stations are devices; a station's rate depends on how many
sessions are at it, since an engine serves several at once. It is solved exactly by mean value analysis
(Reiser and Lavenberg, Journal of the ACM 1980;27:313). Engines that share a device without MPS take turns on
it: their times add up, and each batches its own requests alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deploy.fleet.speed import EngineSpeed
from deploy.fleet.traffic import RoleTraffic, Traffic

MPS_GAIN = 1.2
"""Work per second of two engines on one GPU with MPS over that of two that take turns. Measured on one H100
with an 8B shape: 0.95-1.0 of one engine's sessions per second against 0.78-0.83."""


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
    """Pools that compute on the same thing: a GPU, or cores. ``mps``: they do so at the same time."""

    name: str
    pools: tuple[PoolLoad, ...]
    mps: bool = False


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
    """Mean value analysis of ``traffic.sessions`` sessions on ``devices``."""
    count = traffic.sessions
    seconds = [[0.0, *(device_s(device, j) for j in range(1, count + 1))] for device in devices]
    # at[k][j]: probability that j sessions are at device k, with the present number in all
    at = [[1.0] + [0.0] * count for _ in devices]
    rate, times = 0.0, [0.0] * len(devices)
    for total in range(1, count + 1):
        times = [
            sum(j * seconds[k][j] * at[k][j - 1] for j in range(1, total + 1)) for k in range(len(devices))
        ]
        rate = total / (traffic.pause_s + sum(times))
        for k, before in enumerate(at):
            after = [rate * seconds[k][j] * before[j - 1] for j in range(1, total + 1)]
            at[k] = [max(0.0, 1.0 - sum(after)), *after, *[0.0] * (count - total)]
    present = [rate * time for time in times]
    latencies = {
        role: latency
        for device, there, time in zip(devices, present, times, strict=True)
        for role, latency in _latencies(device, there, time).items()
    }
    busy = {device.name: 1.0 - at[k][0] for k, device in enumerate(devices)}
    return Prediction(rate, traffic.pause_s + sum(times), latencies, busy)


def device_s(device: Device, sessions: int) -> float:
    """Seconds of the device that one session takes while ``sessions`` are at it."""
    whole = {pool.id: _pool_s(pool, 1.0) for pool in device.pools}
    total = sum(whole.values())
    taken = 0.0
    for pool in device.pools:
        # Sessions are at its pools in proportion to what they do there.
        together = max(1.0, sessions * whole[pool.id] / total)
        taken += _pool_s(pool, together)
    return taken / MPS_GAIN if device.mps and len(device.pools) > 1 else taken


def _pool_s(pool: PoolLoad, together: float) -> float:
    """Seconds of the engine that a session's requests take while it has ``together`` of them at a time."""
    each = min(pool.most_together, max(1.0, together))
    return sum(
        one.requests * pool.speed.request_s(one.new_tokens, one.answer_tokens, one.context, each)
        for one in pool.roles.values()
    )


def _latencies(device: Device, there: float, time: float) -> dict[str, Latency]:
    """The device's time of a session, shared out over its requests as they would take it."""
    alone: dict[str, tuple[float, float, float]] = {}
    whole = {pool.id: _pool_s(pool, 1.0) for pool in device.pools}
    for pool in device.pools:
        together = max(1.0, there * whole[pool.id] / sum(whole.values()))
        for role, one in pool.roles.items():
            # While its own prompt is computed, those of others are too.
            first = pool.speed.prompt_s(one.new_tokens) * (1 + together) / 2
            rest = one.answer_tokens * pool.speed.step_s(min(together, pool.most_together), one.context)
            alone[role] = first, first + rest, one.requests
    weight = sum(total * requests for _, total, requests in alone.values())
    scale = time / weight if weight else 0.0
    return {role: Latency(first * scale, total * scale) for role, (first, total, _) in alone.items()}
