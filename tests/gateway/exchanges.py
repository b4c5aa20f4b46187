"""Exchanges without a network: a client that keeps what it is sent, and attempts that go as a test says."""

from __future__ import annotations

from typing import Any, cast

from gateway.errors import GatewayError, UpstreamError
from gateway.identity import Caller
from gateway.proxy.attempts import Attempts
from gateway.proxy.endpoints import CHAT, Endpoint
from gateway.proxy.exchange import Attempt, Exchange
from gateway.proxy.hops import Admitted
from gateway.proxy.limits import Limits
from gateway.proxy.reply import Reply
from gateway.proxy.waiting import WaitingLines
from gateway.routing.choices import Reason
from gateway.routing.replicas import Replica
from gateway.routing.router import Route
from gateway.upstream.options import OutputOptions
from gateway.wire.client import ClientConnection
from gateway.wire.flow import Admission
from gateway.wire.heads import RequestHead

STREAMED = OutputOptions(chat=True, stream=True)
WHOLE_ANSWER = b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}'


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Client:
    """Has the parts that it was sent, each as (what, bytes)."""

    old = False

    def __init__(self) -> None:
        self.got: list[tuple[str, bytes]] = []
        self.grown: list[int] = []
        self.transport = self

    def grow(self, size: int) -> None:
        self.grown.append(size)

    def send_whole(self, head: bytes, body: bytes, *, no_body: bool = False) -> None:
        self.got.append(("whole", head + b"\r\n" + body))

    def begin(self, head: bytes, payload: bytes) -> None:
        self.got.append(("begin", head + b"\r\n" + payload))

    def write(self, framed: bytes) -> None:
        self.got.append(("part", framed.split(b"\r\n", 1)[1][:-2]))

    def end(self, payload: bytes = b"") -> None:
        self.got.append(("end", payload))

    def abort(self) -> None:
        self.got.append(("abort", b""))

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.got]


class Driver:
    """Stands where the pipeline does: what attempts tell it."""

    def __init__(self) -> None:
        self.errors: list[GatewayError | Exception] = []
        self.finished = 0

    def fail(self, exchange: Exchange, error: GatewayError) -> None:
        self.errors.append(error)
        exchange.finished = True

    def defect(self, exchange: Exchange, error: Exception) -> None:
        self.errors.append(error)
        exchange.finished = True

    def finish(self, exchange: Exchange) -> None:
        self.finished += 1
        exchange.finished = True


class FakeAttempt:
    """An attempt that was begun and goes as it is told."""

    def __init__(self, exchange: Exchange, replica: Replica) -> None:
        self.exchange, self.replica = exchange, replica
        self.over = self.sent = self.did_nothing = self.cancelled = False

    def request_body(self) -> tuple[bytes | memoryview, ...] | None:
        return (b"{}",)

    def start(self) -> None:
        self.sent = True

    def cancel(self) -> None:
        self.over = self.cancelled = True

    def pause(self) -> None: ...

    def resume(self) -> None: ...


class Engines:
    """All attempts that were made, in order."""

    def __init__(self) -> None:
        self.made: list[FakeAttempt] = []

    def attempt(self, listener: Attempts, exchange: Exchange, replica: Replica, work: float) -> Attempt:
        self.made.append(FakeAttempt(exchange, replica))
        return self.made[-1]


class Trial:
    """Attempts over two replicas, and one exchange on them."""

    def __init__(self, *, stream: bool = False, clock: Clock | None = None, **limits: Any) -> None:
        self.clock = clock or Clock()
        self.replicas = [
            Replica("assistant:int8", f"assistant:int8-{n}", f"http://127.0.0.1:{n + 1}", self.clock)
            for n in range(2)
        ]
        self.engines, self.driver, self.client = Engines(), Driver(), Client()
        self.took: list[float] = []
        self.budget = True
        self.hedge_after_s: float | None = None
        self.attempts = Attempts(
            limits=Limits(
                **{"first_byte_s": 10, "answer_s": 20, "idle_s": 5, "total_s": 60, "wait_s": {}} | limits
            ),
            choose=self.choose,
            router=cast(Any, self),
            engines=self.engines,
            providers=self.engines,
            reply=Reply(),
            lines=WaitingLines(self.clock),
            clock=self.clock,
            checks=cast(Any, None),
            took=lambda exchange, attempt, seconds: self.took.append(seconds),
            escalated=lambda exchange, why: None,
            may_hedge=lambda: self.budget,
        )
        self.exchange = exchange(self.client, self.driver, stream=stream, now=self.clock())

    def choose(self, exchange: Exchange) -> None:
        replica = self.replicas[0]
        exchange.route = Route(
            "core",
            replica.variant,
            replica,
            Reason.CHEAPEST_IN_BUDGET,
            hedge_after_s=self.hedge_after_s,
            kind=("k",),  # type: ignore[arg-type]
        )

    def another(self, route: Route, busy: Replica) -> Replica | None:
        return self.replicas[1]

    def higher(self, route: Route) -> Route | None:
        return None

    def begin(self) -> FakeAttempt:
        self.attempts.begin(self.exchange)
        return self.engines.made[-1]

    def breaks(self, attempt: FakeAttempt, error: UpstreamError, *, did_nothing: bool = False) -> None:
        attempt.over, attempt.did_nothing = True, did_nothing
        self.attempts.broke(attempt, error)


def exchange(
    client: Client,
    driver: Any,
    *,
    stream: bool = False,
    now: float = 0.0,
    endpoint: Endpoint = CHAT,
    **headers: str,
) -> Exchange:
    """One that has been admitted, and whose sender is known."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    head = RequestHead("POST", endpoint.path, "", given, 2, keep_alive=True)
    head.memo = Admitted(None, endpoint, None, Admission("", 1 << 20))
    made = Exchange(driver, cast(ClientConnection, client), endpoint, head, b"{}", now)
    made.caller = Caller("core", None)
    if stream:
        made.options = STREAMED
    return made
