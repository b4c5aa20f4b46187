"""The process in which content is read: prompts, answers, schemas, and what engines say of them.

It is a loop over messages (:mod:`gateway.quality.records`), one at a time, each answered by one step. It
knows no network and no files but a detector's model: where an engine has to be asked, the question goes to
the gateway, and the session waits until its answer comes. A message that takes too long ends the process;
the gateway starts another one.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from typing import Any

from gateway.quality.detectors import detector
from gateway.quality.examine import Tools, examine, keep, look, suffices, where
from gateway.quality.examiner import UnansweredError
from gateway.quality.records import (
    HEADER,
    Ask,
    Findings,
    Forget,
    Keep,
    Look,
    Prepare,
    Resume,
    Step,
    Suffices,
    Task,
    decode_task,
    encode,
)
from gateway.quality.schemas import Deadly, Mark

GRACE_S = 1.0
"""After the time of a message the gateway ends the process; so much later an alarm does, should the gateway
be gone."""
MOST_SESSIONS = 64
MOST_MEMORY = 4 << 30
"""Bytes of address space, where no classifier is loaded."""

Session = Coroutine[Any, Any, Findings]


class _Question:
    """Suspends a session until its question is answered."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    def __await__(self) -> Generator[Ask, bytes, bytes]:
        return (yield self._ask)


async def _ask(variant: str, path: str, body: bytes) -> bytes:
    return await _Question(Ask(variant, path, body))


class Worker:
    """Takes messages, and keeps the sessions that wait for an engine."""

    def __init__(self, begins: Callable[[Mark], None]) -> None:
        """``begins`` is told which schema is about to be looked at."""
        self.tools = Tools()
        self.tools.schemas.begins = begins
        self._sessions: dict[int, Session] = {}
        self._last = 0

    def handle(self, task: bytes, record: bytes) -> Step:
        """Raises nothing: what goes wrong is the step's ``error``."""
        try:
            return self._handle(decode_task(task), record)
        except UnansweredError as error:
            return Step(error=str(error))
        except Exception as error:
            return Step(error=where(error))

    def _handle(self, task: Task, record: bytes) -> Step:
        match task:
            case Prepare():
                return self._prepare(task)
            case Look():
                return Step(findings=look(task, record, self.tools))
            case Suffices():
                return Step(findings=suffices(task, record, self.tools))
            case Keep():
                return Step(findings=keep(task, record))
            case Resume():
                session = self._sessions.pop(task.session, None)
                if session is None:
                    return Step(error="the process that had asked has ended")
                return self._resume(task, session)
            case Forget():
                if (session := self._sessions.pop(task.session, None)) is not None:
                    session.close()
                return Step(findings=Findings())
            case _:
                session = examine(task, record, self.tools, _ask)
                self._last += 1
                return self._went(self._last, session, lambda: session.send(None))

    def _prepare(self, task: Prepare) -> Step:
        self.tools.schemas.deadly = Deadly(task.deadly)
        if task.classifier is not None:
            try:
                self.tools.detectors["classifier"] = detector("classifier", Path(task.classifier))
            except Exception as error:
                return Step(findings=Findings(), error=f"quality.classifier: {type(error).__name__}: {error}")
        return Step(findings=Findings())

    def _resume(self, task: Resume, session: Session) -> Step:
        answer = task.answer
        if answer is None:
            return self._went(task.session, session, lambda: session.throw(UnansweredError(task.why)))
        return self._went(task.session, session, lambda: session.send(answer))

    def _went(self, number: int, session: Session, go: Any) -> Step:
        """How far a session has come."""
        try:
            asked = go()
        except StopIteration as end:
            return Step(findings=end.value)
        if len(self._sessions) >= MOST_SESSIONS:
            self._sessions.pop(next(iter(self._sessions))).close()
        self._sessions[number] = session
        return Step(session=number, ask=asked)


def serve(connection: socket.socket) -> None:
    """Answer messages until the gateway closes its end."""

    def say(step: Step) -> None:
        message = encode(step)
        connection.sendall(HEADER.pack(len(message), 0, 0) + message)

    worker = Worker(lambda mark: say(Step(begins=mark)))
    while (header := _exactly(connection, HEADER.size)) is not None:
        size, record_size, limit_ms = HEADER.unpack(header)
        task, record = _exactly(connection, size), _exactly(connection, record_size)
        if task is None or record is None:
            return
        # The default action of this signal ends the process, whatever it is busy with.
        signal.setitimer(signal.ITIMER_REAL, limit_ms / 1000 + GRACE_S)
        step = worker.handle(task, record)
        signal.setitimer(signal.ITIMER_REAL, 0)
        say(step)


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    """So many bytes; None when the other end is closed."""
    parts = bytearray(size)
    view, got = memoryview(parts), 0
    while got < size:
        count = connection.recv_into(view[got:])
        if count == 0:
            return None
        got += count
    return bytes(parts)


def main() -> None:
    """``worker.py DESCRIPTOR NICENESS MEMORY``: serve over an inherited socket."""
    descriptor, niceness, limited = (int(argument) for argument in sys.argv[1:4])
    # Signals to the gateway's group are the gateway's to obey: this ends when it closes the connection.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold prompts
    if limited:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    with contextlib.suppress(OSError):
        # Of this machine's processes, the first to go where there is no memory left.
        Path("/proc/self/oom_score_adj").write_text("1000")
    if niceness:
        os.nice(niceness)
    with contextlib.suppress(ConnectionError):
        serve(socket.socket(fileno=descriptor))
    os._exit(0)  # at once: there is nothing to be put in order


if __name__ == "__main__":
    main()
