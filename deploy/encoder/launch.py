"""How onnxruntime's engine process is started for a classifier's variant, and on what it measures."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

from deploy.placement import Placed
from gateway.config import Engine as EngineSettings
from quantize.card import ONNX, Card


def command(card: Card, directory: Path, settings: EngineSettings, port: int, placed: Placed) -> list[str]:
    """The command line. ``engine.extra_args`` are vLLM's and not given on."""
    given = settings.env.get("OMP_NUM_THREADS") or placed.env.get("OMP_NUM_THREADS") or ""
    threads = int(given) if given.isdigit() else len(placed.cores) or os.cpu_count() or 1
    return [
        *(sys.executable, "-m", "deploy.encoder.serve"),
        *("--directory", str(directory)),
        *("--name", card.model),
        *("--host", settings.host),
        *("--port", str(port)),
        *("--threads", str(threads)),
        *("--stop-timeout", str(math.ceil(settings.stop_timeout_s))),
    ]


def kv_bytes(card: Card, settings: EngineSettings) -> int:
    """It has no KV cache."""
    return 0


def missing() -> str:
    """What is not there that the engine needs, and the fix; an empty string where nothing is missing."""
    there = importlib.util.find_spec("onnxruntime") is not None
    return "" if there else "onnxruntime is not installed; install it: pip install 'tiercel[edge]'"


def identity(settings: EngineSettings, device: Mapping[str, str]) -> dict[str, str]:
    """On what its variants are measured, in the words of a card."""
    build = "not installed" if missing() else importlib.metadata.version("onnxruntime")
    threads = settings.env.get("OMP_NUM_THREADS", "as placed")
    return {ONNX: build, "machine": platform.machine(), **device, "threads": threads}
