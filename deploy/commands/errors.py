"""One boundary for what goes wrong: every exception leaves the command line as a sentence.

What a person can mend is said in the words of whoever raised it (``USER_ERRORS``, status 2). What libraries
and the system raise is put into words here: a full disk, memory that ran out, a file that cannot be read or
written. The traceback of those, and of what nobody foresaw (status 3), is written to a file that the sentence
names.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import math
import os
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from deploy.engine import EngineStartError
from deploy.fleet.speed import NoSpeedError
from deploy.fleet.traffic import TrafficError
from deploy.gateway_process import UpError
from deploy.placement import PlacementError
from gateway.config import ConfigError, load_config
from gateway.errors import GatewayError
from gateway.store.errors import StoreError
from quantize.card import CardError
from quantize.compact.steps import CompactError
from quantize.core.checkpoint import CheckpointError
from quantize.core.files import NoRoomError, is_full
from quantize.core.gpus import GpuError
from quantize.core.methods import MethodError
from quantize.core.model_config import first_line
from quantize.core.schemes import SchemeError
from quantize.core.shape import ShapeError
from quantize.core.targets import TargetError
from quantize.evaluate.bench import BenchError
from quantize.evaluate.client import EngineError
from quantize.evaluate.tasks import TaskError
from quantize.export.llama import LlamaError
from quantize.export.types import ExportError
from quantize.make.calibration import CalibrationError
from quantize.make.compress import QuantizeError
from quantize.numerics.formats import FormatError
from quantize.plan.planner import PlanError
from quantize.train.data import DataError
from quantize.train.loop import TrainError

USER_ERRORS = (
    ConfigError,
    CardError,
    CheckpointError,
    CalibrationError,
    QuantizeError,
    MethodError,
    PlanError,
    DataError,
    TrainError,
    SchemeError,
    CompactError,
    FormatError,
    ShapeError,
    TargetError,
    GpuError,
    BenchError,
    TaskError,
    EngineStartError,
    EngineError,
    ExportError,
    LlamaError,
    GatewayError,
    PlacementError,
    StoreError,
    UpError,
    NoSpeedError,
    TrafficError,
)
MENDABLE = 2
"""Exit status for what a person can mend."""
UNFORESEEN = 3
"""Exit status for what nobody foresaw."""
MEMORY_WORDS = ("out of memory", "can't allocate memory", "Cannot allocate memory", "not enough memory")
PLENTY = 1 << 30
"""Bytes of room with which it is hardly this disk that is full."""
FILES = "Files that were being written are gone; what was finished is kept. Run the command again then."


def explain(error: BaseException, options: argparse.Namespace) -> tuple[str, int]:
    """The sentence for an exception (without the program's name) and the exit status."""
    chosen = chief(error)
    if isinstance(chosen, USER_ERRORS):
        return str(chosen), MENDABLE
    known = sentence(chosen, _fullest(options))
    where = write_traceback(error, options)
    kept = f"the traceback is in {where}" if where else "its traceback could not be written anywhere"
    if known is not None:
        return f"{known} ({kept})", MENDABLE
    said = first_line(chosen).removeprefix(f"{type(chosen).__name__}: ")
    return f"unforeseen: {type(chosen).__name__}: {said} ({kept})", UNFORESEEN


def chief(error: BaseException) -> BaseException:
    """Of several exceptions at once, the one to tell about: what can be mended, else what has a sentence,
    else the first."""
    found = list(_leaves(error))
    found.sort(key=lambda one: (not isinstance(one, USER_ERRORS), sentence(one) is None))
    return found[0]


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from _leaves(one)
    else:
        yield error


def sentence(error: BaseException, fullest: Path | None = None) -> str | None:
    """What the system or a library means, and the fix; None for what is not known.

    By types and words alone, so that no library is imported to ask. Of a full disk the system mostly does not
    say which it is: then it is that of ``fullest``.
    """
    text = str(error)
    place = getattr(error, "filename", None)
    if is_full(error):
        named = place or fullest
        missing = f" for at least {_size(error.missing)} more" if isinstance(error, NoRoomError) else ""
        if named is None:
            return f"what is written to (standard output, a disk or its quota) is full; make room. {FILES}"
        return f"the disk of {named} is full; make room{missing}. {FILES}"
    if getattr(error, "errno", None) == errno.EFBIG:
        return f"a file would be larger than this process may write; raise the limit (`ulimit -f`). {FILES}"
    if getattr(error, "errno", None) == errno.ENAMETOOLONG:
        return f"{str(place or text)[:60]}…: the name is too long; give a path"
    if isinstance(error, MemoryError) or any(word in text for word in MEMORY_WORDS):
        return (
            f"memory ran out ({first_line(error)}); use fewer calibration tokens, method rtn, or a larger "
            "machine; `tiercel quantize check` says what is needed"
        )
    if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
        why = getattr(error, "strerror", None) or text
        return f"{place or 'a file'}: {why}; change its permissions or choose another place"
    if isinstance(error, RecursionError):
        return "a file is nested too deeply to be read; give another"
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError) and place:
        return f"{place}: {error.strerror}; check the path"
    if isinstance(error, UnicodeDecodeError):
        return f"a text is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
    if type(error).__module__.partition(".")[0] == "safetensors" or type(error).__name__ == "SafetensorError":
        return (
            f"a safetensors file cannot be read or written ({first_line(error)}); "
            "download the checkpoint again"
        )
    return None


def _size(count: int) -> str:
    """Bytes for people, rounded up."""
    return f"{math.ceil(count / 1e5) / 10:,.1f} MB" if count >= 1e5 else f"{math.ceil(count / 1e3)} kB"


def _fullest(options: argparse.Namespace) -> Path | None:
    """Of the places that a command writes to the one with the least room; None where all have plenty."""
    free: dict[Path, int] = {}
    for place in _places(options):
        there = next((one for one in (place, *place.parents) if one.exists()), place)
        with contextlib.suppress(OSError):
            free[there] = shutil.disk_usage(there).free
    least = min(free, key=free.__getitem__, default=None)
    return least if least is not None and free[least] < PLENTY else None


def write_traceback(error: BaseException, options: argparse.Namespace) -> Path | None:
    """Write the traceback to the variants directory's logs or, where that cannot be, a temporary file."""
    name = f"error-{datetime.now(UTC).strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.txt"
    text = "".join(traceback.format_exception(error))
    for directory in _places(options):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text(text, encoding="utf-8")
        except OSError:
            with contextlib.suppress(OSError):
                (directory / name).unlink(missing_ok=True)
        else:
            return directory / name
    return None


def _places(options: argparse.Namespace) -> Iterator[Path]:
    path = getattr(options, "config", None)
    if isinstance(path, Path):
        with contextlib.suppress(Exception):  # nothing may go wrong where it is said what went wrong
            yield load_config(path).variants_dir / ".logs"
    yield Path(tempfile.gettempdir())
