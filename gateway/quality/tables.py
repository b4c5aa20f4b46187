"""The watch's tables. A database with those of another format is refused."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Boolean, Column, Float, Index, Integer, MetaData, String, Table, Text

FORMAT = "1"

META = MetaData()
_KEY = ("variant", "version", "role")


def _key_columns(primary: bool = False) -> list[Column[Any]]:
    return [Column(name, String(200), primary_key=primary, nullable=False) for name in _KEY]


OUTCOMES = Table(
    "watch_outcomes",
    META,
    Column("id", Integer, primary_key=True, autoincrement=True),
    *_key_columns(),
    Column("check_name", String(40), nullable=False),
    Column("bad", Boolean, nullable=False),
    Column("value", Float),
    Column("probation", Boolean, nullable=False),
    Column("at", Float, nullable=False),
)
CELLS = Table("watch_cells", META, *_key_columns(primary=True), Column("state", Text, nullable=False))
EVENTS = Table(
    "watch_events",
    META,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("kind", String(40), nullable=False),
    *_key_columns(),
    Column("at", Float, nullable=False),
    Column("why", Text, nullable=False),
    Column("evidence", Text, nullable=False),
    Index("watch_events_at", "at"),
)
BUCKETS = Table(
    "watch_buckets",
    META,
    Column("start", Integer, primary_key=True),
    *_key_columns(primary=True),
    Column("check_name", String(40), primary_key=True),
    Column("answers", Integer, nullable=False),
    Column("bad", Integer, nullable=False),
    Column("total", Float, nullable=False),
)
FACTS = Table(
    "watch_facts", META, Column("name", String(40), primary_key=True), Column("value", Text, nullable=False)
)
