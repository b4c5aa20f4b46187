"""Fixtures of the gateway's tests."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path

import gateway_stack
import pytest
import uvloop
from gateway_stack import Stack, running_gateway
from sqlalchemy import create_engine, text

from gateway.telemetry.counters import Counter, Gauge, Histogram, SharedCounter, SharedHistogram


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The gateway is tested on the loop that it runs on in production."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(autouse=True)
def counters_have_one_owner(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Only the event loop's thread, here the main one, changes what is counted."""
    elsewhere: list[str] = []

    def watched(change: Callable[..., None]) -> Callable[..., None]:
        def changed(self: object, *given: float) -> None:
            if threading.current_thread() is not threading.main_thread():
                elsewhere.append("".join(traceback.format_stack(limit=6)))
            change(self, *given)

        return changed

    for kind in (Counter, SharedCounter, Histogram, SharedHistogram, Gauge):
        for name in ("inc", "observe", "set"):
            if name in vars(kind):
                monkeypatch.setattr(kind, name, watched(vars(kind)[name]))
    yield
    assert not elsewhere, "changed in another thread:\n" + elsewhere[0]


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of our own on a socket in a directory of our own; gives SQLAlchemy's URL of its database."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or [Path(shutil.which("initdb") or "")]
    if not found[-1].is_file():
        pytest.skip("PostgreSQL is not installed; tests/servers.sh installs it where it may")
    binaries = found[-1].parent
    # A path to a socket has at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="pg-") as place:
        directory = Path(place)
        directory.chmod(0o777)
        # PostgreSQL refuses to run as root.
        who = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        data = directory / "data"

        def run(*command: str) -> None:
            subprocess.run([*who, *command], check=True, capture_output=True, cwd=directory, timeout=120)

        run(str(binaries / "initdb"), "-D", str(data), "-A", "trust", "-U", "tiercel", "--no-sync")
        options = f"-c listen_addresses= -c unix_socket_directories={directory} -c fsync=off"
        log = str(directory / "log")
        run(str(binaries / "pg_ctl"), "-D", str(data), "-w", "-o", options, "-l", log, "start")
        try:
            yield f"postgresql+psycopg://tiercel@/postgres?host={directory}"
        finally:
            run(str(binaries / "pg_ctl"), "-D", str(data), "-m", "fast", "-w", "stop")


@pytest.fixture
def empty_postgresql(postgresql: str) -> str:
    """The same, without a table in it."""
    engine = create_engine(postgresql)
    with engine.begin() as connection:
        connection.execute(text("drop schema public cascade"))
        connection.execute(text("create schema public"))
    engine.dispose()
    return postgresql


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    """A gateway over three healthy fake engines."""
    async with running_gateway() as running:
        yield running


@pytest.fixture
def free_port() -> int:
    return gateway_stack.free_port()
