"""Who may read, write, parse and be kept, how much clients may make the gateway hold, and the two tables of
states."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, cast

import pytest
from gateway_stack import eventually
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import GatewayError, OverloadedError, TenantOverloadedError
from gateway.wire import states
from gateway.wire.flow import BACKLOG, OTHER_SIDE, TURN, WRITE_BUFFER, Flow, Intake, Reservation
from gateway.wire.states import CLIENT, ENGINE, OutOfOrderError


@dataclass
class Limits:
    max_connections: int = 2
    max_buffered_bytes: int = 100
    max_buffered_bytes_per_tenant: int = 60
    min_body_bytes_per_s: int = 0


class Read(asyncio.Protocol):
    def __init__(self) -> None:
        self.data = b""

    def data_received(self, data: bytes) -> None:
        self.data += data


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[Flow, Read, socket.socket, asyncio.Transport]]:
    """The flow of one end of a connection, what is read there, the other end, and the transport."""
    ours, theirs = socket.socketpair()
    transport, protocol = await asyncio.get_running_loop().create_connection(Read, sock=ours)
    try:
        yield Flow(cast(asyncio.Transport, transport)), protocol, theirs, cast(asyncio.Transport, transport)
    finally:
        transport.abort()
        theirs.close()


async def test_a_connection_is_read_when_no_reason_is_left_not_to() -> None:
    async with pair() as (flow, read, other, _):
        flow.hold(WRITE_BUFFER)
        flow.hold(OTHER_SIDE)
        flow.hold(OTHER_SIDE)
        other.send(b"x")
        flow.release(WRITE_BUFFER)
        flow.release(BACKLOG)
        assert not flow.reusable
        await asyncio.sleep(0.05)
        assert not read.data
        flow.release(OTHER_SIDE)
        await eventually(lambda: read.data == b"x")
        assert flow.reusable


async def test_nothing_is_parsed_while_answers_are_not_taken() -> None:
    async with pair() as (flow, _, _, transport):
        assert flow.may_parse
        for reason, may in ((WRITE_BUFFER, False), (TURN, False), (BACKLOG, True), (OTHER_SIDE, True)):
            flow.hold(reason)
            assert flow.may_parse is may
            assert not flow.reusable
            flow.release(reason)
        transport.abort()
        flow.hold(WRITE_BUFFER)
        flow.release(WRITE_BUFFER)
        assert not flow.may_parse
        assert not flow.reusable


async def test_whether_the_other_side_has_closed_is_known_before_the_loop_sees_it() -> None:
    async with pair() as (flow, _, other, _):
        assert flow.quiet()
        assert not flow.hung_up()
        other.send(b"x")
        assert not flow.quiet(), "bytes that nobody asked for"
    async with pair() as (flow, _, other, _):
        other.close()
        assert not flow.quiet()
        assert flow.hung_up()


def test_connections_beyond_the_limit() -> None:
    intake = Intake(Limits)
    intake.opened()
    intake.opened()
    with pytest.raises(OverloadedError, match=r"gateway\.max_connections"):
        intake.opened()
    assert not intake.crowded
    for _ in range(3):
        intake.closed()
    assert intake.connections == 0


def test_bytes_beyond_the_limits() -> None:
    intake = Intake(Limits)
    intake.reserve("a", 60)
    with pytest.raises(TenantOverloadedError, match=r"gateway\.max_buffered_bytes_per_tenant") as refused:
        intake.reserve("a", 1)
    assert refused.value.retry_after_s
    intake.reserve("", 40)
    with pytest.raises(OverloadedError, match=r"gateway\.max_buffered_bytes\)"):
        intake.reserve("b", 1)
    intake.release("a", 60)
    intake.release("", 40)
    assert (intake.buffered, intake.by_tenant) == (0, {})


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["", "a", "b"]), st.integers(0, 120))))
def test_room_is_never_lost(steps: list[tuple[int, str, int]]) -> None:
    """Whatever connections hold and drop, what is counted is what they hold."""
    intake = Intake(Limits)
    reservations = [Reservation(intake) for _ in range(4)]
    for which, tenant, size in steps:
        try:
            reservations[which].resize(tenant, size)
        except GatewayError:
            assert reservations[which].size == 0, "what finds no room is dropped"
        assert intake.buffered == sum(r.size for r in reservations) <= 100
        assert sum(intake.by_tenant.values()) <= intake.buffered
        assert all(0 < size <= 60 for size in intake.by_tenant.values())
    for reservation in reservations:
        reservation.release()
    assert (intake.buffered, intake.by_tenant) == (0, {})


def documented() -> list[dict[str, dict[str, str]]]:
    """The tables as the docstring has them."""
    blocks: list[list[list[str]]] = [[]]
    for line in (states.__doc__ or "").splitlines():
        cells = line.split()
        if len(cells) > 3 and not line.startswith("="):
            blocks[-1].append(cells)
        elif not line and blocks[-1]:
            blocks.append([])
    tables = [block for block in blocks if block and block[0][0] == "state"]
    return [{row[0]: dict(zip(block[0][1:], row[1:], strict=True)) for row in block[1:]} for block in tables]


def test_the_tables_are_those_of_the_docstring() -> None:
    tables: list[dict[Any, Any]] = [CLIENT, ENGINE]
    found = [
        {
            state.name: {
                event.name.lower(): (moves[event].name if event in moves else "-") for event in events
            }
            for state, moves in table.items()
        }
        for table, events in zip(tables, (states.ClientEvent, states.EngineEvent), strict=True)
    ]
    assert documented() == found


@pytest.mark.parametrize(
    ("state", "event"),
    [
        *((state, event) for state in CLIENT for event in states.ClientEvent if event not in CLIENT[state]),
        *((state, event) for state in ENGINE for event in states.EngineEvent if event not in ENGINE[state]),
    ],
)
def test_what_is_not_in_the_tables_is_a_defect(state: IntEnum, event: IntEnum) -> None:
    table: Any = CLIENT if isinstance(state, states.ClientState) else ENGINE
    with pytest.raises(OutOfOrderError, match=f"{event.name.lower()} cannot happen in {state.name}"):
        table[state][event]
