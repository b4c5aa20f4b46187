"""Why an engine ended, from its log.

A vLLM that fails to start writes several tracebacks: that of the process where it happened (a worker, the
engine's core), and those of the processes that noticed, which say "Engine core initialization failed. See
root cause above". The cause is the last error before the first of those.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_PROCESS = re.compile(r"^\((?:[\w -]+ pid=\d+|[A-Z]\w*)\) ?")
_LEVEL = re.compile(r"^(DEBUG|INFO|WARNING|ERROR|CRITICAL) \S+(?: [\d:.]+)?(?: \[[^\]]*\]| \S+:) ?")
"""``ERROR 11-26 07:02:59 [core.py:1011] `` and older forms without a time."""
_ERROR = re.compile(r"(?:[a-z_]\w*\.)*_?([A-Z]\w*(?:Error|Exception|Exit))(?:: (.*))?$")
_INSIDE = re.compile(r"\b[A-Z]\w*(?:Error|Exception): .+")
_COUNTED = re.compile(r"(\d+) validation errors? for (\w+)")
_FATAL = re.compile(
    r"Fatal Python error: .+|Segmentation fault.*"
    r"|.+: error: (?:unrecognized arguments|argument|the following|ambiguous).+"
    r"|.*Worker\w* .*died unexpectedly.*"
)
_ECHO = re.compile(
    r"Engine core initialization failed|WorkerProc initialization failed|Engine process failed to start"
    r"|See (?:root cause|stack trace)|EngineCore failed to start|Failed core proc|EngineDeadError|SystemExit"
    r"|CancelledError|died unexpectedly"
)
"""What a process says of another's failure."""
_DETAILS = re.compile(r" \[type=\w+, input_value=.*$")


@dataclass(frozen=True)
class _Line:
    level: str
    text: str


def reason(log: str) -> str:
    """The line of an engine's log that says why it ended, without the logger's prefix; the last line where no
    error is named.

    A pydantic error is the sentence about its field, not the count of them. A bare ``AssertionError`` is
    followed by what was asserted.
    """
    lines = [_parsed(line) for line in log.splitlines() if line.strip()]
    found = list(_errors(lines))
    echoes = [at for at, line in enumerate(lines) if _ECHO.search(line.text)]
    first = echoes[0] if echoes else len(lines)
    before = [text for at, text in found if at < first and not _ECHO.search(text)]
    after = [text for at, text in found if at > first and not _ECHO.search(text)]
    said = [line.text.strip() for line in lines if line.text.strip()]
    return (before[-1:] or after[:1] or [text for _, text in found][:1] or said[-1:] or ["it said nothing"])[
        0
    ]


def _parsed(raw: str) -> _Line:
    line = _PROCESS.sub("", raw.rstrip(), count=1)
    if (found := _LEVEL.match(line)) is None:
        return _Line("", line)
    return _Line(found[1], line[found.end() :])


def _errors(lines: Sequence[_Line]) -> Iterator[tuple[int, str]]:
    """Line numbers and texts of what names an error."""
    for at, line in enumerate(lines):
        if line.level in ("DEBUG", "INFO", "WARNING"):
            continue
        text = line.text
        if _FATAL.fullmatch(text.strip()):
            yield at, text.strip()
        elif (error := _ERROR.match(text)) is not None:
            yield at, _whole(lines, at, error[1], error[2] or "")
        elif (inside := _INSIDE.search(text)) is not None and line.level:
            yield at, inside[0]


def _whole(lines: Sequence[_Line], at: int, name: str, said: str) -> str:
    """An exception with what is said of it on the lines around."""
    following = [line.text for line in lines[at + 1 : at + 3]]
    if (counted := _COUNTED.match(said)) is not None and following:
        place = "" if following[0].startswith("  ") else f"{following[0].strip()}: "
        message = following[1 if place else 0] if len(following) > bool(place) else ""
        message = _DETAILS.sub("", message.strip()).removeprefix("Value error, ")
        more = f" (and {int(counted[1]) - 1} more)" if counted[1] != "1" else ""
        return f"{counted[2]}: {place}{message.removeprefix('Assertion failed, ')}{more}"
    if not said and name == "AssertionError":
        code = [line.text.strip() for line in lines[max(0, at - 3) : at] if "assert" in line.text]
        return f"{name}: {code[-1].removeprefix('assert ')}" if code else name
    if said.endswith(":") and following:
        return f"{name}: {said} {following[0].strip()}"
    return f"{name}: {said}" if said else name
