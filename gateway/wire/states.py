"""What may happen to a connection, and when. Two tables: what is not in them is a defect, never silent.

A client's connection has one request at a time; what the client sends beyond it waits.

========= ==== ======== ========= ======== ======== ======== ========= ====== ======== ======== ======= ======
state     part admitted request   refused  answered last     begun     ended  final    refusal  closing gone
========= ==== ======== ========= ======== ======== ======== ========= ====== ======== ======== ======= ======
IDLE      HEAD BODY     ANSWERING REFUSING -        -        -         -      -        -        CLOSING CLOSED
HEAD      HEAD BODY     ANSWERING REFUSING -        -        -         -      -        -        CLOSING CLOSED
BODY      BODY -        ANSWERING REFUSING -        -        -         -      -        -        CLOSING CLOSED
ANSWERING -    -        -         -        IDLE     DRAINING STREAMING -      -        -        -       CLOSED
STREAMING -    -        -         -        -        -        -         IDLE   DRAINING -        -       CLOSED
REFUSING  -    -        -         -        -        -        -         -      -        DRAINING -       CLOSED
DRAINING  -    -        -         -        -        -        -         -      -        -        CLOSING CLOSED
CLOSING   -    -        -         -        -        -        -         -      -        -        CLOSING CLOSED
CLOSED    -    -        -         -        CLOSED   CLOSED   CLOSED    CLOSED CLOSED   CLOSED   CLOSED  CLOSED
========= ==== ======== ========= ======== ======== ======== ========= ====== ======== ======== ======= ======

part: a part of a head or of a body has come, and it is not the last. admitted: the head is whole and
allowed, its body is awaited. request: a whole request is here. refused: what has come is answered by the
gateway at once, and where the next request would begin is unknown. answered, last: the whole answer at once,
and the connection ends after the last one. begun, ended, final: the beginning of an answer in parts, and its
end, after which the connection ends if it is final. refusal: the answer to what was refused. closing: the
connection ends once what was written is sent. gone: it is cut, by either side. In DRAINING the client is
read on for a while and nothing is kept: were it closed at once, one that is still sending would see a reset
instead of its answer. In CLOSED answers go nowhere: who makes them may hear of it later.

A connection to an engine has one request at a time.

======= ======= ======= ======= ==== ====== ======
state   sent    head    part    kept last   gone
======= ======= ======= ======= ==== ====== ======
FREE    WAITING -       -       -    -      CLOSED
WAITING -       READING -       FREE CLOSED CLOSED
READING -       -       READING FREE CLOSED CLOSED
CLOSED  CLOSED  -       -       -    -      CLOSED
======= ======= ======= ======= ==== ====== ======

sent: a request is written. head: the head of its answer has come, and not all of its body. part: a part of
that body. kept: the answer is whole and the connection clean. last: the answer is whole, and the connection
ends. gone: it is cut, by either side. A request that is sent in CLOSED is reported as lost.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TypeVar

_State = TypeVar("_State", bound=IntEnum)


class OutOfOrderError(RuntimeError):
    """Something has happened to a connection that cannot happen in its state: a defect of the gateway."""


class Moves(dict[IntEnum, _State]):
    """The states that follow one state, by event. Raises OutOfOrderError for events that cannot happen."""

    def __init__(self, moves: dict[IntEnum, _State], state: str) -> None:
        super().__init__(moves)
        self._state = state

    def __missing__(self, event: IntEnum) -> _State:
        raise OutOfOrderError(f"{event.name.lower()} cannot happen in {self._state}")


class ClientState(IntEnum):
    IDLE = 0
    HEAD = 1
    BODY = 2
    ANSWERING = 3
    STREAMING = 4
    REFUSING = 5
    DRAINING = 6
    CLOSING = 7
    CLOSED = 8


class ClientEvent(IntEnum):
    PART = 0
    ADMITTED = 1
    REQUEST = 2
    REFUSED = 3
    ANSWERED = 4
    LAST = 5
    BEGUN = 6
    ENDED = 7
    FINAL = 8
    REFUSAL = 9
    CLOSING = 10
    GONE = 11


class EngineState(IntEnum):
    FREE = 0
    WAITING = 1
    READING = 2
    CLOSED = 3


class EngineEvent(IntEnum):
    SENT = 0
    HEAD = 1
    PART = 2
    KEPT = 3
    LAST = 4
    GONE = 5


CLIENT: dict[ClientState, Moves[ClientState]] = {
    ClientState.IDLE: Moves(
        {
            ClientEvent.PART: ClientState.HEAD,
            ClientEvent.ADMITTED: ClientState.BODY,
            ClientEvent.REQUEST: ClientState.ANSWERING,
            ClientEvent.REFUSED: ClientState.REFUSING,
            ClientEvent.CLOSING: ClientState.CLOSING,
            ClientEvent.GONE: ClientState.CLOSED,
        },
        ClientState.IDLE.name,
    ),
    ClientState.HEAD: Moves(
        {
            ClientEvent.PART: ClientState.HEAD,
            ClientEvent.ADMITTED: ClientState.BODY,
            ClientEvent.REQUEST: ClientState.ANSWERING,
            ClientEvent.REFUSED: ClientState.REFUSING,
            ClientEvent.CLOSING: ClientState.CLOSING,
            ClientEvent.GONE: ClientState.CLOSED,
        },
        ClientState.HEAD.name,
    ),
    ClientState.BODY: Moves(
        {
            ClientEvent.PART: ClientState.BODY,
            ClientEvent.REQUEST: ClientState.ANSWERING,
            ClientEvent.REFUSED: ClientState.REFUSING,
            ClientEvent.CLOSING: ClientState.CLOSING,
            ClientEvent.GONE: ClientState.CLOSED,
        },
        ClientState.BODY.name,
    ),
    ClientState.ANSWERING: Moves(
        {
            ClientEvent.ANSWERED: ClientState.IDLE,
            ClientEvent.LAST: ClientState.DRAINING,
            ClientEvent.BEGUN: ClientState.STREAMING,
            ClientEvent.GONE: ClientState.CLOSED,
        },
        ClientState.ANSWERING.name,
    ),
    ClientState.STREAMING: Moves(
        {
            ClientEvent.ENDED: ClientState.IDLE,
            ClientEvent.FINAL: ClientState.DRAINING,
            ClientEvent.GONE: ClientState.CLOSED,
        },
        ClientState.STREAMING.name,
    ),
    ClientState.REFUSING: Moves(
        {
            ClientEvent.REFUSAL: ClientState.DRAINING,
            ClientEvent.GONE: ClientState.CLOSED,
        },
        ClientState.REFUSING.name,
    ),
    ClientState.DRAINING: Moves(
        {
            ClientEvent.CLOSING: ClientState.CLOSING,
            ClientEvent.GONE: ClientState.CLOSED,
        },
        ClientState.DRAINING.name,
    ),
    ClientState.CLOSING: Moves(
        {
            ClientEvent.CLOSING: ClientState.CLOSING,
            ClientEvent.GONE: ClientState.CLOSED,
        },
        ClientState.CLOSING.name,
    ),
    ClientState.CLOSED: Moves(
        {
            ClientEvent.ANSWERED: ClientState.CLOSED,
            ClientEvent.LAST: ClientState.CLOSED,
            ClientEvent.BEGUN: ClientState.CLOSED,
            ClientEvent.ENDED: ClientState.CLOSED,
            ClientEvent.FINAL: ClientState.CLOSED,
            ClientEvent.REFUSAL: ClientState.CLOSED,
            ClientEvent.CLOSING: ClientState.CLOSED,
            ClientEvent.GONE: ClientState.CLOSED,
        },
        ClientState.CLOSED.name,
    ),
}
"""The first table."""

ENGINE: dict[EngineState, Moves[EngineState]] = {
    EngineState.FREE: Moves(
        {
            EngineEvent.SENT: EngineState.WAITING,
            EngineEvent.GONE: EngineState.CLOSED,
        },
        EngineState.FREE.name,
    ),
    EngineState.WAITING: Moves(
        {
            EngineEvent.HEAD: EngineState.READING,
            EngineEvent.KEPT: EngineState.FREE,
            EngineEvent.LAST: EngineState.CLOSED,
            EngineEvent.GONE: EngineState.CLOSED,
        },
        EngineState.WAITING.name,
    ),
    EngineState.READING: Moves(
        {
            EngineEvent.PART: EngineState.READING,
            EngineEvent.KEPT: EngineState.FREE,
            EngineEvent.LAST: EngineState.CLOSED,
            EngineEvent.GONE: EngineState.CLOSED,
        },
        EngineState.READING.name,
    ),
    EngineState.CLOSED: Moves(
        {
            EngineEvent.SENT: EngineState.CLOSED,
            EngineEvent.GONE: EngineState.CLOSED,
        },
        EngineState.CLOSED.name,
    ),
}
"""The second table."""
