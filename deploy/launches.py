"""Engines that are started otherwise than vLLM: by the target on a variant's card."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.encoder import launch as encoder
from deploy.llama import launch as llama
from deploy.placement import GIB, Placed
from gateway.config import Engine as EngineSettings
from quantize.card import LLAMA, ONNX, Card

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Launch:
    """How the engine of one target is started. They run in the product's own environment, on cores."""

    command: Callable[[Card, Path, EngineSettings, int, Placed], list[str]]
    identity: Callable[[EngineSettings, Mapping[str, str]], dict[str, str]]
    """On what its variants are measured, with the device's own words."""
    missing: Callable[[], str]
    """What is not installed, and the fix; an empty string where nothing is missing."""
    kv_bytes: Callable[[Card, EngineSettings], int]
    """Bytes of its KV cache."""
    overhead: int = GIB // 2
    """Bytes beside weights and KV cache."""


LAUNCHES: Mapping[str, Launch] = {
    LLAMA: Launch(llama.command, llama.identity, llama.missing, llama.kv_bytes),
    ONNX: Launch(encoder.command, encoder.identity, encoder.missing, encoder.kv_bytes),
}


def launch_of(card: Card) -> Launch | None:
    """None where vLLM serves the variant."""
    return LAUNCHES.get(card.target or "")


def environment(settings: EngineSettings, placed: Placed, site: Path) -> dict[str, str]:
    """``site`` holds the ``sitecustomize`` with which an engine ends with its parent."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    added = {
        "PYTHONPATH": f"{site}{os.pathsep}{ROOT}",
        "PYTHONSAFEPATH": "1",  # and not where somebody works
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
    }
    return {**kept, **added, **settings.env, **placed.env}
