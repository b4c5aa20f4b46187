"""A database by its URL: how it is opened, and how its errors are told.

Functions block; whoever runs in the event loop calls them in a thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, MetaData, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import StaticPool

from gateway.config.section import ConfigError, shown_url
from gateway.store.errors import StoreError

__all__ = ["MEMORY", "Database", "StoreError", "Transaction", "configured_url"]

MEMORY = "sqlite://"
"""A database in this process's memory."""
_MEMORY_TOO = (MEMORY, "sqlite:///:memory:")
_CONNECT_TIMEOUT_S = 3
_STATEMENT_TIMEOUT_S = 5


def configured_url(section: str, url: str | None, variable: str | None) -> str | None:
    """What a section of the configuration says of its store, itself or by an environment variable; None where
    it says nothing. Raises ConfigError for a variable that is not set."""
    if variable is None:
        return url
    if not (found := os.environ.get(variable)):
        raise ConfigError(
            f"{section}.store_env: the environment has no {variable!r}; set it to a database's URL"
        )
    return found


class Database:
    """Connections to one database. Raises StoreError where it does not do what it is asked."""

    def __init__(self, url: str, setting: str, *, private: bool = False) -> None:
        """``setting``: where the URL comes from, for errors. ``private``: it holds what nobody else may read:
        a SQLite file is made for its owner alone, and what is deleted is overwritten."""
        self._setting = setting
        parsed = make_url(url)
        self.shown = shown_url(url)
        """The URL without its password."""
        self.in_memory = url in _MEMORY_TOO
        more: dict[str, Any] = {"pool_pre_ping": True}
        if self.in_memory:
            more = {"poolclass": StaticPool, "connect_args": {"check_same_thread": False}}
        elif parsed.get_backend_name() == "postgresql":
            more["connect_args"] = {"connect_timeout": _CONNECT_TIMEOUT_S}
        try:
            self.engine = create_engine(url, **more)
        except (ImportError, NoSuchModuleError) as error:
            raise StoreError(f"{setting}: {self.shown}: {error}; install its driver with pip") from None
        self.dialect = self.engine.dialect.name
        if self.dialect == "sqlite":
            event.listen(self.engine, "connect", _private if private else _patient)
            if private and not self.in_memory and parsed.database:
                self._make_private(Path(parsed.database))
        elif self.dialect == "postgresql":
            event.listen(self.engine, "connect", _impatient)

    def create(self, tables: MetaData, fill: Callable[[Connection], None] = lambda _: None) -> None:
        """Make the tables that do not exist. ``fill`` writes what they must have and do not; it is called
        anew, in a transaction of its own, where another process does the same at the same time."""
        try:
            self._create(tables, fill)
        except StoreError:
            # Two processes that start together both found them missing: by now they are there.
            self._create(tables, fill)

    def _create(self, tables: MetaData, fill: Callable[[Connection], None]) -> None:
        with self.begin() as connection:
            if self.dialect == "sqlite":
                # Its driver would end the transaction at each table, and another process see a part.
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            tables.create_all(connection)
            fill(connection)

    def begin(self) -> Transaction:
        """``with database.begin() as connection``: all of it or nothing, and errors in our own words."""
        return Transaction(self)

    def close(self) -> None:
        self.engine.dispose()

    def error(self, error: Exception) -> StoreError:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        return StoreError(f"{self._setting}: {self.shown}: {reason}; give a database that can be written")

    def _make_private(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # SQLite gives the files beside it (-wal, -shm) the same permissions.
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as error:
            raise self.error(error) from None


class Transaction:
    """One transaction of a database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._context: Any = None

    def __enter__(self) -> Connection:
        try:
            self._context = self._database.engine.begin()
            connection: Connection = self._context.__enter__()
        except SQLAlchemyError as error:
            raise self._database.error(error) from None
        return connection

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self._context.__exit__(kind, error, trace)
        except SQLAlchemyError as failed:
            raise self._database.error(failed) from None
        if isinstance(error, SQLAlchemyError):
            raise self._database.error(error) from None


def _patient(connection: Any, _: Any) -> None:
    """Several processes share the file: wait for each other, and let readers go on meanwhile."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA busy_timeout=5000")
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()


def _private(connection: Any, record: Any) -> None:
    _patient(connection, record)
    cursor = connection.cursor()
    cursor.execute("PRAGMA secure_delete=ON")
    cursor.close()


def _impatient(connection: Any, _: Any) -> None:
    """A server that takes a statement and never answers would keep a thread for ever."""
    cursor = connection.cursor()
    cursor.execute(f"SET statement_timeout = {_STATEMENT_TIMEOUT_S * 1000}")
    cursor.close()
    connection.commit()
