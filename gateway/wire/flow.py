"""Who may read, write, parse and be kept; and how much clients may make the gateway hold.

``Flow`` decides for one connection, ``Intake`` for all connections of clients together. Nothing else pauses
or resumes reading.
"""

from __future__ import annotations

import asyncio
import select
import socket
import struct
from collections.abc import Callable
from typing import NamedTuple, Protocol

from gateway.errors import GatewayError, OverloadedError, TenantOverloadedError

WRITE_BUFFER = 1
"""What has been written is not taken: more answers would pile up."""
BACKLOG = 2
"""Bytes of later requests wait."""
OTHER_SIDE = 4
"""Whoever gets what is read does not take it."""
TURN = 8
"""Other connections have their turn first."""

UNCOUNTED_BYTES = 16 << 10
"""A request that came whole in one piece is not counted up to this: there are only so many connections."""
UNKNOWN = "?"
"""The tenant of bytes that nobody has claimed yet: heads."""
_LINGERING = 64
"""Connections beyond the limit that are told so at a time; further ones are cut."""
_TCP_INFO_BYTES_ACKED = 120
"""Where ``tcpi_bytes_acked`` stands in Linux's ``struct tcp_info`` (include/uapi/linux/tcp.h)."""
_HUNG_UP: int = getattr(select, "POLLRDHUP", 0) | select.POLLERR | select.POLLHUP


class Flow:
    """One connection's. ``held`` has the reasons, as bits, for which it is not read."""

    __slots__ = ("_readable", "_transport", "held")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._readable: select.poll | None = None
        self.held = 0

    def hold(self, reason: int) -> None:
        """Read nothing more until this reason, and every other one, is gone."""
        if not self.held and not self._transport.is_closing():
            self._transport.pause_reading()
        self.held |= reason

    def release(self, reason: int) -> None:
        if not self.held & reason:
            return
        self.held &= ~reason
        if not self.held and not self._transport.is_closing():
            self._transport.resume_reading()

    @property
    def may_parse(self) -> bool:
        """Whether a further request may be begun, or more of one be kept."""
        return not self.held & (WRITE_BUFFER | TURN) and not self._transport.is_closing()

    @property
    def reusable(self) -> bool:
        """Whether another request may be sent over it, as far as its flow goes: it is open, is read, and
        all that was written to it fits its buffer."""
        return not self.held and not self._transport.is_closing()

    def quiet(self) -> bool:
        """Whether nothing waits to be read: no bytes, and no end of the connection that the loop has not
        seen yet. It asks the system, 1 µs."""
        poll = self._readable
        if poll is None:
            poll = self._poll(select.POLLIN)
            if poll is None:
                return True
            self._readable = poll
        return not poll.poll(0)

    def hung_up(self) -> bool:
        """Whether the other side has closed a connection that is not read, where the system can tell."""
        poll = self._poll(_HUNG_UP)
        return poll is not None and bool(poll.poll(0))

    def _poll(self, events: int) -> select.poll | None:
        found = self._transport.get_extra_info("socket")
        if found is None or self._transport.is_closing() or (number := found.fileno()) < 0:
            return None
        poll = select.poll()
        poll.register(number, events)
        return poll

    def acknowledged(self) -> int | None:
        """Bytes that the other side's system has taken, where ours can tell (Linux, without TLS)."""
        found = self._transport.get_extra_info("socket")
        if found is None or self._transport.get_extra_info("sslcontext") is not None:
            return None
        try:
            info = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES_ACKED + 8)
            (taken,) = struct.unpack_from("=Q", info, _TCP_INFO_BYTES_ACKED)
        except (OSError, AttributeError, struct.error):
            return None
        return int(taken) - 1  # the opening of a connection counts as a byte


class Admission(NamedTuple):
    """A request's leave to send its body."""

    tenant: str
    """Whose bytes they are; empty where there are no keys, and then only the limits for all apply."""
    max_body_bytes: int
    setting: str = "gateway.max_body_bytes"
    """What would have to be changed for a larger body."""


class Limits(Protocol):
    """Of one process; ``GatewaySettings`` has them."""

    @property
    def max_connections(self) -> int: ...

    @property
    def max_buffered_bytes(self) -> int: ...

    @property
    def max_buffered_bytes_per_tenant(self) -> int: ...

    @property
    def min_body_bytes_per_s(self) -> int: ...


class Intake:
    """What all clients together may make the gateway hold: connections, and bytes of requests."""

    def __init__(self, limits: Callable[[], Limits]) -> None:
        """``limits`` gives the present ones."""
        self._limits = limits
        self.connections = 0
        self.buffered = 0
        """Bytes, of all requests that are being read, wait or are being answered."""
        self.by_tenant: dict[str, int] = {}
        """Of these the tenants' own; those without any are not in it."""

    @property
    def limits(self) -> Limits:
        return self._limits()

    def opened(self) -> None:
        """Count a connection; ``closed`` takes it back. Raises OverloadedError when there are too many, and
        counts it all the same."""
        self.connections += 1
        limit = self._limits().max_connections
        if self.connections > limit:
            raise OverloadedError(
                f"The gateway has {limit} connections open, as many as it may (gateway.max_connections); "
                "try again."
            )

    def closed(self) -> None:
        self.connections -= 1

    @property
    def crowded(self) -> bool:
        """Whether connections beyond the limit are to be cut without a word."""
        return self.connections > self._limits().max_connections + _LINGERING

    def reserve(self, tenant: str, size: int) -> None:
        """Take room for ``size`` more bytes, which ``release`` gives back. Raises OverloadedError or
        TenantOverloadedError when there is none, and then none is taken."""
        limits = self._limits()
        if self.buffered + size > limits.max_buffered_bytes:
            raise OverloadedError(
                "The requests that the gateway is reading and answering fill the "
                f"{limits.max_buffered_bytes} bytes that they may (gateway.max_buffered_bytes); try again."
            )
        if tenant:
            own = self.by_tenant.get(tenant, 0) + size
            if own > limits.max_buffered_bytes_per_tenant:
                raise TenantOverloadedError(
                    "The requests of this tenant that the gateway is reading and answering fill the "
                    f"{limits.max_buffered_bytes_per_tenant} bytes that they may "
                    "(gateway.max_buffered_bytes_per_tenant); try again, or send fewer at a time."
                )
            self.by_tenant[tenant] = own
        self.buffered += size

    def release(self, tenant: str, size: int) -> None:
        self.buffered -= size
        if tenant:
            left = self.by_tenant[tenant] - size
            if left:
                self.by_tenant[tenant] = left
            else:
                del self.by_tenant[tenant]


class Reservation:
    """The room that one connection has taken for one purpose: ``size`` bytes."""

    __slots__ = ("_intake", "_tenant", "size")

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self._tenant = ""
        self.size = 0

    def resize(self, tenant: str, size: int) -> None:
        """Hold room for ``size`` bytes from now on. Raises what ``Intake.reserve`` raises, and then all the
        room is given back: what it was taken for must be dropped."""
        if tenant != self._tenant or size < self.size:
            self.release()
        if size > self.size:
            try:
                self._intake.reserve(tenant, size - self.size)
            except GatewayError:
                self.release()
                raise
        self._tenant, self.size = tenant, size

    def release(self) -> None:
        if self.size:
            self._intake.release(self._tenant, self.size)
            self.size = 0
