"""Outcomes folded into cells, and what is due then. Blocks: the watch does this in a thread."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from gateway.quality.cells import Cell, CellKey, EventKind, Outcome, Status, WatchEvent
from gateway.quality.rates import Watched
from gateway.quality.store import Store

Action = Literal["demote", "restore", "pin_serving", "pin_demoted", "unpin"]


def fold(store: Store, mine: Sequence[Outcome], watched: Watched, now: float, beats: int) -> list[WatchEvent]:
    """Take all outcomes in, this process's own and what others have written, and do what is due. ``beats``:
    what ``Store.lead`` has said. Raises StoreError."""
    rows, cells = store.unfolded()
    outcomes = [*(outcome for _, outcome in rows), *mine]
    changed: dict[CellKey, Cell] = {}
    events: list[WatchEvent] = []
    allowed: int | None = None

    def cell_of(key: CellKey) -> Cell:
        cell = changed.get(key) or cells.get(key) or Cell(key=key, gate=watched.gates.get(key.variant, ""))
        changed[key] = cell
        return cell

    for key in watched.keys.values():
        known = cells.get(key)
        if known is None:
            continue
        if known.gate != watched.gates[key.variant]:
            cell = cell_of(key)
            cell.gate = watched.gates[key.variant]
            if cell.status is not Status.SERVING:
                events.append(cell.restore("it has passed a new gate", now))
        elif known.since > now:
            cell_of(key).since = now  # of a clock that was ahead: probation would wait for that time
        elif (begun := known.begin_probation(watched.policies[key], now)) is not None:
            cell_of(key)
            events.append(begun)
    for outcome in outcomes:
        policy = watched.policies.get(outcome.key)
        if policy is None:
            continue  # of a version or a role that is no longer served
        if allowed is None:
            lately = store.events(10_000, now - 3600, EventKind.DEMOTED)
            allowed = watched.config.watch.demotions_per_hour - sum(one.at < now + 3600 for one in lately)
        # Whoever saw it may have another clock: what follows from it happens now, by this one.
        seen = dataclasses.replace(outcome, at=now)
        for event in cell_of(outcome.key).fold(seen, policy, may_demote=allowed > 0):
            events.append(event)
            allowed -= event.kind is EventKind.DEMOTED
    if outcomes or changed:
        numbers = [number for number, _ in rows]
        store.folded(numbers, outcomes, changed.values(), events, beats)
    return events


def act(action: Action, cell: Cell, why: str, now: float) -> WatchEvent:
    """A person's word about a cell."""
    match action:
        case "demote":
            cell.pinned = None
            return cell.demote(why, now)
        case "restore":
            cell.pinned = None
            return cell.restore(why, now)
        case "pin_serving":
            return cell.pin("serving", why, now)
        case "pin_demoted":
            return cell.pin("demoted", why, now)
        case "unpin":
            return cell.pin(None, why, now)
