"""One engine process: what is known of it, and how requests come to it."""

from __future__ import annotations

import base64
import weakref
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

import msgspec

from gateway.config import parts_of, shown_url
from gateway.proxy.endpoints import Endpoint
from gateway.routing.breaker import Breaker, Clock
from gateway.wire.engine import ConnectionPool
from gateway.workers.board import Board

STALE_READING_S = 10.0


@dataclass(frozen=True, slots=True)
class Reading:
    """Figures of one engine, from its ``/metrics``; None for what it does not report."""

    kv_cache_usage: float | None = None
    waiting: float | None = None
    running: float | None = None
    cache_tokens: int | None = None
    """Tokens that its KV cache has room for."""
    preemptions: float | None = None
    """Requests that it has thrown out of its KV cache since its start, to begin them again."""
    adapters: int | None = None
    """LoRA adapters that it holds at a time."""
    prompt_tokens: float | None = None
    generation_tokens: float | None = None
    """Tokens that it has read and written since its start."""
    at: float = 0.0


class Lease(msgspec.Struct, eq=False, gc=False):
    """A request's place at a replica: one more in flight there, and the work that it brings."""

    _replica: Replica
    _work: float
    _ticket: int
    released: bool = False

    def began(self) -> None:
        """Its first token has come: its prompt waits no more. Safe at any time and twice."""
        if self._work:
            self._replica.work -= self._work
            self._work = 0.0

    def release(self) -> None:
        """It is over, however it ended; the breaker has been told before. Safe at any time and twice."""
        if self.released:
            return
        self.released = True
        if self._work:
            self.began()
        replica = self._replica
        if self._ticket:
            replica.breaker.abandoned(self._ticket)
        replica.mine -= 1
        if not replica.mine:
            replica.work = 0.0
        if replica.board is not None:
            replica.board.write(replica.slot, replica.mine)


class Replica:
    """One engine process, or one provider's model (then ``url`` is empty)."""

    def __init__(
        self,
        variant: str,
        name: str,
        url: str,
        clock: Clock,
        connect_timeout_s: float = 2.0,
        board: Board | None = None,
        key: str | None = None,
    ) -> None:
        """``variant``: ``model:variant``. ``board``: where several workers tell each other of their requests
        in flight. ``key``: what its engine asks for."""
        self.variant = variant
        self.name = name
        model, short = parts_of(variant)
        self.model = model or name
        """As its engine knows it; of a provider's, as clients do."""
        self.labels = self.model, short
        """Of metrics: model and variant."""
        self.url = url
        self.breaker = Breaker(clock)
        self.mine = 0
        """Requests of this process in flight there; leases count them."""
        self.board = board
        self.slot = 0 if board is None else board.slot(variant, url)
        if board is not None:
            weakref.finalize(self, board.free, self.slot).atexit = False
        self.work = 0.0
        """Blocks that are not in its cache, of requests whose first token has not come."""
        self.reachable: bool | None = None
        """What the last health probe found; None before the first."""
        self.reading = Reading()
        self._in_flight_at_reading = 0
        self.heard_at = clock()
        """When something last came of it: a byte of an answer, or tokens by its own count."""
        self._clock = clock
        self.connections = ConnectionPool(url, connect_timeout_s)
        self.base = f"{urlsplit(url).scheme}://{self.connections.netloc}{self.connections.base_path}"
        """Its URL without a name or password, which HTTP clients would send in ways of their own."""
        authorization = _basic(url) or (f"Bearer {key}" if key is not None else "")
        self.credentials = {"authorization": authorization} if authorization else {}
        """Headers that let a request in."""
        self.heads: dict[str, bytes] = {}
        """What requests begin with, by endpoint, as far as ``request_head`` was asked."""

    @property
    def where(self) -> str:
        """Its name and address, for the log."""
        return f"{self.name} at {shown_url(self.url)}"

    @property
    def in_flight(self) -> int:
        """Requests of ours, of all workers."""
        board = self.board
        return self.mine if board is None else self.mine + board.others(self.slot)

    def take(self, work: float = 0.0) -> Lease:
        """A request goes there. ``work``: blocks of its prompt that are not in the replica's cache."""
        self.mine += 1
        self.work += work
        if self.board is not None:
            self.board.write(self.slot, self.mine)
        breaker = self.breaker
        return Lease(self, work, 0 if breaker.no_failures else breaker.take())

    def read(self, reading: Reading) -> None:
        """The engine's own figures have come in."""
        before, self.reading = self.reading, reading
        self._in_flight_at_reading = self.in_flight
        if _rose(before.generation_tokens, reading.generation_tokens) or _rose(
            before.prompt_tokens, reading.prompt_tokens
        ):
            self.heard_at = self._clock()
            self.breaker.heard()

    def load(self) -> float | None:
        """Requests running and waiting there; None when the engine has not said so lately."""
        reading = self.reading
        if reading.running is None or self._clock() - reading.at > STALE_READING_S:
            return None
        since = self.in_flight - self._in_flight_at_reading
        return reading.running + (reading.waiting or 0.0) + since

    def request_head(self, endpoint: Endpoint) -> bytes:
        """What every request to an endpoint begins with."""
        head = self.heads.get(endpoint.path)
        if head is None:
            host = self.connections.netloc
            target = self.connections.base_path + endpoint.engine_path
            lines = [f"POST {target} HTTP/1.1", f"host: {host}", "content-type: application/json"]
            lines += [f"{name}: {value}" for name, value in self.credentials.items()]
            head = self.heads[endpoint.path] = "".join(f"{line}\r\n" for line in lines).encode()
        return head


def _basic(url: str) -> str:
    """What the name and password in a URL are as a header; empty where it has none."""
    parts = urlsplit(url)
    if parts.username is None:
        return ""
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return "Basic " + base64.b64encode(pair.encode()).decode()


def _rose(before: float | None, now: float | None) -> bool:
    """Whether a counter did; one that has fallen is of an engine that started anew."""
    return before is not None and now is not None and now > before
