"""Fixtures of the gateway's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import gateway_stack
import pytest
from gateway_stack import Stack, running_gateway


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    """A gateway over three healthy fake engines."""
    async with running_gateway() as running:
        yield running


@pytest.fixture
def free_port() -> int:
    return gateway_stack.free_port()
