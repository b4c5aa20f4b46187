"""What the product's own processes have in common: where they look for modules, how they end with whoever has
started them, and at which signals."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def own_environment() -> dict[str, str]:
    """For ``python -m`` of the product's own, and what that starts: a ``deploy.py`` or ``gateway.py`` that
    lies where somebody works is not run in its place."""
    return {**os.environ, "PYTHONSAFEPATH": "1"}


def end_with_parent() -> Callable[[], object]:
    """What a new process does before all else, so that it ends when this one is killed outright. SIGINT ends
    it as well, even where a shell has set that to be ignored here (a job in the background)."""
    parent, libc = os.getpid(), ctypes.CDLL(None)

    def begin() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if sys.platform.startswith("linux"):
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # it was killed meanwhile
                os._exit(128 + signal.SIGTERM)

    return begin


def stop_signals() -> list[signal.Signals]:
    """At which a command stops what it has started. SIGHUP is of a terminal that was closed; ``nohup`` has it
    ignored."""
    found = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        found.append(signal.SIGHUP)
    return found
