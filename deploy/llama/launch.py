"""How llama.cpp's engine process is started for a variant, and on what it measures."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

from deploy.placement import Placed
from gateway.config import Engine as EngineSettings
from quantize.card import LLAMA, Card
from quantize.export.llama import is_installed
from quantize.export.variant import MODEL_FILE

MOST_SLOTS = 8
"""Answers at a time; more share two cores to no gain."""


def slots(settings: EngineSettings) -> int:
    return min(MOST_SLOTS, settings.max_num_seqs)


def cache_tokens(card: Card, settings: EngineSettings) -> int:
    """Tokens of the KV cache: llama.cpp takes the memory of all of it at once, so no more than its answers
    can fill."""
    per_token = max(1, card.kv_bytes_per_token)
    context = settings.context(card.max_model_len, per_token)
    return min(settings.kv_bytes(card.max_model_len, per_token) // per_token, context * slots(settings))


def kv_bytes(card: Card, settings: EngineSettings) -> int:
    return cache_tokens(card, settings) * card.kv_bytes_per_token


def command(card: Card, directory: Path, settings: EngineSettings, port: int, placed: Placed) -> list[str]:
    """The command line. ``engine.extra_args`` are vLLM's and not given on."""
    return [
        *(sys.executable, "-m", "deploy.llama.serve"),
        *("--model", str(directory / MODEL_FILE)),
        *("--name", card.model),
        *("--host", settings.host),
        *("--port", str(port)),
        *("--context", str(settings.context(card.max_model_len, card.kv_bytes_per_token))),
        *("--cache-tokens", str(cache_tokens(card, settings))),
        *("--slots", str(slots(settings))),
        *("--threads", str(threads(settings, placed))),
        *("--stop-timeout", str(math.ceil(settings.stop_timeout_s))),
    ]


def threads(settings: EngineSettings, placed: Placed) -> int:
    """Threads that decode: the user's own number, those of its place, or all."""
    given = settings.env.get("OMP_NUM_THREADS") or placed.env.get("OMP_NUM_THREADS") or ""
    return int(given) if given.isdigit() and int(given) else len(placed.cores) or os.cpu_count() or 1


def missing() -> str:
    """What is not there that the engine needs, and the fix; an empty string where nothing is missing."""
    return "" if is_installed() else "llama.cpp is not installed; install it: pip install 'tiercel[edge]'"


def identity(settings: EngineSettings, device: Mapping[str, str]) -> dict[str, str]:
    """On what its variants are measured, in the words of a card."""
    build = importlib.metadata.version("llama-cpp-py-sync") if is_installed() else "not installed"
    return {
        LLAMA: build,
        "machine": platform.machine(),
        **device,
        "flags": f"--slots {slots(settings)}",
        "context": str(settings.max_model_len or "the model's"),
        "threads": settings.env.get("OMP_NUM_THREADS", "as placed"),
    }
