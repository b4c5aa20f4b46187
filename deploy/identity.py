"""On what a model's engines measure."""

from __future__ import annotations

from deploy.engine import shared_flags
from deploy.machine import engine_identity
from deploy.placement import Machine
from gateway.config import ModelConfig


def identity(model: ModelConfig, machine: Machine) -> dict[str, str]:
    """On what this configuration measures: engine and build, device and driver, flags and environment."""
    settings = model.engine
    context = str(settings.max_model_len) if settings.max_model_len else "the model's"
    flags = [*shared_flags(settings), "--max-model-len", context]
    found = engine_identity(settings, machine, flags)
    if not machine.gpus and "OMP_NUM_THREADS" not in settings.env:
        found["threads"] = "as placed"
    return found
