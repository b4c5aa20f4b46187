"""Fixtures of the gateway's tests."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path

import gateway_stack
import pytest
import uvloop
from gateway_stack import Stack, running_gateway


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The gateway is tested on the loop that it runs on in production."""
    return {"uvloop": uvloop.new_event_loop}


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
async def stack() -> AsyncIterator[Stack]:
    """A gateway over three healthy fake engines."""
    async with running_gateway() as running:
        yield running


@pytest.fixture
def free_port() -> int:
    return gateway_stack.free_port()
