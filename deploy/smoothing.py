"""The scales that a variant was smoothed by, as far as they are kept beside it."""

from __future__ import annotations

from gateway.config import ModelConfig
from quantize.card import Card
from quantize.core.checkpoint import Checkpoint
from quantize.core.modules import read_modules
from quantize.core.targets import Target
from quantize.make.calibration import CalibrationSet
from quantize.make.smooth import ScaleStore
from quantize.make.variant import part_store
from quantize.plan.session import PlanningSession


def smoothing(
    model: ModelConfig, checkpoint: Checkpoint, where: Target, calibration: CalibrationSet, card: Card
) -> ScaleStore | None:
    """The scales of a variant that was made of ``checkpoint`` by ``smooth``; None where they are gone."""
    modules = read_modules(checkpoint).holding(card.schemes)
    known, mine = card.calibration, calibration.description
    if known is None or known.sha256 != mine.sha256:
        return None
    if known.samples == mine.samples:
        store = part_store(model.variants_dir, checkpoint, modules, calibration).smoothing
    else:  # of a plan: some conversations were kept to choose it on
        store = PlanningSession(
            model.variants_dir / ".planning", checkpoint, calibration, where
        ).parts.smoothing
    return None if store.missing(modules.layers) else store
