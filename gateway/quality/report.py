"""What the watch knows, as people and charts get it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel, Field

from gateway.quality.cells import Cell, CellKey, DemotionPolicy, WatchEvent
from gateway.quality.rates import ENGINE, Watched
from gateway.quality.sequential import confidence_sequence, corrected_share
from gateway.quality.store import Bucket


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


def show_cells(
    watched: Watched, cells: Mapping[CellKey, Cell], judge: JudgeErrors | None
) -> list[dict[str, Any]]:
    """Every variant in every role, and what engines have been noticed by."""
    current, many = {*watched.keys.values(), *watched.engines.values()}, max(1, len(watched.keys))
    return [
        show_cell(cells.get(key) or Cell(key=key), watched.policies.get(key), many, judge)
        for key in sorted(current, key=lambda key: (key.role, key.variant))
        if key.role != ENGINE or key in cells
    ]


def show_cell(
    cell: Cell, policy: DemotionPolicy | None, many: int, judge: JudgeErrors | None
) -> dict[str, Any]:
    """A cell for people. Intervals hold at all times, for all ``many`` cells together, with
    95 %."""
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
        if name == "judge" and judge is not None:
            checks[name]["corrected"] = judge.corrected(track.bad, track.answers)
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


def show_buckets(watched: Watched, buckets: Sequence[Bucket]) -> list[dict[str, Any]]:
    """Sums over time of what is served now."""
    current = {*watched.keys.values(), *watched.engines.values()}
    return [
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
    ]


def _verdict(cell: Cell, policy: DemotionPolicy | None) -> str:
    """What a person is told at a glance."""
    if not cell.serves:
        return "demoted"
    if policy is None or not any(t.answers for name, t in cell.tracks.items() if name in policy.rates):
        return "no evidence"
    tracks = [track for name, track in cell.tracks.items() if name in policy.rates]
    if any(track.evidence >= policy.alarm for track in tracks):
        return "not enough evidence"  # one check alone, or the limit on demotions
    return "suspected" if cell.warned(policy) else "healthy"


def event_as_json(event: WatchEvent) -> dict[str, Any]:
    return {
        "kind": event.kind.value,
        **event.key.model_dump(),
        "time": event.at,
        "why": event.why,
        "evidence": dict(event.evidence),
    }
