"""Weights of a hub, in pieces that are kept: a fetch that breaks off goes on within a file.

What has come of a file lies in ``.fetching`` beside the others, named by its digest, until it is whole. A hub
that answers a range with all of it is read from the beginning again.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from quantize.core.files import sha256_of

FETCHING = ".fetching"
AT_ONCE = 4


class FetchError(RuntimeError):
    """A file came otherwise than the hub says that it is. The text says how."""


@dataclass(frozen=True)
class Wanted:
    """One file of a repository at a commit."""

    name: str
    size: int
    sha256: str | None
    """Where the hub tells it."""
    url: str


def fetch(files: Sequence[Wanted], directory: Path) -> None:
    """Fetch what is not there whole into ``directory``, some at once, with progress bars.

    Raises FetchError, OSError, and what huggingface_hub and httpx raise; what has come is kept.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        jobs = [pool.submit(_fetch, one, directory, stop) for one in files]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def is_whole(wanted: Wanted, path: Path) -> bool:
    """Whether a file is the one that the hub has; of one without a digest that is not known."""
    return path.is_file() and path.stat().st_size == wanted.size and sha256_of(path) == wanted.sha256


def _fetch(wanted: Wanted, directory: Path, stop: threading.Event) -> None:
    from huggingface_hub import get_token
    from huggingface_hub.file_download import http_get

    target = directory / wanted.name
    if is_whole(wanted, target):
        return
    digest = wanted.sha256 or hashlib.sha256(wanted.url.encode()).hexdigest()
    partial = directory / FETCHING / digest
    partial.parent.mkdir(parents=True, exist_ok=True)
    if partial.exists() and partial.stat().st_size > wanted.size:
        partial.unlink()
    with _Stoppable(partial, stop) as file:
        http_get(
            wanted.url,
            file,
            resume_size=file.tell(),
            headers={"authorization": f"Bearer {token}"} if (token := get_token()) else {},
            expected_size=wanted.size,
            displayed_filename=wanted.name,
        )
    if wanted.sha256 is not None and (found := sha256_of(partial)) != wanted.sha256:
        partial.unlink()
        raise FetchError(f"{wanted.name} came damaged: its SHA-256 is {found}, not {wanted.sha256}")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial.replace(target)


class _Stoppable(FileIO):
    """A file that is written on at its end, until somebody gives up."""

    def __init__(self, path: Path, stop: threading.Event) -> None:
        super().__init__(path, "r+" if path.exists() else "w+")
        self._stop = stop
        self.seek(0, 2)

    def write(self, data: Any) -> int:
        if self._stop.is_set():
            raise FetchError("another file could not be fetched")
        left = memoryview(data)
        while left:  # a raw file may take less than it is given
            left = left[super().write(left) :]
        return len(data)
