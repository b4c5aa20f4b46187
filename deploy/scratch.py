"""Folders in the system's temporary one that last as long as the process that made them.

A folder is held by a lock of the kernel's, which ends with its holder whatever happens to that, also across
containers that share the directory. What a killed process has left is removed when the next folder is made.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path


class Scratch:
    """A new folder whose name begins with ``prefix``, such as ``tiercel-engine-``."""

    def __init__(self, prefix: str) -> None:
        remove_left(prefix)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=prefix))
            try:
                self._held = _held(self.path, wait=True)
            except FileNotFoundError:
                continue  # another process took it for one that was left
            if os.fstat(self._held).st_nlink:
                return
            os.close(self._held)

    def close(self) -> None:
        """Remove the folder and what is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._held)


def remove_left(prefix: str) -> None:
    """Remove this user's folders of the prefix that nobody holds any more."""
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
                continue
            held = _held(folder, wait=False)
            try:
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(held)


def _held(folder: Path, wait: bool) -> int:
    """The folder, opened and locked. Raises OSError; BlockingIOError where another process holds it."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(opened)
        raise
    return opened
