"""What an estimate says, and what all estimates count."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from quantize.core.checkpoint import Checkpoint
from quantize.core.legality import is_experts
from quantize.core.modules import Modules


class Cost(BaseModel):
    """An estimate; see :mod:`quantize.cost` for the model behind it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    what: str
    tokens: int
    """Of calibration, that are used."""
    memory_bytes: int
    engine_bytes: int = 0
    """Of these an engine's, which may use several devices; what makes parts uses one."""
    mapped_bytes: int
    """Pages of files beside ``memory_bytes``, which the system may drop."""
    disk_bytes: int
    seconds: float
    """With all cores idle."""
    seconds_range: tuple[float, float]

    @property
    def making_bytes(self) -> int:
        """Bytes that are taken where parts are made."""
        return self.memory_bytes - self.engine_bytes


def active_weights(checkpoint: Checkpoint, modules: Modules) -> float:
    """Weights of linear modules that a token passes through."""
    return sum(group.weights * share_of_experts(checkpoint, is_experts(group)) for group in modules)


def share_of_experts(checkpoint: Checkpoint, experts: bool) -> float:
    """Share of a group of linear modules that a token passes through: 1 but for experts."""
    config = checkpoint.text_config
    of = config.get("num_experts") or config.get("num_local_experts")
    return float(config["num_experts_per_tok"]) / float(of) if experts and of else 1.0
