"""``tiercel train qat``: a quantized variant's weights, step sizes and norms trained to say what the
reference says.

What is begun with is a variant that is there, a recipe's (which is made first), or a scheme's. A plan that no
engine serves here is trained all the same, and reported: nothing of it becomes a variant.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.making import all_items
from deploy.models import checkpoint_of, registry_of
from deploy.qat_beginning import TRAINING, Beginning, Wanted, beginning
from deploy.unlabelled import calibration_for
from gateway.config import ModelConfig
from quantize.card import CARD_NAME, Card, Training
from quantize.check import refuse_pattern, refuse_unfit
from quantize.core.checkpoint import Checkpoint, base_sha256
from quantize.core.files import write_whole
from quantize.core.methods import as_trained
from quantize.core.modules import Linear, Modules, read_modules
from quantize.core.targets import detect, target
from quantize.core.tensors import refuse_not_finite
from quantize.evaluate.tasks import by_first_role
from quantize.make.calibration import CalibrationSet, calibration_length
from quantize.make.parts import NUMERICS
from quantize.make.smooth import folded
from quantize.plan.session import split
from quantize.train import data as training_data
from quantize.train.qat import (
    QatSettings,
    Report,
    Text,
    Work,
    refuse_no_room,
    refuse_untrainable,
    train_variant,
)

if TYPE_CHECKING:
    from torch import Tensor

    from quantize.train.qat_student import Student

Say = Callable[[str], None]
REPORT = "report.json"
ITEMS = 80
"""Of each role, that a simulated variant answers in torch."""


def train_qat(
    model: ModelConfig, wanted: Wanted, settings: QatSettings, say: Say
) -> tuple[Card | None, Report]:
    """Train, and take in the variant; None in its place where no engine here serves it. Raises TrainError,
    DivergedError, DataError, CardError, MethodError and QuantizeError, all but the second before work."""
    checkpoint = checkpoint_of(model, say)
    refuse_pattern(model.variants_dir)
    refuse_unfit(checkpoint)
    refuse_not_finite(checkpoint.path)
    where = target(wanted.target or detect())
    registry = registry_of(model, say)
    reference = registry.add_reference(checkpoint)
    calibration = calibration_for(model, checkpoint, reference.version)
    text, choosing, described = _text(model, checkpoint, calibration, wanted.data)
    found = beginning(model, wanted, checkpoint, where, calibration, say)
    described = described.model_copy(update={"base": found.said, "settings": asdict(settings)})
    work = _work(model, checkpoint, found, text, choosing, described)
    needed = refuse_no_room(work, settings)
    say(
        f"{found.name}: {found.plan.describe()} from {found.said}, {work.weights / 1e6:.1f} M weights on "
        f"{len(text.sequences)} conversations ({text.tokens} tokens), {needed / 1e9:.1f} GB of memory"
    )
    if found.problems:
        say(f"simulated: {'; '.join(found.problems[:2])}; it is reported, and becomes no variant")
        report = read_report(work.directory) or _trained(work, settings, say)[1]
        _forget(work)
        return None, report

    def make(out: Path) -> Training:
        student, report = _trained(work, settings, say)
        return _export(student, work, out, described, report, say)

    methods = {name: as_trained(method) for name, method in found.plan.methods.items()}
    plan = found.plan.model_copy(update={"method": as_trained(found.plan.method), "methods": methods})
    card = registry.add(
        checkpoint,
        found.name,
        plan,
        calibration,
        make=make,
        target=where.name,
        decides=decides(described),
    )
    _forget(work)
    training = card.training
    assert training is not None
    known = Report(training.kl_before or 0.0, training.kl_after or 0.0, [], {})
    return card, read_report(work.directory) or known


def decides(described: Training) -> dict[str, object]:
    """What a trained variant's numbers follow from, beside its plan."""
    return {
        "base": described.base,
        "settings": described.settings,
        "text": described.sha256,
        "numerics": NUMERICS,
    }


def _work(
    model: ModelConfig,
    checkpoint: Checkpoint,
    found: Beginning,
    text: Text,
    choosing: Text,
    described: Training,
) -> Work:
    """What is trained, in a directory that is named by all that decides it."""
    modules = read_modules(checkpoint).holding(found.plan.groups)
    refuse_untrainable(found.plan, modules)
    base = base_sha256(checkpoint)
    key = hashlib.sha256(json.dumps([base, decides(described)], sort_keys=True).encode()).hexdigest()
    return Work(
        checkpoint,
        modules,
        found.plan,
        found.directory,
        _originals(checkpoint, modules, found),
        text,
        choosing,
        model.variants_dir / TRAINING / f"{found.name}-{key[:12]}",
        {"model": base, "base": found.said, "text": described.sha256},
        _items(model, checkpoint) if found.problems else {},
    )


def _forget(work: Work) -> None:
    """Remove the checkpoints of a finished run."""
    for kept in (*work.directory.glob("block-*"), work.directory / "whole"):
        shutil.rmtree(kept, ignore_errors=True)


def _trained(work: Work, settings: QatSettings, say: Say) -> tuple[Student, Report]:
    student, report = train_variant(work, settings)
    work.directory.mkdir(parents=True, exist_ok=True)
    write_whole(work.directory / REPORT, report.as_json())
    what = f"{report.recovered:.0%} recovered"
    if report.after > report.before:
        what = (
            f"{-report.recovered:.0%} worse than what it was begun with; more steps or a lower rate may help"
        )
    say(
        f"KL on {len(work.choosing.sequences)} conversations that it was not trained on, in torch: "
        f"{report.before:.5f} -> {report.after:.5f} ({what}); {report.moved} of {report.weights} stored "
        "weights are others now"
    )
    for role, of in report.items.items():
        say(
            f"{role}: KL {of['before_kl']:.5f} -> {of['after_kl']:.5f}, right {of['before_right']:.1%} -> "
            f"{of['after_right']:.1%} (reference {of['before_reference_right']:.1%})"
        )
    return student, report


def _export(
    student: Student, work: Work, out: Path, described: Training, report: Report, say: Say
) -> Training:
    """The checkpoint that was begun with, with what was trained in it, and what the card says of that."""
    from quantize.train.qat_export import export

    for file in sorted(work.base.rglob("*")):
        if file.is_file() and file.name != CARD_NAME:
            copy = out / file.relative_to(work.base)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    compared = export(student, out)
    say(f"{compared} stored tensors are what was trained, bit for bit")
    return described.model_copy(
        update={
            "kl_before": report.before,
            "kl_after": report.after,
            "tensors": compared,
            "seconds": report.curve["seconds"],
        }
    )


def read_report(directory: Path) -> Report | None:
    """The report of a finished run; None where there is none."""
    file = directory / REPORT
    if not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    found.pop("recovered")
    return Report(**found)


def _text(
    model: ModelConfig, checkpoint: Checkpoint, calibration: CalibrationSet, files: Sequence[Path]
) -> tuple[Text, Text, Training]:
    """What is trained on, what the loss is looked at on, and what a card says of it. Of calibration every
    token is learned, of ``files`` what the assistant says first and all after it. Raises DataError."""
    calibrating, spans = split(calibration)
    sequences = [list(one) for one in calibrating.sequences if len(one) > 1]
    starts = [1] * len(sequences)
    judged = {
        training_data.of_item(item, role).asked: role
        for role, items in all_items(model).items()
        for item in items
    }
    names = [calibration.description.source]
    for file in files:
        lines = training_data.read_examples(file)
        for line in lines:
            if (role := judged.get(line.asked)) is not None:
                raise training_data.DataError(
                    f"{line.where}: is an item that role {role} is judged by; take it out of what trains"
                )
        found = training_data.encode(lines, checkpoint, calibration_length(checkpoint))
        sequences += [list(one.ids) for one in found.examples]
        starts += [max(1, one.learned.index(True)) for one in found.examples]
        names.append(file.name)
    described = Training(
        base="",
        settings={},
        source=", ".join(names),
        sha256=hashlib.sha256(json.dumps([sequences, starts]).encode()).hexdigest(),
        sequences=len(sequences),
        tokens=sum(map(len, sequences)),
    )
    return Text(sequences, starts), Text([list(tokens) for tokens, _ in spans]), described


def _items(model: ModelConfig, checkpoint: Checkpoint) -> dict[str, Text]:
    """Items of every role with their right answers, as far as roles do not share them."""
    found = {}
    tasks = all_items(model)
    for role in dict.fromkeys(by_first_role(tasks).values()):
        lines = [training_data.of_item(item, role) for item in tasks[role] if item.suite == "task"][:ITEMS]
        examples = training_data.encode(lines, checkpoint, checkpoint.max_model_len).examples
        found[role] = Text([list(one.ids) for one in examples], [one.learned.index(True) for one in examples])
    return found


def _originals(
    checkpoint: Checkpoint, modules: Modules, found: Beginning
) -> Callable[[Linear], Tensor | None]:
    """Weights as they were before they were quantized, in the basis of what is begun with."""
    from quantize.make.blocks import Files

    files = Files(checkpoint.path)
    layers = {member.name: group.layer for group in modules for member in group.members}

    def of(linear: Linear) -> Tensor | None:
        if not found.original:
            return None
        weight, scales = files[f"{linear.name}.weight"].float(), found.scales
        return (
            weight
            if scales is None
            else folded(f"{linear.name}.weight", weight, scales.of(layers[linear.name]))
        )

    return of
