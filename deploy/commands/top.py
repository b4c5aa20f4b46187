"""``tiercel top``: what the gateway does now, by role and variant and by replica, live in a terminal."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from deploy.commands.asking import GatewayClient, NoAnswerError, RefusedError, add_asking, client
from deploy.commands.status import LONGEST_S
from gateway.config import ConfigError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from deploy.commands.frames import Look

TIMEOUT_S = 5.0
Pressed = Callable[[float], bool]
"""Waits so many seconds for a q; whether it was pressed."""


def add_top(commands: Any) -> None:
    text = "requests, latencies and tokens by role and variant, and every replica, live; q quits"
    command = add_asking(commands, "top", top, text)
    command.add_argument("--every", type=float, default=1.0, help="seconds between two frames (default: 1)")
    command.add_argument("--once", action="store_true", help="print one frame and end")


def top(options: argparse.Namespace) -> None:
    from rich.console import Console

    from deploy.commands.frames import frame, look

    if not 0 < options.every <= LONGEST_S:
        text = f"--every: {options.every:g} is no time between two frames; give seconds, a day at most"
        raise ConfigError(text)
    gateway, console = client(options, TIMEOUT_S), Console(highlight=False)
    if options.once:
        before = look(gateway)
        time.sleep(options.every)
        console.print(frame(gateway.url, look(gateway), before, width=console.width))
        return
    if not sys.stdout.isatty():
        raise ConfigError(
            "top: there is no terminal to show it in; print one frame with `tiercel top --once`"
        )
    first = look(gateway)
    with contextlib.suppress(KeyboardInterrupt), _keys() as pressed:
        _show(gateway, console, first, options.every, pressed)


def _show(gateway: GatewayClient, console: Console, now: Look, every_s: float, pressed: Pressed) -> None:
    """Until q is pressed. A gateway that does not answer is asked again; the last frame stays meanwhile."""
    from rich.live import Live

    from deploy.commands.frames import frame, look

    def drawn(now: Look, before: Look | None, trouble: str = "") -> RenderableType:
        return frame(gateway.url, now, before, trouble, console.width, console.height)

    before: Look | None = None
    shown = drawn(now, None)
    with Live(shown, console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(shown, refresh=True)
            if pressed(every_s):
                return
            try:
                before, now = now, look(gateway)
                shown = drawn(now, before)
            except (NoAnswerError, RefusedError) as error:
                age = time.monotonic() - now.reading.at
                shown = drawn(now, before, f"{error.message}; this is {age:.0f} s old")


@contextlib.contextmanager
def _keys() -> Iterator[Pressed]:
    """Keys as they are pressed, without echo. Where standard input is no terminal there is Ctrl-C alone."""
    if not sys.stdin.isatty():

        def waits(seconds: float) -> bool:
            time.sleep(seconds)
            return False

        yield waits
        return
    source = sys.stdin.fileno()
    before = termios.tcgetattr(source)

    def quits(seconds: float) -> bool:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if select.select([source], [], [], left)[0]:
                pressed = os.read(source, 64)
                if not pressed or b"q" in pressed.lower():
                    return True
        return False

    try:
        tty.setcbreak(source)
        yield quits
    finally:
        termios.tcsetattr(source, termios.TCSADRAIN, before)
