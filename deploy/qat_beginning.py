"""What quantization-aware training begins with: a variant that is there, one that a recipe makes, or what a
scheme makes of the model, put together for the purpose.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deploy.making import make_variants
from deploy.models import registry_of
from deploy.smoothing import smoothing
from gateway.config import ModelConfig
from quantize.card import Card
from quantize.core.checkpoint import Checkpoint, base_sha256
from quantize.core.methods import SMOOTH, as_trained, parse_method
from quantize.core.modules import HEAD, read_modules
from quantize.core.plan import Plan
from quantize.core.recipes import RECIPES, usual_method
from quantize.core.schemes import SchemeError, kv_scheme, scheme
from quantize.core.targets import Target
from quantize.make.calibration import CalibrationSet
from quantize.make.smooth import ScaleStore
from quantize.make.variant import part_store
from quantize.train.loop import TrainError
from quantize.train.qat import refuse_untrainable

Say = Callable[[str], None]
TRAINING = ".training"
"""Directory of training runs beside the variants; it can be removed at any time."""


@dataclass(frozen=True)
class Wanted:
    """What is to be trained. ``begin`` is a variant, a recipe or a scheme; ``attention`` and ``mlp`` are
    schemes of those groups instead. ``data`` are files of conversations beside the model's calibration."""

    begin: str
    name: str | None = None
    method: str | None = None
    attention: str | None = None
    mlp: str | None = None
    kv: str = "auto"
    target: str | None = None
    data: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Beginning:
    """A quantized checkpoint that is begun with, and what a variant that is trained from it is called."""

    name: str
    plan: Plan
    directory: Path
    said: str
    scales: ScaleStore | None
    """Smoothing scales that it stands under."""
    original: bool
    """Whether the unquantized weights are known in its basis."""
    problems: tuple[str, ...] = ()
    """Why no engine serves it here; with any it is simulated."""


def beginning(
    model: ModelConfig,
    wanted: Wanted,
    checkpoint: Checkpoint,
    where: Target,
    calibration: CalibrationSet,
    say: Say,
) -> Beginning:
    """What ``wanted`` names, made if it is not there. Raises TrainError, CardError and MethodError."""
    registry = registry_of(model, say)
    of_scheme = (wanted.method, wanted.attention, wanted.mlp) != (None, None, None) or wanted.kv != "auto"
    is_variant, is_recipe = wanted.begin in registry.variants(), wanted.begin in RECIPES
    if not is_variant and not is_recipe:
        try:
            scheme(wanted.begin)
        except SchemeError as error:
            known = ", ".join(dict.fromkeys((*registry.variants(), *RECIPES)))
            raise TrainError(
                f"{wanted.begin!r} is no variant and no recipe ({known}), and no scheme: {error}"
            ) from None
        return _of_scheme(model, wanted, checkpoint, where, calibration)
    if of_scheme:
        raise TrainError(
            f"{wanted.begin} is a {'variant' if is_variant else 'recipe'} with a plan of its own; --method, "
            "--attention, --mlp and --kv go with a scheme, such as w4a16-g32-asym"
        )
    if not is_variant:
        make_variants(model, [wanted.begin], say, where.name)
    return _of_variant(model, wanted, checkpoint, where, calibration, registry.card(wanted.begin))


def _of_variant(
    model: ModelConfig,
    wanted: Wanted,
    checkpoint: Checkpoint,
    where: Target,
    calibration: CalibrationSet,
    card: Card,
) -> Beginning:
    registry = registry_of(model)
    if card.variant == model.reference:
        raise TrainError(f"{card.variant} is the reference, which is not quantized; name a quantized variant")
    if card.origin != "made" or not card.schemes:
        raise TrainError(
            f"{card.variant} was made elsewhere, and its format is not written here; name a variant that "
            "`tiercel quantize` made"
        )
    if card.base_sha256 != base_sha256(checkpoint):
        raise TrainError(
            f"{card.variant} was made from other weights, or another tokenizer or chat template, than "
            f"{checkpoint.path} has now; make it again"
        )
    as_trained(card.method)
    plan = Plan(groups=card.schemes, kv=card.kv, method=card.method, methods=card.methods)
    modules = read_modules(checkpoint).holding(plan.groups)
    methods = {plan.method_of(group.name) for group in modules if scheme(plan.groups[group.name]).weights}
    transforms = {parse_method(method).transforms for method in methods}
    scales = None
    if transforms == {(SMOOTH,)}:
        scales = smoothing(model, checkpoint, where, calibration, card)
    return Beginning(
        wanted.name or f"{card.variant}-qat",
        plan,
        registry.path(card.variant, card.version),
        f"{card.variant}@{card.version}",
        scales,
        transforms == {()} or scales is not None,
    )


def _of_scheme(
    model: ModelConfig, wanted: Wanted, checkpoint: Checkpoint, where: Target, calibration: CalibrationSet
) -> Beginning:
    kv_scheme(wanted.kv)
    modules = read_modules(checkpoint)
    groups = {group.name: _scheme_of(group.kind, wanted) for group in modules}
    method = wanted.method or usual_method(wanted.begin)
    as_trained(method)
    methods = {} if wanted.method else {name: usual_method(one) for name, one in groups.items()}
    plan = Plan(
        groups=groups,
        kv=wanted.kv,
        method=method,
        methods={name: one for name, one in methods.items() if one != method},
    )
    refuse_untrainable(plan, modules)
    transforms = {parse_method(plan.method_of(name)).transforms for name in groups}
    problems = tuple(str(one) for one in where.check_plan(plan, modules, checkpoint.head_dim))
    parts = part_store(model.variants_dir, checkpoint, modules, calibration)
    decides = (base_sha256(checkpoint), plan.model_dump_json(), calibration.description.sha256)
    digest = hashlib.sha256(repr(decides).encode()).hexdigest()[:12]
    directory = model.variants_dir / TRAINING / f"begun-{digest}"
    if not (directory / "config.json").is_file():
        partial = directory.with_name(f".partial-{directory.name}")
        shutil.rmtree(partial, ignore_errors=True)
        parts.assemble(plan, partial)
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
    usual = "-".join(dict.fromkeys(name for name in (wanted.begin, wanted.attention, wanted.mlp) if name))
    return Beginning(
        wanted.name or f"{usual}-qat",
        plan,
        directory,
        f"{plan.method} {digest}",
        parts.smoothing if transforms == {(SMOOTH,)} else None,
        transforms in ({()}, {(SMOOTH,)}),
        problems,
    )


def _scheme_of(kind: str, wanted: Wanted) -> str:
    """A group's scheme by what it is of."""
    if kind.startswith("self_attn.") and wanted.attention:
        return wanted.attention
    if not kind.startswith("self_attn.") and kind != HEAD and wanted.mlp:
        return wanted.mlp
    return wanted.begin
