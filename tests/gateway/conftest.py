"""Fixtures of the gateway's tests."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator

import pytest
from gateway_stack import Stack, running_gateway


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    """A gateway over three healthy fake engines."""
    async with running_gateway() as running:
        yield running


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
