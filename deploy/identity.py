"""On what a model's engines measure."""

from __future__ import annotations

from deploy.engine import shared_flags
from deploy.launches import launch_of
from deploy.machine import device_identity, engine_identity
from deploy.placement import Machine
from gateway.config import ModelConfig
from quantize.card import Card


def identity(model: ModelConfig, machine: Machine) -> dict[str, str]:
    """On what this configuration measures: engine and build, device and driver, flags and environment."""
    settings = model.engine
    context = str(settings.max_model_len) if settings.max_model_len else "the model's"
    flags = [*shared_flags(settings), "--max-model-len", context]
    found = engine_identity(settings, machine, flags)
    if not machine.gpus and "OMP_NUM_THREADS" not in settings.env:
        found["threads"] = "as placed"
    return found


def identity_of(card: Card, model: ModelConfig, machine: Machine) -> dict[str, str]:
    """The same of the engine that serves ``card``'s variant."""
    if (launch := launch_of(card)) is not None:
        return launch.identity(model.engine, device_identity(machine, on_cores=True))
    return identity(model, machine)
