"""The checkpoint of a plan: of parts made block by block where that can be, else by llm-compressor."""

from __future__ import annotations

from pathlib import Path

from quantize.core.checkpoint import Checkpoint
from quantize.core.methods import parse_method
from quantize.core.modules import Modules
from quantize.core.plan import Plan
from quantize.make.calibration import CalibrationSet
from quantize.make.compress import compress_whole
from quantize.make.parts import PartStore
from quantize.make.streaming import QuantizeError, refuse_choice, streams

PARTS = ".parts"
"""Directory of parts beside the variants; it can be removed at any time."""


def part_store(
    directory: Path, checkpoint: Checkpoint, modules: Modules, calibration: CalibrationSet | None
) -> PartStore:
    """The parts beside the variants in ``directory``."""
    return PartStore(directory / PARTS, checkpoint, modules, calibration)


def compress(
    checkpoint: Checkpoint,
    modules: Modules,
    plan: Plan,
    calibration: CalibrationSet | None,
    out: Path,
    log: Path,
    label: str,
) -> None:
    """Quantize ``checkpoint`` by ``plan`` into ``out``.

    What :func:`quantize.make.streaming.streams` is made block by block, from parts that are kept beside
    ``out``; the rest is llm-compressor's, whose output goes to ``log``. Raises QuantizeError when the weights
    are damaged, or when a module was not quantized as intended.
    """
    for group, name in plan.groups.items():
        refuse_choice((name, plan.method_of(group)))
    method = parse_method(plan.method)
    if method.needs_data(plan) and calibration is None:
        raise QuantizeError(f"method {method.name} needs calibration data; set calibration in the YAML")
    if all(streams((name, plan.method_of(group))) for group, name in plan.groups.items()):
        part_store(out.parent, checkpoint, modules, calibration).assemble(plan, out)
        return
    compress_whole(checkpoint, modules, plan, calibration, out, log, label)
