"""Why an engine did not start, and whose fault that is.

An engine that ends while it loads a variant says why in its log, often far above its last line. What it
says decides what becomes of the variant: only :class:`EngineLoadError` is about the variant's files.

    EngineStartError             it did not become ready
      ├── EngineRoomError        it wanted memory, a port, a device or time: try again with more of it
      ├── EngineSetupError       the engine's environment or its settings are wrong, for every variant
      └── EngineLoadError        it cannot load these files, or serves them otherwise than the card says
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from deploy.engine_log import reason

Cause = Literal["files", "memory", "port", "device", "killed", "settings", "environment"]

_ERROR_NAME = re.compile(r"\b[A-Z]\w*(?:Error|Exception): .+")
_HEARSAY = re.compile(
    r"Engine core initialization failed|EngineDeadError|died unexpectedly|WorkerProc initialization failed"
    r"|Failed to start \d* ?worker|cancelled"
)
"""Errors of processes that only noticed that another one had failed."""
_CAUSES: tuple[tuple[Cause, re.Pattern[str]], ...] = (
    (
        "memory",
        re.compile(
            r"No available memory for the cache blocks|[Mm]emory on (?:device|node) .*less than"
            r"|out of memory|OutOfMemoryError|which is larger than the available KV cache"
            r"|Cannot allocate memory|can't allocate memory|std::bad_alloc|\bMemoryError\b"
            r"|No space left on device|CUBLAS_STATUS_(?:ALLOC_FAILED|NOT_INITIALIZED)"
            r"|Error in memory profiling"
        ),
    ),
    ("port", re.compile(r"[Aa]ddress already in use|EADDRINUSE|\[Errno 98\]")),
    (
        "device",
        re.compile(
            r"No CUDA GPUs are available|CUDA driver version is insufficient|invalid device ordinal"
            r"|device\(s\) is/are busy or unavailable|Failed to infer device type"
            # A kernel to which a variant's shapes are wrong fails as those do that are left out.
            r"|CUDA error: (?!an illegal memory|device-side assert|invalid (?:argument|config)|CUBLAS_)"
            r"|CUDA unknown error|cudaGetDeviceCount|NCCL error|NVMLError|NVML_|GPU is lost|ECC error"
        ),
    ),
    ("killed", re.compile(r"Failed core proc\(s\): \{.*-(?:9|15|4|7|11)\b|Illegal instruction|Killed\b")),
    (
        "settings",
        re.compile(
            r"error: (?:unrecognized arguments|argument |ambiguous option)|User-specified max_model_len"
            r"|World size .* is larger than|must be divisible by tensor parallel size"
        ),
    ),
    ("environment", re.compile(r"\b(?:ModuleNotFoundError|ImportError|PackageNotFoundError): ")),
)

_FIXES: dict[Cause, str] = {
    "memory": "free memory on the machine or the device, lower engine.kv_cache_gib or engine.max_model_len, "
    "or serve fewer variants here",
    "port": "stop what listens on its port, or set engine.base_port to another range",
    "device": "see `tiercel doctor` and `nvidia-smi`; engine.env may name another device "
    "(CUDA_VISIBLE_DEVICES)",
    "killed": "another process ended it, as the kernel does when memory is short; see `dmesg`",
    "settings": "correct engine.extra_args or engine.max_model_len",
    "environment": "run `make setup`, or set engine.python to an environment that has vLLM",
}


class EngineStartError(RuntimeError):
    """An engine did not become ready. The text shows its last words."""


class EngineRoomError(EngineStartError):
    """It wanted memory, a port, a device or time; nothing is known of the variant."""


class EngineSetupError(EngineStartError):
    """Its environment or its settings are wrong; nothing is known of the variant."""


class EngineLoadError(EngineStartError):
    """The engine ended by itself while it loaded a variant. ``words`` is the line that says why."""

    def __init__(self, text: str, words: str) -> None:
        super().__init__(text)
        self.words = words


@dataclass(frozen=True)
class Diagnosis:
    """What an engine's log says of its end: the cause, the line that tells, and what can be done."""

    cause: Cause
    words: str

    @property
    def fix(self) -> str:
        return _FIXES.get(self.cause, "")

    def error(self, text: str) -> EngineStartError:
        """The error that stands for it, with ``text`` for a person."""
        if self.cause == "files":
            return EngineLoadError(text, self.words)
        kind = EngineSetupError if self.cause in ("settings", "environment") else EngineRoomError
        return kind(f"{text}\n{self.words}: {self.fix}" if self.words not in text else f"{text}\n{self.fix}")


def _bare(line: str) -> str:
    """A line of a log without the process and the logger in front, and without pydantic's tail."""
    line = re.sub(r"^\(\w+[^)]*\)\s*", "", line)
    line = re.sub(r"^(?:ERROR|INFO|WARNING) \d\d-\d\d \d\d:\d\d:\d\d \S+\s*", "", line)
    return line.partition(" [type=")[0].strip()


def diagnose(log: str, status: int) -> Diagnosis:
    """Why an engine ended with ``status`` while it started (negative: by a signal), from its log."""
    words = reason(log)
    if status < 0:
        return Diagnosis("killed", words)
    for cause, pattern in _CAUSES:
        if pattern.search(words):
            return Diagnosis(cause, words)
    for cause, pattern in _CAUSES:  # what another process said; an error of its own goes before it
        if (found := pattern.search(log)) and (_HEARSAY.search(words) or not _ERROR_NAME.search(words)):
            start, end = log.rfind("\n", 0, found.start()) + 1, log.find("\n", found.end())
            return Diagnosis(cause, _bare(log[start : end if end >= 0 else None]))
    return Diagnosis("files", words)
