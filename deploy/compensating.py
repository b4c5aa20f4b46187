"""``tiercel train compensate``: an adapter that makes up for what quantization lost, on the variant that it
is made for.

The variant is one that is there, a recipe's (which is made first), or a scheme's. What no engine serves here
is simulated and reported, and becomes no variant.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deploy.models import checkpoint_of, registry_of
from deploy.qat_beginning import Beginning, Wanted, beginning
from deploy.unlabelled import calibration_for
from gateway.config import ModelConfig
from quantize.card import ADAPTER, Card
from quantize.check import refuse_pattern, refuse_unfit
from quantize.compact.compare import Compared, compare
from quantize.compact.compensate import Compensation, compensate, refuse_uncompensated
from quantize.compact.simulated import write_simulated
from quantize.compact.steps import CompactError
from quantize.core.checkpoint import Checkpoint, open_checkpoint
from quantize.core.engine_figures import AdapterCarried
from quantize.core.files import link_or_copy
from quantize.core.modules import Modules, read_modules
from quantize.core.targets import detect, target
from quantize.core.tensors import refuse_not_finite
from quantize.evaluate.bench import Span
from quantize.plan.session import split
from quantize.register.carried import ADAPTER_FILES, CARRIED, refuse_carrier
from quantize.registry import Registry
from quantize.train.adapters import adapter_sha256

Say = Callable[[str], None]
ADAPTERS = ".compensation"
"""Directory of adapters beside the variants, each in one of its variant's name; it can be removed at any
time."""


@dataclass(frozen=True)
class Compensated:
    """What an adapter made up for: of outputs of matrices, and of the model in torch without it and with
    it. ``card`` is the variant's that carries it, None where no engine serves it here."""

    name: str
    found: Compensation
    without: Compared
    with_it: Compared
    adapter: Path
    card: Card | None = None

    def as_words(self) -> dict[str, Any]:
        shown = {
            "before": self.without.model_dump(),
            "after": self.with_it.model_dump(),
            "adapter": str(self.adapter),
        }
        return {"name": self.name, "simulated": shown, **self.found.model_dump(mode="json")}

    def text(self) -> str:
        found, before, after = self.found, self.without, self.with_it
        return (
            f"{self.name}: an adapter of rank {found.rank}, {found.bytes:,} bytes beside "
            f"{found.quantized_bytes:,}; mean error of outputs {100 * found.before:.1f} % -> "
            f"{100 * found.after:.1f} %; KL {before.kl:.4g} -> {after.kl:.4g}, same first choice "
            f"{100 * before.agreement:.1f} % -> {100 * after.agreement:.1f} %, on {before.tokens:,} held-out "
            "tokens of calibration's, simulated"
        )


def make_compensated(model: ModelConfig, wanted: Wanted, rank: int, say: Say) -> Compensated:
    """Make the adapter, and the variant that carries it. Raises CompactError, TrainError, CardError,
    MethodError and QuantizeError before work."""
    checkpoint = checkpoint_of(model, say)
    refuse_pattern(model.variants_dir)
    refuse_unfit(checkpoint)
    refuse_not_finite(checkpoint.path)
    refuse_uncompensated(read_modules(checkpoint), rank)
    registry = registry_of(model, say)
    if wanted.name == model.reference:
        raise CompactError(f"--name {wanted.name}: is the reference's name; give another one")
    known = registry.card(wanted.begin) if wanted.begin in registry.variants() else None
    if known is not None:
        refuse_carrier(known)
    reference = registry.add_reference(checkpoint)
    calibration = calibration_for(model, checkpoint, reference.version)
    calibrating, spans = split(calibration)
    found = beginning(model, wanted, checkpoint, target(wanted.target or detect()), calibration, say)
    modules = read_modules(checkpoint).holding(found.plan.groups)
    if not found.original:
        raise CompactError(
            f"{wanted.begin} stands under scales of {found.plan.method} that are not kept, since it was made "
            "from other calibration or they were removed, so that its error is not known; make it again with "
            "`tiercel quantize make`, or by imatrix+gptq or rtn"
        )
    adapter = model.variants_dir / ADAPTERS / found.name
    done = compensate(
        checkpoint,
        modules,
        found.plan,
        found.directory,
        found.scales,
        calibrating.sequences,
        rank,
        adapter,
    )
    without, with_it = _compared(checkpoint, modules, found, adapter, spans)
    made = Compensated(found.name, done, without, with_it, adapter)
    say(made.text())
    if found.problems:
        say(f"simulated: {'; '.join(found.problems[:2])}; it is reported, and becomes no variant")
        return made
    if wanted.begin not in registry.variants():
        say(
            f"{wanted.begin} is a scheme, so no variant carries the adapter; `tiercel quantize make --scheme "
            f"{wanted.begin}` makes one, which is then named in its place"
        )
        return made
    return replace(made, card=_carried(registry, checkpoint, made, registry.card(wanted.begin), found))


def _carried(
    registry: Registry, checkpoint: Checkpoint, made: Compensated, carrier: Card, found: Beginning
) -> Card:
    """The carrier with the adapter on it, one more variant of the same model. The adapter stands in the
    carrier's basis already, and is of no model that could be merged."""
    carried = AdapterCarried(
        rank=made.found.rank,
        sha256=adapter_sha256(made.adapter),
        bytes=made.found.bytes,
        carrier=f"{carrier.id}@{carrier.version}",
    )

    def fill(partial: Path) -> dict[str, Any]:
        (partial / ADAPTER).mkdir()
        for name in carrier.files:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(found.directory / name, partial / name)
        for name in ADAPTER_FILES:
            link_or_copy(made.adapter / name, partial / ADAPTER / name)
        return carrier.model_dump(include=set(CARRIED)) | {"adapter": carried}

    inputs = {"carrier": carrier.files, "compensated": carried.sha256}
    return registry.take_in(found.name, inputs, fill, checkpoint)


def _compared(
    checkpoint: Checkpoint, modules: Modules, found: Beginning, adapter: Path, spans: list[Span]
) -> tuple[Compared, Compared]:
    """The model in torch without the adapter and with it, beside the unquantized one."""
    out = adapter.with_name(f".simulated-{adapter.name}")
    made = []
    try:
        for given in (None, adapter):
            write_simulated(checkpoint, modules, found.plan, found.directory, out, given)
            made.append(compare(checkpoint, open_checkpoint(out), spans))
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return made[0], made[1]
