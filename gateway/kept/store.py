"""Kept conversations in a database: sealed, bounded in rows per role, in bytes and in age.

A row says openly what it is, of which role and variant, when it came and how large it is; what was asked and
answered is sealed. Functions block.
"""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    delete,
    func,
    insert,
    select,
    update,
)

from gateway.config import Config
from gateway.kept.cipher import Cipher, SealError
from gateway.kept.conversation import Asked, Kind, read_asked
from gateway.store.database import Database, StoreError, configured_url

FORMAT = "1"
_DAY_S = 86_400.0
_META = MetaData()
_KEPT = Table(
    "tiercel_kept",
    _META,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("kind", String(20), nullable=False),
    Column("role", String(200), nullable=False),
    Column("variant", String(200), nullable=False),
    Column("version", String(200), nullable=False),
    Column("probation", Boolean, nullable=False),
    Column("at", Float, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("mark", String(64), nullable=False, unique=True),
    Column("data", LargeBinary, nullable=False),
    Column("given", LargeBinary),
    Index("tiercel_kept_role", "kind", "role"),
)
_FACTS = Table(
    "tiercel_kept_facts",
    _META,
    Column("name", String(40), primary_key=True),
    Column("value", Text, nullable=False),
)
_C = _KEPT.c


@dataclass(frozen=True, slots=True)
class About:
    """What a row says openly. ``version``: of the variant, for answers; ``at``: Unix time."""

    kind: Kind
    role: str
    variant: str
    version: str
    at: float
    probation: bool = False
    """Of an answer: no client got it."""

    @property
    def sealed_with(self) -> bytes:
        return json.dumps(
            ["tiercel kept 1", self.kind, self.role, self.variant, self.version, self.at, self.probation]
        ).encode()


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation; ``data`` is a request or an answer, encoded."""

    about: About
    data: bytes

    def __repr__(self) -> str:
        return f"Row({self.about.kind} of {self.about.role}, {len(self.data)} bytes)"


class Given(msgspec.Struct):
    """The reference's answer to a request, and what it answers for: another version is asked anew."""

    reference: str
    text: str

    def __repr__(self) -> str:
        return f"Given({len(self.text)} characters)"


@dataclass(frozen=True, slots=True)
class Question:
    """A kept request that was opened."""

    id: int
    asked: Asked
    given: Given | None


@dataclass(frozen=True, slots=True)
class Count:
    """How many there are of a kind, in a role, from a variant; Unix times of the first and the last."""

    kind: Kind
    role: str
    variant: str
    version: str
    number: int
    bytes: int
    since: float
    until: float


@dataclass(frozen=True, slots=True)
class Limits:
    """``most``: rows by kind and role (of answers: also by variant), the newest stay."""

    days: float
    max_bytes: int
    most: Mapping[tuple[Kind, str], int]


class KeptStore:
    """Raises StoreError where the database does not do what it is asked, or was sealed with another key.
    Without a ``cipher`` rows can be counted and deleted."""

    def __init__(self, url: str, cipher: Cipher | None) -> None:
        self._cipher = cipher
        self._database = Database(url, "kept.store", private=True)
        try:
            self._database.create(_META, self._check)
        except BaseException:
            self._database.close()
            raise

    def close(self) -> None:
        self._database.close()

    def keep(self, rows: Sequence[Row], limits: Limits, now: float) -> list[bool]:
        """Write them; of requests, those that are not there already. Which were written."""
        with self._database.begin() as connection:
            written = [self._insert(connection, row) for row in rows]
            self._bound(connection, limits, now)
        return written

    def prune(self, limits: Limits, now: float) -> None:
        """Forget what is too old, too much or too many."""
        with self._database.begin() as connection:
            self._bound(connection, limits, now)

    def counts(self) -> list[Count]:
        by = (_C.kind, _C.role, _C.variant, _C.version)
        figures = func.count(), func.sum(_C.size), func.min(_C.at), func.max(_C.at)
        with self._database.begin() as connection:
            rows = connection.execute(select(*by, *figures).group_by(*by).order_by(*by)).all()
        return [
            Count(kind, role, variant, version, int(number), int(size), since, until)
            for kind, role, variant, version, number, size, since, until in rows
        ]

    def ids(self, kind: Kind, role: str | None = None, variant: str | None = None) -> list[int]:
        """In the order in which they came."""
        wanted = select(_C.id).where(_C.kind == kind).order_by(_C.id)
        if role is not None:
            wanted = wanted.where(_C.role == role)
        if variant is not None:
            wanted = wanted.where(_C.variant == variant)
        with self._database.begin() as connection:
            return list(connection.execute(wanted).scalars())

    def question(self, number: int) -> Question | None:
        """None where it is gone, or cannot be opened."""
        found = self._open(number)
        if found is None:
            return None
        _, data, given = found
        try:
            answer = msgspec.msgpack.decode(given, type=Given) if given is not None else None
            return Question(number, read_asked(data), answer)
        except msgspec.MsgspecError:
            return None

    def answer(self, number: int) -> Row | None:
        """None where it is gone, or cannot be opened."""
        found = self._open(number)
        return None if found is None else Row(found[0], found[1])

    def give(self, number: int, given: Given) -> None:
        """Keep the reference's answer with its request."""
        with self._database.begin() as connection:
            row = connection.execute(select(_KEPT).where(_C.id == number)).first()
            if row is not None:
                sealed = self._sealing.seal(
                    msgspec.msgpack.encode(given), _about(row).sealed_with + b" given"
                )
                connection.execute(
                    update(_KEPT)
                    .where(_C.id == number)
                    .values(given=sealed, size=len(row.data) + len(sealed))
                )

    def take(self, number: int) -> bool:
        """Delete one; whether it was still there: of several processes one alone has it."""
        with self._database.begin() as connection:
            return connection.execute(delete(_KEPT).where(_C.id == number)).rowcount == 1

    def forget(self, role: str | None = None) -> int:
        """Delete those of a role, or all; how many there were. With all of them the key is forgotten too:
        the next one may be another."""
        gone = delete(_KEPT) if role is None else delete(_KEPT).where(_C.role == role)
        with self._database.begin() as connection:
            if role is None:
                connection.execute(delete(_FACTS).where(_FACTS.c.name == "key"))
            return int(connection.execute(gone).rowcount)

    # within a transaction

    @property
    def _sealing(self) -> Cipher:
        if self._cipher is None:
            raise StoreError("kept.store: was opened without its key")
        return self._cipher

    def _insert(self, connection: Connection, row: Row) -> bool:
        about, cipher = row.about, self._sealing
        mark = secrets.token_hex(32)
        if about.kind == "request":
            mark = cipher.mark(about.role.encode() + b"\0" + row.data)
            if connection.execute(select(_C.id).where(_C.mark == mark)).first() is not None:
                return False
        sealed = cipher.seal(row.data, about.sealed_with)
        values = {name: getattr(about, name) for name in _OPEN}
        connection.execute(insert(_KEPT).values(**values, mark=mark, size=len(sealed), data=sealed))
        return True

    def _bound(self, connection: Connection, limits: Limits, now: float) -> None:
        connection.execute(delete(_KEPT).where(_C.at < now - limits.days * _DAY_S))
        for (kind, role), most in limits.most.items():
            of = (_C.kind == kind) & (_C.role == role)
            variants: Iterable[str | None] = (None,)
            if kind == "answer":
                variants = connection.execute(select(_C.variant).where(of).distinct()).scalars().all()
            for variant in variants:
                mine = of if variant is None else of & (_C.variant == variant)
                oldest = connection.execute(
                    select(_C.id).where(mine).order_by(_C.id.desc()).offset(most).limit(1)
                ).scalar()
                if oldest is not None:
                    connection.execute(delete(_KEPT).where(mine & (_C.id <= oldest)))
        self._bound_bytes(connection, limits.max_bytes)

    def _bound_bytes(self, connection: Connection, most: int) -> None:
        over = int(connection.execute(select(func.sum(_C.size))).scalar() or 0) - most
        if over <= 0:
            return
        last = 0
        for number, size in connection.execute(select(_C.id, _C.size).order_by(_C.id)):
            last, over = number, over - size
            if over <= 0:
                break
        connection.execute(delete(_KEPT).where(_C.id <= last))

    def _open(self, number: int) -> tuple[About, bytes, bytes | None] | None:
        with self._database.begin() as connection:
            row = connection.execute(select(_KEPT).where(_C.id == number)).first()
        if row is None:
            return None
        about, cipher = _about(row), self._sealing
        try:
            data = cipher.open(row.data, about.sealed_with)
            given = None if row.given is None else cipher.open(row.given, about.sealed_with + b" given")
        except SealError:
            return None
        return about, data, given

    def _check(self, connection: Connection) -> None:
        facts: dict[str, str] = {
            row.name: row.value for row in connection.execute(select(_FACTS.c.name, _FACTS.c.value))
        }
        where = self._database.shown
        if (found := facts.get("format", FORMAT)) != FORMAT:
            raise StoreError(
                f"kept.store: {where} has tables of format {found}, not {FORMAT}; give another database"
            )
        added = {"format": FORMAT}
        if self._cipher is not None and (known := facts.get("key")) is not None:
            try:
                self._cipher.open(base64.b64decode(known), b"tiercel kept key")
            except SealError:
                raise StoreError(
                    f"kept.store: {where} was written with another key than is given now; give that one "
                    "(kept.key_env, or the file in run_dir), or delete what was kept with `tiercel tasks "
                    "forget --all`"
                ) from None
        elif self._cipher is not None:
            sealed = self._cipher.seal(b"tiercel", b"tiercel kept key")
            added["key"] = base64.b64encode(sealed).decode()
        for name, value in added.items():
            if name not in facts:
                connection.execute(insert(_FACTS).values(name=name, value=value))


_OPEN = ("kind", "role", "variant", "version", "at", "probation")


def _about(row: Any) -> About:
    return About(**{name: getattr(row, name) for name in _OPEN})


def store_url(config: Config) -> str:
    """Where conversations are kept. Raises ConfigError for a variable that is not set."""
    given = configured_url("kept", config.kept.store, config.kept.store_env) if config.kept else None
    return given or f"sqlite:///{config.run_dir / 'kept.db'}"


def missing_store(config: Config) -> Path | None:
    """The file that the store would be, where nothing has been kept yet."""
    url = store_url(config)
    path = Path(url.removeprefix("sqlite:///"))
    return path if url.startswith("sqlite:///") and not path.exists() else None


def limits_of(config: Config) -> Limits:
    """What the configuration allows."""
    assert config.kept is not None
    most: dict[tuple[Kind, str], int] = {
        ("request", name): role.record.most for name, role in config.roles.items() if role.record
    }
    most |= {("answer", name): config.watch.waiting.most for name in config.roles}
    return Limits(config.kept.days, config.kept.max_bytes, most)
