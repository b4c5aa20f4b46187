"""Files of the variants directory: locks, links, read-only trees, full disks, what removing gives back."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, TextIO

READ_ONLY = stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH
LOOK_S = 0.2
"""Between two attempts of asynchronous code to get a lock."""
FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_WORDS = ("No space left on device", "os error 28", "Disk quota exceeded")

Say = Callable[[str], None]


@contextlib.contextmanager
def locked(path: Path, what: str, say: Say) -> Iterator[None]:
    """Hold the lock file ``path``, which names its process; wait, saying so, while another one holds it.

    The kernel lets go of it when the process ends, however that happens. Not to be taken twice by a process.
    """
    with _lock_file(path) as file:
        if not _is_taken(file):
            say(_waiting(file, what))
            fcntl.flock(file, fcntl.LOCK_EX)
        _sign(file)
        yield


@contextlib.asynccontextmanager
async def held(path: Path, what: str, say: Say) -> AsyncIterator[None]:
    """:func:`locked` for asynchronous code: others go on while it waits, and it can be cancelled."""
    with _lock_file(path) as file:
        if not _is_taken(file):
            say(_waiting(file, what))
            while not _is_taken(file):  # noqa: ASYNC110 (another process is waited for)
                await asyncio.sleep(LOOK_S)
        _sign(file)
        yield


def _lock_file(path: Path) -> TextIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a+", encoding="utf-8")


def _is_taken(file: IO[Any]) -> bool:
    """Whether this process has the lock now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _waiting(file: TextIO, what: str) -> str:
    file.seek(0)
    return f"waiting for process {file.read().strip() or '?'}, which is busy with {what}"


def _sign(file: TextIO) -> None:
    """Say in a lock file whose it is. On a full disk it stays unsaid."""
    with contextlib.suppress(OSError):
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class NoRoomError(OSError):
    """The disk of ``filename`` was full before a file was written; ``missing`` bytes of that file's are."""

    def __init__(self, path: Path, missing: int) -> None:
        super().__init__(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        self.missing = missing


def is_full(error: BaseException) -> bool:
    """Whether the system, or a library in its own words, says that a disk is full."""
    text = str(error)
    return getattr(error, "errno", None) in FULL or any(word in text for word in FULL_WORDS)


@contextlib.contextmanager
def writing(path: Path, size: int) -> Iterator[None]:
    """Around what writes ``size`` bytes to ``path``, and removes what there is of them where it fails: a full
    disk raises NoRoomError."""
    try:
        yield
    except NoRoomError:
        raise
    except Exception as error:
        if not is_full(error):
            raise
        raise no_room(path, size) from error


def no_room(path: Path, size: int) -> NoRoomError:
    """Of ``size`` bytes that were to be written to ``path``."""
    free = shutil.disk_usage(path.parent).free
    return NoRoomError(path, size - free if free < size else size)  # of a quota it is not known: then all


@contextlib.contextmanager
def whole_file(path: Path, size: int) -> Iterator[BinaryIO]:
    """A file of ``size`` bytes to write into, which lies at ``path`` at the end of the block, on the disk for
    good. A reader sees the old one or the new one; of several writers the last to end. Nothing is left of one
    that fails, and the next one removes what writers that were killed left. Raises NoRoomError."""
    _sweep(path)
    with writing(path, size):
        file, partial = _partial_file(path)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                partial.replace(path)  # while its lock is held
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _partial_file(path: Path) -> tuple[BinaryIO, Path]:
    """A file of this writer's own beside ``path``, locked until it is closed, or the process ends."""
    while True:
        partial = path.with_name(f".partial-{path.name}~{secrets.token_hex(4)}")
        file = partial.open("xb")
        with contextlib.suppress(OSError):  # a disk without locks: there nothing is swept
            fcntl.flock(file, fcntl.LOCK_EX)
        if partial.exists():
            return file, partial
        file.close()  # swept between the two


def _sweep(path: Path) -> None:
    """Remove what writers of ``path`` left that live no more: their files are locked by nobody."""
    own = re.compile(rf"\.partial-{re.escape(path.name)}~[0-9a-f]{{8}}")
    with contextlib.suppress(OSError):  # no directory yet, or somebody else's
        for left in [path.with_name(name) for name in os.listdir(path.parent) if own.fullmatch(name)]:
            with contextlib.suppress(OSError), left.open("r+b") as file:
                if _is_taken(file):
                    left.unlink()


@contextlib.contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which lies at ``path`` at the end of the block, on the disk for good; nothing is
    left of one that fails, and the next one removes what a process that was killed left. Nothing may be at
    ``path``. Raises BlockingIOError while another process fills one there."""
    partial = path.with_name(f".partial-{path.name}")
    partial.mkdir(parents=True, exist_ok=True)
    place = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it when the process ends
        try:
            for left in partial.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield partial
            for file in partial.rglob("*"):
                _sync(file)
            partial.rename(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(place)


def _sync(path: Path) -> None:
    """Have what was written to a file or directory on the disk for good."""
    place = os.open(path, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)


def write_whole(path: Path, text: str) -> None:
    """Write a file as a whole (:func:`whole_file`)."""
    raw = text.encode()
    with whole_file(path, len(raw)) as file:
        file.write(raw)


def append_whole(path: Path, raw: bytes, end: int) -> None:
    """Write ``raw`` after the first ``end`` bytes of a file, on the disk for good; where it does not fit
    nothing of it stays. Raises NoRoomError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path, len(raw)), path.open("ab") as file:
        file.truncate(end)
        try:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            with contextlib.suppress(OSError):
                file.close()  # its buffer is tried once more
            os.truncate(path, end)
            raise


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for the same bytes where the disk allows it, else a copy. Raises NoRoomError."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        with writing(target, source.stat().st_size):
            try:
                shutil.copy2(source, target)
            except BaseException:
                target.unlink(missing_ok=True)
                raise


def share(directory: Path, files: Mapping[str, str], known: Mapping[str, Path]) -> None:
    """Replace files that are on disk already by links to them. ``files`` and ``known`` go by SHA-256:
    name in ``directory`` to digest, and digest to a whole file elsewhere."""
    for name, digest in files.items():
        source, target = known.get(digest), directory / name
        if source is None or source.samefile(target) or sha256_of(source) != digest:
            continue
        spare = target.with_name(target.name + ".partial")
        with contextlib.suppress(OSError):  # another disk, or one that has no links: keep both
            os.link(source, spare)
            spare.replace(target)


def make_read_only(directory: Path) -> None:
    """Of all files that have no other name: those belong to somebody else as well."""
    for path in directory.rglob("*"):
        if path.is_file() and path.stat().st_nlink == 1:
            path.chmod(READ_ONLY)


def point(link: Path, name: str) -> None:
    """Let the symbolic link point to its neighbour ``name``; a reader sees the old one or the new one."""
    spare = link.with_name(f".partial-{link.name}")
    spare.unlink(missing_ok=True)
    spare.symlink_to(name)
    spare.replace(link)


def held_bytes(directory: Path) -> int:
    """Bytes that the disk gets back when ``directory`` goes: files with names elsewhere stay."""
    inside: dict[tuple[int, int], tuple[os.stat_result, int]] = {}
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            status = path.stat()
            key = (status.st_dev, status.st_ino)
            inside[key] = (status, inside.get(key, (status, 0))[1] + 1)
    return sum(status.st_size for status, names in inside.values() if names == status.st_nlink)
