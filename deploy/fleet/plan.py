"""The choice among layouts: most sessions per second of those that keep every role's target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deploy.fleet.layouts import Layout
from deploy.fleet.predict import Latency, Prediction, predict
from deploy.fleet.traffic import Traffic

EQUAL = 0.02
"""Layouts whose sessions per second differ by less are told apart by memory: predictions are coarser."""


@dataclass(frozen=True)
class Target:
    """What a role wants of one request's mean time, seconds; None: nothing."""

    ttft_s: float | None = None
    total_s: float | None = None

    def missed(self, latency: Latency) -> float:
        """By what factor it is missed; at most 1 where it is kept."""
        wanted = ((self.ttft_s, latency.first_token_s), (self.total_s, latency.total_s))
        return max((found / limit for limit, found in wanted if limit is not None), default=0.0)


@dataclass(frozen=True)
class Ranked:
    """A layout, what it is predicted to do, and which roles' targets it misses by which factor."""

    layout: Layout
    prediction: Prediction
    missed: Mapping[str, float]


@dataclass(frozen=True)
class FleetPlan:
    """All layouts, the chosen one first, the runner-up second."""

    ranked: tuple[Ranked, ...]

    @property
    def chosen(self) -> Ranked:
        return self.ranked[0]

    def why(self, other: Ranked) -> str:
        """Why a layout lost against the chosen one."""
        best = self.chosen
        if other.missed and not best.missed:
            role, factor = max(other.missed.items(), key=lambda entry: entry[1])
            return f"{role} would take {factor:.1f} times its target"
        if other.missed and max(other.missed.values()) > max(best.missed.values(), default=0.0):
            return "it misses targets by more"
        ratio = other.prediction.sessions_per_s / best.prediction.sessions_per_s
        if ratio < 1 - EQUAL:
            return f"{100 * (1 - ratio):.0f} % fewer sessions per second"
        more = other.layout.memory - best.layout.memory
        if more > 0:
            amount = f"{more / 1e9:.2f} GB" if more >= 1e7 else f"{more / 1e6:.1f} MB"
            return f"as fast, and it takes {amount} more"
        return f"{100 * (ratio - 1):+.1f} % sessions per second, within what a prediction can tell"


def rank(found: Sequence[Layout], traffic: Traffic, targets: Mapping[str, Target]) -> FleetPlan:
    """The layouts by what they are predicted to do. ``found`` is not empty."""
    ranked = []
    for layout in found:
        prediction = predict(layout.devices, traffic)
        missed = {
            role: factor
            for role, latency in prediction.latencies.items()
            if (factor := targets.get(role, Target()).missed(latency)) > 1
        }
        ranked.append(Ranked(layout, prediction, missed))
    fastest = max(one.prediction.sessions_per_s for one in _least_missed(ranked))

    def key(one: Ranked) -> tuple[float, bool, float, float]:
        rate = one.prediction.sessions_per_s
        equal = rate >= fastest * (1 - EQUAL)
        return (
            max(one.missed.values(), default=0.0),
            not equal,
            one.layout.memory if equal else -rate,
            -rate,
        )

    return FleetPlan(tuple(sorted(ranked, key=key)))


def _least_missed(ranked: Sequence[Ranked]) -> list[Ranked]:
    least = min(max(one.missed.values(), default=0.0) for one in ranked)
    return [one for one in ranked if max(one.missed.values(), default=0.0) <= least]
