"""Responses by owner and id: what a client gave, what it got, and which response it went on from.

A row has its own turn only; a conversation is the chain of rows by ``previous``. Every use of a conversation
counts for all of its rows, so that what leaves first is what nobody has gone on from for longest. Limits are
kept to within a tenth. Functions block.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BigInteger,
    BindParameter,
    Boolean,
    Column,
    Connection,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Row,
    String,
    Table,
    and_,
    bindparam,
    delete,
    func,
    inspect,
    not_,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from gateway.config.responses import ResponsesSettings
from gateway.store.database import Database

RUNNING = ("queued", "in_progress")
PRUNE_S = 5.0
SILENT_S = 60.0
"""A response whose process has not said for so long that it still works on it will never come. Two machines'
clocks are compared here: they may differ by less than this."""
_TOUCH_S = 60.0
"""How exactly it is known when a response was used last."""
_AT_A_TIME = 1000
"""Rows that are deleted in one transaction."""

_META = MetaData()
RESPONSES = Table(
    "tiercel_responses",
    _META,
    Column("owner", String, primary_key=True),
    Column("id", String(128), primary_key=True),
    Column("previous", String(128)),
    Column("depth", Integer, nullable=False),
    Column("status", String(20), nullable=False),
    Column("background", Boolean, nullable=False),
    Column("used", Float, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("input", LargeBinary, nullable=False),
    Column("response", LargeBinary, nullable=False),
    Column("runner", String(64)),
    Column("beat", Float),
    Index("tiercel_responses_used", "used"),
)
_DROPPED = "context"
"""A column that earlier versions wrote and nobody read; it has no default, so nothing is kept beside it."""
_C = RESPONSES.c
_OWN_COLUMNS = tuple(column.name for column in _C if column.name != "used")
_INSERT: dict[str, Callable[[Table], Any]] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


@dataclass(frozen=True, slots=True)
class Stored:
    """One response. ``owner`` is whose it is; nobody else ever gets it."""

    owner: str
    id: str
    status: str
    input: bytes
    """Its own input items, a JSON array as an engine takes it."""
    response: bytes
    """The response object as its client gets it, JSON."""
    previous: str | None = None
    depth: int = 1
    """Responses in the conversation up to this one."""
    background: bool = False
    runner: str | None = None
    """The process that works on it in the background."""
    beat: float | None = None
    """When that process has last said so."""

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.input) + len(self.response)

    @property
    def running(self) -> bool:
        return self.status in RUNNING


class ResponseStore:
    """One process's connection to the store. Raises StoreError where the database fails."""

    def __init__(self, url: str, limits: ResponsesSettings, clock: Callable[[], float] = time.time) -> None:
        """``clock``: Unix time."""
        self.limits = limits
        self._clock = clock
        self._database = Database(url, "responses.store", private=True)
        self.shared = not self._database.in_memory
        """Whether other processes may write to it."""
        self._lock = threading.Lock()
        self._added = self._added_bytes = 0
        self._pruned_at = clock()
        self._database.create(_META, _without_dropped)
        self._statements = _Statements(_INSERT[self._database.dialect])

    def close(self) -> None:
        self._database.close()

    def ping(self) -> None:
        """Whether it can be used: raises StoreError if not."""
        with self._database.begin() as connection:
            connection.execute(select(_C.id).limit(1))

    def put(self, stored: Stored) -> None:
        """Keep it, in place of one of the same owner and id."""
        values = {name: getattr(stored, name) for name in _OWN_COLUMNS}
        with self._database.begin() as connection:
            connection.execute(self._statements.put, {**values, "used": self._clock()})
        with self._lock:
            self._added += 1
            self._added_bytes += stored.size
            limits = self.limits
            due = (
                self._added > limits.max_responses // 10
                or self._added_bytes > min(limits.max_bytes, limits.max_tenant_bytes) // 10
                or self._clock() - self._pruned_at > PRUNE_S
            )
        if due:
            self.prune()

    def get(self, owner: str, response_id: str) -> Stored | None:
        """One response, unless it has expired."""
        with self._database.begin() as connection:
            row = connection.execute(self._statements.get, self._asked(owner, response_id)).one_or_none()
        return None if row is None else _stored(row)

    def chain(self, owner: str, response_id: str) -> list[Stored]:
        """A response and those before it, the first one first. Where one of those is gone, the ones after it
        alone: ``chain[0].depth`` is 1 when it is whole. Empty where there is no such response."""
        return [_stored(row) for row in self._used(self._statements.chain, owner, response_id)]

    def links(self, owner: str, response_id: str) -> list[tuple[str, int]]:
        """The ids of such a chain and their bytes, without what they hold."""
        return [(row.id, row.size) for row in self._used(self._statements.links, owner, response_id)]

    def some(self, owner: str, ids: Sequence[str]) -> list[Stored]:
        """Those of the responses of one chain that are there, the first one first."""
        wanted = select(RESPONSES).where(_C.owner == owner, _C.id.in_(ids)).order_by(_C.depth)
        with self._database.begin() as connection:
            rows = connection.execute(wanted).all()
        return [_stored(row) for row in rows]

    def _used(self, chain: Any, owner: str, response_id: str) -> Sequence[Row[Any]]:
        """The rows of a chain, which count as used now."""
        now = self._clock()
        with self._database.begin() as connection:
            rows = connection.execute(chain, self._asked(owner, response_id)).all()
            if any(row.used < now - _TOUCH_S for row in rows):
                ids = [row.id for row in rows]
                touched = update(RESPONSES).where(_C.owner == owner, _C.id.in_(ids)).values(used=now)
                connection.execute(touched)
        return rows

    def delete(self, owner: str, response_id: str) -> bool:
        """Whether there was one."""
        with self._database.begin() as connection:
            gone = connection.execute(self._statements.delete, self._asked(owner, response_id))
            return gone.rowcount == 1

    # in the background

    def finish(self, owner: str, response_id: str, status: str, response: bytes) -> bool:
        """Write what has become of a response that was under way; whether it still was."""
        changed = (
            update(RESPONSES)
            .where(_C.owner == owner, _C.id == response_id, _C.status.in_(RUNNING))
            .values(
                status=status,
                response=response,
                size=func.length(_C.input) + len(response),
                used=self._clock(),
                runner=None,
            )
        )
        with self._database.begin() as connection:
            return connection.execute(changed).rowcount == 1

    def beat(self, runner: str, ids: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
        """Say that this process still works on these (owner, id); those of them that somebody has cancelled
        or deleted meanwhile."""
        mine = (tuple_(_C.owner, _C.id).in_(ids), _C.runner == runner, _C.status.in_(RUNNING))
        with self._database.begin() as connection:
            connection.execute(
                update(RESPONSES).where(*mine).values(beat=self._clock(), status="in_progress")
            )
            left = connection.execute(select(_C.owner, _C.id).where(*mine)).all()
        return set(ids) - {(row.owner, row.id) for row in left}

    def silent(self, stored: Stored) -> bool:
        """Whether it is under way by its status alone: the process that worked on it has gone."""
        return stored.running and (stored.beat or 0.0) < self._clock() - SILENT_S

    # limits

    def prune(self) -> int:
        """Forget what has expired and what is too much; how many went."""
        with self._lock:
            self._added = self._added_bytes = 0
            self._pruned_at = self._clock()
        with self._database.begin() as connection:
            expired = delete(RESPONSES).where(_C.used < self._oldest())
            gone = connection.execute(expired).rowcount
        while True:
            with self._database.begin() as connection:
                rows = connection.execute(self._too_much()).all()
                if rows:
                    ids = [(row.owner, row.id) for row in rows]
                    connection.execute(delete(RESPONSES).where(tuple_(_C.owner, _C.id).in_(ids)))
                    gone += len(ids)
            if len(rows) < _AT_A_TIME:
                return gone

    def usage(self, owners: Iterable[str] = ()) -> tuple[int, int]:
        """Responses, and their bytes; of all owners unless some are named."""
        wanted = select(func.count(), func.coalesce(func.sum(_C.size), 0))
        if owners:
            wanted = wanted.where(_C.owner.in_(list(owners)))
        with self._database.begin() as connection:
            count, size = connection.execute(wanted).one()
        return int(count), int(size)

    def _too_much(self) -> Any:
        """Rows over a limit, counted from the one that was used last. What somebody works on stays."""
        newest = (_C.used.desc(), _C.depth.desc(), _C.owner, _C.id)
        ranked = select(
            _C.owner,
            _C.id,
            and_(_C.status.in_(RUNNING), _C.runner.is_not(None), _C.beat >= self._clock() - SILENT_S).label(
                "worked_on"
            ),
            func.row_number().over(partition_by=_C.owner, order_by=newest).label("number"),
            func.sum(_C.size).over(partition_by=_C.owner, order_by=newest).label("bytes"),
            func.sum(_C.size).over(order_by=newest).label("all_bytes"),
        ).subquery()
        limits, found = self.limits, ranked.c
        return (
            select(found.owner, found.id)
            .where(
                not_(func.coalesce(found.worked_on, False)),
                or_(
                    found.number > limits.max_responses,
                    found.bytes > limits.max_tenant_bytes,
                    found.all_bytes > limits.max_bytes,
                ),
            )
            .limit(_AT_A_TIME)
        )

    def _oldest(self) -> float:
        """When what has not expired was used at the earliest."""
        return self._clock() - self.limits.keep_s

    def _asked(self, owner: str, response_id: str) -> dict[str, Any]:
        return {"whose": owner, "name": response_id, "oldest": self._oldest()}


class _Statements:
    """What is executed for every request, put together once: SQLAlchemy takes longer for that than a
    database for the work. Their parameters are ``whose``, ``name`` and ``oldest``."""

    def __init__(self, insert: Callable[[Table], Any]) -> None:
        whose: BindParameter[str] = bindparam("whose")
        fresh = _C.used >= bindparam("oldest")
        one = (_C.owner == whose, _C.id == bindparam("name"), fresh)
        self.get = select(RESPONSES).where(*one)
        self.delete = delete(RESPONSES).where(*one)
        added = insert(RESPONSES)
        rest = {column.name: added.excluded[column.name] for column in _C if not column.primary_key}
        self.put = added.on_conflict_do_update(index_elements=["owner", "id"], set_=rest)
        linked = select(_C.id, _C.previous, _C.depth).where(*one).cte("linked", recursive=True)
        before = select(_C.id, _C.previous, _C.depth).where(
            # Ids can be of a client's making: a smaller depth with every step means an end.
            _C.owner == whose,
            _C.id == linked.c.previous,
            _C.depth < linked.c.depth,
            fresh,
        )
        linked = linked.union_all(before)
        in_chain = (_C.owner == whose, _C.id.in_(select(linked.c.id)))
        self.chain = select(RESPONSES).where(*in_chain).order_by(_C.depth)
        self.links = select(_C.id, _C.size, _C.used).where(*in_chain).order_by(_C.depth)


def _without_dropped(connection: Connection) -> None:
    if _DROPPED in {column["name"] for column in inspect(connection).get_columns(RESPONSES.name)}:
        connection.exec_driver_sql(f"ALTER TABLE {RESPONSES.name} DROP COLUMN {_DROPPED}")


def _stored(row: Row[Any]) -> Stored:
    return Stored(
        owner=row.owner,
        id=row.id,
        status=row.status,
        input=bytes(row.input),
        response=bytes(row.response),
        previous=row.previous,
        depth=row.depth,
        background=row.background,
        runner=row.runner,
        beat=row.beat,
    )
