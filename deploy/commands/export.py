"""``tiercel export``: models in the formats of other engines."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.commands import add_json, add_model, print_json, say
from deploy.commands.quantize import before_work, judge, reference_card, unmeasured
from deploy.making import labelled_items
from deploy.models import checkpoint_of, one_model, registry_of
from gateway.config import ModelConfig, load_config
from quantize.core.checkpoint import Checkpoint, open_checkpoint
from quantize.export.encoder import DYNAMIC, ENCODER_TYPES
from quantize.export.types import DEFAULT_TYPE, TYPES, ExportError, export_type


def add_export(parser: argparse.ArgumentParser) -> None:
    """The commands of ``tiercel export``."""
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_gguf(commands)
    _add_encoder(commands)
    _add_classifier(commands)


def _add_encoder(commands: Any) -> None:
    text = "ONNX of an encoder: a classifier's variants, measured and judged, or with a directory a file"
    making = commands.add_parser("encoder", help=text, description=text)
    making.add_argument(
        "directory", type=Path, nargs="?", help="an encoder's directory (default: a model of the YAML file)"
    )
    making.add_argument("--config", type=Path, default=Path("tiercel.yaml"), help="the YAML file")
    add_model(making)
    making.add_argument(
        "--type", choices=ENCODER_TYPES, help="of a directory's export (default: int8-dynamic)"
    )
    making.add_argument("--out", type=Path, help="the file that a directory's export goes to")
    making.add_argument("--calibration", type=Path, help="JSON Lines with texts, for int8-static")
    unmeasured(making)
    making.set_defaults(run=encoder)


def _add_classifier(commands: Any) -> None:
    text = "train a classifier on an encoder, a model that `export encoder` makes variants of"
    training = commands.add_parser("classifier", help=text, description=text)
    training.add_argument("encoder", type=Path, help="an encoder's directory, which stays as it is")
    training.add_argument("labelled", type=Path, help="JSON Lines: texts and labels, or items of a role")
    training.add_argument("--out", type=Path, required=True, help="the directory that it is written to")
    add_json(training)
    training.set_defaults(run=classifier)


def _add_gguf(commands: Any) -> None:
    text = "GGUF for llama.cpp: a variant that is measured and judged, or with a directory a file"
    making = commands.add_parser("gguf", help=text, description=text)
    making.add_argument(
        "directory", type=Path, nargs="?", help="a checkpoint directory (default: a model of the YAML file)"
    )
    making.add_argument("--config", type=Path, default=Path("tiercel.yaml"), help="the YAML file")
    add_model(making)
    making.add_argument("--type", default=DEFAULT_TYPE, help=f"one of {', '.join(TYPES)}")
    making.add_argument("--out", type=Path, help="the file that a directory's export goes to")
    making.add_argument("--name", help="the variant's name (default: gguf- and the type)")
    making.add_argument(
        "--calibration", type=Path, help="JSON Lines of conversations that weigh a directory's ranges"
    )
    making.add_argument(
        "--no-importance", dest="importance", action="store_false", help="ranges by the weights alone"
    )
    unmeasured(making)
    making.set_defaults(run=gguf)


def gguf(options: argparse.Namespace) -> None:
    how = export_type(options.type)
    if options.directory is not None:
        for given, name in ((options.model, "--model"), (options.name, "--name")):
            if given:
                raise ExportError(
                    f"{name}: is of a variant of the YAML file; leave out the directory, or this"
                )
        _file(options, open_checkpoint(options.directory))
        return
    if options.out:
        raise ExportError("--out: is of a directory's export; name the directory, or leave it out")
    if options.calibration:
        raise ExportError("--calibration: a model's is set in the YAML file (models.NAME.calibration)")
    from deploy.unlabelled import calibration_for
    from quantize.export.variant import add_gguf

    config = load_config(options.config)
    model = one_model(config, options.model)
    checkpoint = checkpoint_of(model, say)
    _refuse(checkpoint)
    wants = how.wants_importance and options.importance
    before_work(model, options)(wants)
    reference = reference_card(model)
    calibration = calibration_for(model, checkpoint, reference.version) if wants else None
    name = options.name or f"gguf-{how.name}"
    card = add_gguf(registry_of(model, say), checkpoint, name, how.name, calibration)
    for note in card.notes:
        say(f"{name}: {note}")
    judge(config, {model.name: [reference, card]}, options)


def encoder(options: argparse.Namespace) -> None:
    from quantize.export.encoder import export_encoder, open_encoder, refuse_other_rows
    from quantize.export.labelled import labelled_rows

    texts = [text for text, _ in labelled_rows(options.calibration)] if options.calibration else []
    if options.directory is None:
        if options.type or options.out:
            raise ExportError("--type and --out: are of a directory's export; name the directory")
        _classifier_variants(options, texts)
        return
    found, kind = open_encoder(options.directory), options.type or DYNAMIC
    refuse_other_rows(found)
    out = options.out or Path(f"{options.directory.resolve().name}-{kind}.onnx")
    export_encoder(found, kind, out, texts)
    size, whole = out.stat().st_size, (options.directory / "model.safetensors").stat().st_size
    served = (
        f"a classifier of {len(found.labels)} labels"
        if found.labels
        else "embeddings; no engine here serves them"
    )
    if options.json:
        print_json({"file": str(out), "type": kind, "bytes": size, "labels": list(found.labels)})
    else:
        print(f"{out}: {kind}, {size / 1e6:.1f} MB of {whole / 1e6:.1f}; {served}")


def _classifier_variants(options: argparse.Namespace, texts: Sequence[str]) -> None:
    """The reference of a classifier, and its variants in 8 bits."""
    from quantize.export.encoder import FLOAT, STATIC, open_encoder
    from quantize.export.encoder_variant import add_classifier

    config = load_config(options.config)
    model = one_model(config, options.model)
    checkpoint = checkpoint_of(model, say)
    if options.evaluate:
        _refuse_unjudgeable(model, open_encoder(checkpoint.path).labels)
    registry = registry_of(model, say)
    cards = [add_classifier(registry, checkpoint, model.reference, FLOAT)]
    for kind in (DYNAMIC, STATIC) if texts else (DYNAMIC,):
        cards.append(add_classifier(registry, checkpoint, kind, kind, texts))
    judge(config, {model.name: cards}, options)


def _refuse_unjudgeable(model: ModelConfig, labels: Sequence[str]) -> None:
    """Raise ExportError, before work, for what keeps a classifier from being measured."""
    if not model.roles:
        raise ExportError(
            f"models.{model.name}: no role may be served by it; add it to roles.NAME.models, or use "
            "--no-evaluate"
        )
    for role, settings in model.roles.items():
        if settings.tasks is None:
            raise ExportError(
                f"roles.{role}.tasks: a classifier is judged by right answers, and there are none; give items"
            )
        if settings.long_context is not None:
            raise ExportError(
                f"roles.{role}.long_context: a classifier reads the last message alone; leave {model.name} "
                "out of the role's models"
            )
    for role, items in labelled_items(model).items():
        for number, item in enumerate(items, 1):
            if item.expected not in labels:
                raise ExportError(
                    f"roles.{role}.tasks: item {number}: {item.expected[:60]!r} is none of the {len(labels)} "
                    f"labels of {model.name}; train it on texts of that label as well"
                )


def classifier(options: argparse.Namespace) -> None:
    from quantize.export.classifier import train_classifier
    from quantize.export.encoder import open_encoder
    from quantize.export.labelled import labelled_rows

    made = train_classifier(open_encoder(options.encoder), labelled_rows(options.labelled), options.out)
    if options.json:
        print_json({**dataclasses.asdict(made), "directory": str(made.directory)})
    else:
        seen = f"{100 * made.seen:.1f} % of those seen"
        known = "none could be held out, so nothing is known of others"
        if made.held_out is not None:
            known = f"of those held out {100 * made.held_out:.1f} % right"
        print(f"{made.directory}: {made.labels} labels of {made.texts} texts; {known} ({seen})")


def _refuse(checkpoint: Checkpoint) -> None:
    """Before any work: an architecture that llama.cpp does not have, or a library that is not there."""
    from quantize.export.architectures import architecture_of
    from quantize.export.llama import library

    architecture_of(checkpoint)
    library()


def _file(options: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """A GGUF file, and its card beside it."""
    from quantize.export.gguf import examine, export_gguf
    from quantize.export.importance import importance_of
    from quantize.export.variant import described, write_file_card
    from quantize.make.calibration import read_calibration

    _refuse(checkpoint)
    how = export_type(options.type)
    calibration = read_calibration(options.calibration, checkpoint) if options.calibration else None
    used = calibration if how.wants_importance and options.importance else None
    out = options.out or Path(f"{checkpoint.path.resolve().name}-{how.name}.gguf")
    source = examine(checkpoint)
    importance = importance_of(source, used.sequences) if used else None
    made = export_gguf(source, how.name, out, importance)
    fields = {
        "of": checkpoint.path.resolve().name,
        "type": how.name,
        "importance": used.description.model_dump() if used else None,
        "kinds": made.kinds,
        "llama_cpp": made.build,
        **described(checkpoint, made.file),
    }
    card = write_file_card(made.file, fields)
    if options.json:
        print_json({"file": str(out), "card": str(card), **fields})
    else:
        listed = ", ".join(f"{count} of {kind}" for kind, count in made.kinds.items())
        print(f"{out}: {made.file.weight_bytes / 1e6:.1f} MB, matrices: {listed}; its card is {card.name}")
