"""Where outcomes, cells and events are kept: SQLite beside the gateway, or any database by its URL.

Every gateway appends outcomes. One at a time folds them into cells, in the order in which they came, and
writes the cells together with the place that it has reached: whatever is killed, no outcome is lost or
counted twice. All gateways read which cells serve. Functions block; the watch calls them in a thread of its
own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, update

from gateway.quality.cells import Cell, CellKey, EventKind, Outcome, WatchEvent
from gateway.quality.tables import BUCKETS, CELLS, EVENTS, FACTS, FORMAT, META, OUTCOMES
from gateway.store.database import Database, StoreError

BUCKET_S = 10
"""Seconds that are added up for the charts."""
KEPT_BUCKETS_S = 14 * 86_400
KEPT_EVENTS = 10_000


@dataclass(frozen=True)
class Bucket:
    """Outcomes of one check within ``BUCKET_S`` seconds. ``total``: of their values."""

    start: int
    key: CellKey
    check: str
    answers: int
    bad: int
    total: float


class Store:
    """One gateway's connection. Raises StoreError where the database does not do what it is asked."""

    def __init__(self, url: str, holder: str) -> None:
        """``holder``: this process, as no other is called."""
        self._holder = holder
        self._database = Database(url, "watch.store")
        self._database.create(META, self._check_format)

    def close(self) -> None:
        self._database.close()

    def append(self, outcomes: Sequence[Outcome]) -> None:
        """Add to what is to be folded, and to the charts."""
        rows = [
            {
                **outcome.key.model_dump(),
                "check_name": outcome.check,
                "bad": outcome.bad,
                "value": outcome.value,
                "probation": outcome.probation,
                "at": outcome.at,
            }
            for outcome in outcomes
        ]
        if rows:
            with self._database.begin() as connection:
                connection.execute(insert(OUTCOMES), rows)

    def lead(self, beats_seen: int, lost: bool) -> tuple[bool, int]:
        """Whether this process is the one that folds, and how often the one that does has said so.

        ``lost``: the leader has not been heard of for too long, by this process's own clock, while it had
        said so ``beats_seen`` times; clocks of two machines are never compared.
        """
        with self._database.begin() as connection:
            raw = _fact(connection, "leader")
            holder, beats = json.loads(raw) if raw else (None, 0)
            if holder == self._holder or holder is None or (lost and beats == beats_seen):
                if raw is None:
                    _set_fact(connection, "leader", json.dumps([self._holder, beats + 1]))
                    return True, beats + 1
                changed = connection.execute(
                    update(FACTS)
                    .where(FACTS.c.name == "leader", FACTS.c.value == raw)
                    .values(value=json.dumps([self._holder, beats + 1]))
                )
                return changed.rowcount == 1, beats + 1
            return False, beats

    def resign(self) -> None:
        """Let another process fold at once."""
        with self._database.begin() as connection:
            raw = _fact(connection, "leader")
            if raw and json.loads(raw)[0] == self._holder:
                _set_fact(connection, "leader", json.dumps([None, json.loads(raw)[1]]))

    def unfolded(self, most: int = 5000) -> tuple[list[tuple[int, Outcome]], dict[CellKey, Cell]]:
        """Outcomes that are in no cell yet, in order, and all cells as they are."""
        with self._database.begin() as connection:
            rows = connection.execute(select(OUTCOMES).order_by(OUTCOMES.c.id).limit(most)).all()
            cells = self._cells(connection)
        found = [
            (
                row.id,
                Outcome(
                    CellKey(variant=row.variant, version=row.version, role=row.role),
                    row.check_name,
                    row.bad,
                    row.at,
                    row.value,
                    row.probation,
                ),
            )
            for row in rows
        ]
        return found, cells

    def folded(
        self,
        ids: Iterable[int],
        outcomes: Sequence[Outcome],
        cells: Iterable[Cell],
        events: Sequence[WatchEvent],
        beats: int | None = None,
    ) -> None:
        """Write what has come of outcomes, and forget them: all of it or nothing.

        ``beats``: what ``lead`` has said to this process. Where another one leads by now, it is nothing, and
        a StoreError: outcomes that were never written are not among the ``ids`` that would tell.
        """
        ids = list(ids)
        with self._database.begin() as connection:
            if beats is not None:
                mine = json.dumps([self._holder, beats])
                leads = connection.execute(
                    update(FACTS).where(FACTS.c.name == "leader", FACTS.c.value == mine).values(value=mine)
                )
                if leads.rowcount != 1:
                    raise StoreError("another process folds outcomes by now; this one gives way")
            if ids:
                gone = connection.execute(delete(OUTCOMES).where(OUTCOMES.c.id.in_(ids)))
                if gone.rowcount != len(ids):
                    raise StoreError("another process has folded the same outcomes; this one gives way")
            self._write_cells(connection, cells)
            self._write_events(connection, events)
            self._add_to_buckets(connection, outcomes)

    def change(self, cells: Iterable[Cell], events: Sequence[WatchEvent]) -> None:
        """Cells changed by a person."""
        self.folded((), (), cells, events)

    def cells(self) -> dict[CellKey, Cell]:
        with self._database.begin() as connection:
            return self._cells(connection)

    def decisions(self) -> int:
        """A number that grows whenever a cell begins or ceases to serve, so that looking is cheap."""
        with self._database.begin() as connection:
            return int(_fact(connection, "decisions") or 0)

    def events(self, most: int = 100, since: float = 0.0, kind: EventKind | None = None) -> list[WatchEvent]:
        """The newest first."""
        wanted = select(EVENTS).where(EVENTS.c.at >= since).order_by(EVENTS.c.id.desc()).limit(most)
        if kind is not None:
            wanted = wanted.where(EVENTS.c.kind == kind.value)
        with self._database.begin() as connection:
            rows = connection.execute(wanted).all()
        return [
            WatchEvent(
                EventKind(row.kind),
                CellKey(variant=row.variant, version=row.version, role=row.role),
                row.at,
                row.why,
                json.loads(row.evidence),
            )
            for row in rows
        ]

    def buckets(self, since: float) -> list[Bucket]:
        """For charts, by time."""
        wanted = select(BUCKETS).where(BUCKETS.c.start >= since - BUCKET_S).order_by(BUCKETS.c.start)
        with self._database.begin() as connection:
            rows = connection.execute(wanted).all()
        return [
            Bucket(
                row.start,
                CellKey(variant=row.variant, version=row.version, role=row.role),
                row.check_name,
                row.answers,
                row.bad,
                row.total,
            )
            for row in rows
        ]

    def remember(self, name: str, value: dict[str, Any]) -> None:
        """Keep a small thing for all gateways."""
        with self._database.begin() as connection:
            _set_fact(connection, name, json.dumps(value))

    def remembered(self, name: str) -> dict[str, Any] | None:
        with self._database.begin() as connection:
            found = _fact(connection, name)
        return json.loads(found) if found else None

    def prune(self, now: float) -> None:
        """Forget what is too old for a chart, and all but the newest events."""
        with self._database.begin() as connection:
            connection.execute(delete(BUCKETS).where(BUCKETS.c.start < now - KEPT_BUCKETS_S))
            newest = connection.execute(select(func.max(EVENTS.c.id))).scalar() or 0
            connection.execute(delete(EVENTS).where(EVENTS.c.id <= newest - KEPT_EVENTS))

    def _check_format(self, connection: Connection) -> None:
        found = _fact(connection, "format")
        if found is None:
            _set_fact(connection, "format", FORMAT)
        elif found != FORMAT:
            raise StoreError(
                f"watch.store: {self._database.shown} has tables of format {found}, not {FORMAT}; "
                "give another database"
            )

    def _cells(self, connection: Connection) -> dict[CellKey, Cell]:
        rows = connection.execute(select(CELLS.c.state)).scalars()
        cells = [Cell.model_validate_json(state) for state in rows]
        return {cell.key: cell for cell in cells}

    def _write_cells(self, connection: Connection, cells: Iterable[Cell]) -> None:
        known = self._cells(connection)
        decided = False
        for cell in cells:
            before = known.get(cell.key)
            where = [CELLS.c[name] == value for name, value in cell.key.model_dump().items()]
            state = cell.model_dump_json()
            if before is None:
                connection.execute(insert(CELLS).values(**cell.key.model_dump(), state=state))
            else:
                connection.execute(update(CELLS).where(*where).values(state=state))
            was = (before.serves, before.status) if before else (True, None)
            decided = decided or was != (cell.serves, cell.status)
        if decided:
            _set_fact(connection, "decisions", str(int(_fact(connection, "decisions") or 0) + 1))

    def _write_events(self, connection: Connection, events: Sequence[WatchEvent]) -> None:
        if events:
            rows = [
                {
                    "kind": one.kind.value,
                    **one.key.model_dump(),
                    "at": one.at,
                    "why": one.why,
                    "evidence": json.dumps(dict(one.evidence)),
                }
                for one in events
            ]
            connection.execute(insert(EVENTS), rows)

    def _add_to_buckets(self, connection: Connection, outcomes: Sequence[Outcome]) -> None:
        added: dict[tuple[int, CellKey, str], list[float]] = {}
        for one in outcomes:
            check = f"{one.check} (probation)" if one.probation else one.check
            sums = added.setdefault((int(one.at // BUCKET_S * BUCKET_S), one.key, check), [0, 0, 0.0])
            sums[0] += 1
            sums[1] += one.bad
            sums[2] += one.value or 0.0
        for (start, key, check), (answers, bad, total) in added.items():
            values = {"start": start, **key.model_dump(), "check_name": check}
            changed = connection.execute(
                update(BUCKETS)
                .where(*(BUCKETS.c[name] == value for name, value in values.items()))
                .values(
                    answers=BUCKETS.c.answers + answers,
                    bad=BUCKETS.c.bad + bad,
                    total=BUCKETS.c.total + total,
                )
            )
            if not changed.rowcount:
                connection.execute(insert(BUCKETS).values(**values, answers=answers, bad=bad, total=total))


def _fact(connection: Connection, name: str) -> str | None:
    found: str | None = connection.execute(select(FACTS.c.value).where(FACTS.c.name == name)).scalar()
    return found


def _set_fact(connection: Connection, name: str, value: str) -> None:
    changed = connection.execute(update(FACTS).where(FACTS.c.name == name).values(value=value))
    if not changed.rowcount:
        connection.execute(insert(FACTS).values(name=name, value=value))
