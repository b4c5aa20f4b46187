"""``tiercel train``: from options and the configuration to a run; a role's own items never train it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.making import labelled_items
from deploy.models import checkpoint_of, one_model, registry_of, variant_of
from deploy.smoothing import smoothing
from deploy.unlabelled import calibration_for, version_in_use
from gateway.config import Config, ConfigError, ModelConfig, load_config
from quantize.card import Card
from quantize.check import refuse_unfit
from quantize.core.checkpoint import Checkpoint, open_checkpoint
from quantize.core.files import write_whole
from quantize.core.jsonl import read_lines
from quantize.core.model_config import first_line
from quantize.core.modules import read_modules
from quantize.core.targets import detect, target
from quantize.core.tensors import refuse_not_finite
from quantize.register.carried import Carrying, examine_adapter, is_smoothed, refuse_carrier
from quantize.train.adapters import Lora
from quantize.train.base import Method, refuse_untrainable
from quantize.train.data import Line, encode, of_item, read_examples, refuse_overlap, split
from quantize.train.loop import Settings
from quantize.train.run import Job

if TYPE_CHECKING:
    from torch import Tensor

Say = Callable[[str], None]

RATES = {"lora": 2e-4, "qlora": 2e-4, "full": 2e-5}
"""Learning rates where none is given."""
LENGTH = 1024
"""Tokens of an example where nothing is said, or as many as the model takes."""


def base_of(options: argparse.Namespace) -> tuple[Checkpoint, ModelConfig | None, Config | None]:
    """The checkpoint that ``--model`` means: a directory, or a model of the configuration."""
    given = Path(options.model).expanduser() if options.model else None
    if given is not None and (given / "config.json").is_file():
        checkpoint, model, config = open_checkpoint(given), None, None
        if getattr(options, "role", None):
            config = load_config(options.config)
    else:
        config = load_config(options.config)
        model = one_model(config, options.model)
        checkpoint = checkpoint_of(model)
    return checkpoint, model, config


def job_of(options: argparse.Namespace, method: Method, say: Say) -> Job:
    """What the options ask for, with its data read, encoded and found to be fit. Raises before any work."""
    _refuse_numbers(options)
    _refuse_nf4(options, method)
    checkpoint, model, config = base_of(options)
    refuse_untrainable(checkpoint, read_modules(checkpoint))
    refuse_unfit(checkpoint)
    refuse_not_finite(checkpoint.path)
    train, held_out, sources = lines_of(options, model, config)
    refuse_overlap(train, held_out)
    held_out = drawn(held_out, options.judge)
    length = min(LENGTH, checkpoint.max_model_len) if options.length is None else options.length
    if length > checkpoint.max_model_len:
        raise ConfigError(f"--length {length}: the model takes {checkpoint.max_model_len} tokens; give fewer")
    examples, judged = encode(train, checkpoint, length), encode(held_out, checkpoint, length)
    if examples.cut:
        say(f"{examples.cut} of {len(examples.examples)} examples are cut to {length} tokens")
    batch, steps = min(options.batch, len(examples.examples)), options.steps
    if batch < options.batch:
        say(f"a step takes all {batch} examples: there are no {options.batch}")
    if steps is None:
        steps = math.ceil(options.epochs * len(examples.examples) / batch)
    settings = Settings(
        steps=steps,
        learning_rate=RATES[method] if options.rate is None else options.rate,
        batch=batch,
        together=min(options.together, batch),
        evaluate_every=options.evaluate_every,
        keep_every=options.keep_every,
        seed=options.seed,
    )
    alpha = 2 * options.rank if options.alpha is None else options.alpha
    lora = Lora(options.rank, alpha, options.dropout, tuple(options.targets or ()))
    lora.of(read_modules(checkpoint))
    return Job(
        method,
        checkpoint,
        examples,
        judged,
        settings,
        options.out,
        lora,
        options.memory,
        options.checkpointing,
        options.device,
        sources,
        nf4=options.nf4,
    )


def _refuse_numbers(options: argparse.Namespace) -> None:
    """Raise ConfigError for what cannot be of the options that nobody else looks at, and for an ``--out``
    that is no place for a run."""
    for name in ("batch", "together", "judge", "length"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ConfigError(f"--{name} {value}: give 1 or more")
    if not 0 <= options.seed < 1 << 63:
        raise ConfigError(f"--seed {options.seed}: give a number from 0 to {(1 << 63) - 1}")
    for name, low in (("epochs", 0.0), ("memory", 0.0), ("alpha", 0.0)):
        value = getattr(options, name)
        if value is not None and not low < value < math.inf:
            raise ConfigError(f"--{name} {value:g}: give a number above 0")
    if options.held_out is not None and options.data is None:
        raise ConfigError("--held-out judges what --data trains; a role is judged by its tasks: leave it out")
    if options.device is not None:
        _refuse_device(options.device)
    if options.out.exists() and not options.out.is_dir():
        raise ConfigError(f"--out {options.out} is a file; name a directory, which may not be there yet")


def _refuse_nf4(options: argparse.Namespace, method: Method) -> None:
    """Raise for a choice of 4-bit modules that means nothing, or is not to be had."""
    from quantize.train.nf4 import whose

    if options.nf4 is not None and method != "qlora":
        raise ConfigError(f"--nf4 {options.nf4}: is of qlora alone, whose base is in 4 bits; leave it out")
    whose(options.nf4, options.device or "cpu")


def _refuse_device(name: str) -> None:
    import torch

    try:
        torch.zeros(1, device=name).cpu()  # what has no memory of its own, such as meta, does not come back
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"--device {name}: {first_line(error)}; give cpu, or cuda where there is one"
        ) from None


def lines_of(
    options: argparse.Namespace, model: ModelConfig | None, config: Config | None
) -> tuple[list[Line], list[Line], tuple[str, str]]:
    """What is trained on, what judges, and what both are called."""
    if (options.role is None) == (options.data is None):
        raise ConfigError("give --role, whose items are trained for, or --data, a file of JSON Lines")
    if options.data is not None:
        lines = read_examples(options.data)
        if options.held_out is not None:
            return lines, read_examples(options.held_out), (options.data.name, options.held_out.name)
        train, held_out = split(lines)
        return train, held_out, (options.data.name, f"{options.data.name}, one in ten")
    assert config is not None
    roles = model.roles if model is not None else config.roles
    if options.role not in roles:
        raise ConfigError(f"--role: {options.role!r} is not a role; known: {', '.join(sorted(roles))}")
    settings = roles[options.role]
    if settings.tasks is None or settings.training is None:
        missing = "tasks, the items that judge" if settings.tasks is None else "training, what is trained on"
        raise ConfigError(
            f"roles.{options.role} has no {missing}; give a file of its own (`tiercel train split FILE` "
            "divides one)"
        )
    judging = model or one_model(config, (settings.models or (config.default_model,))[0])
    items = [item for item in labelled_items(judging)[options.role] if item.suite == "task"]
    where = settings.tasks.name
    held_out = [of_item(item, f"{where}:{number}") for number, item in enumerate(items, 1)]
    return read_examples(settings.training), held_out, (settings.training.name, where)


def drawn(lines: Sequence[Line], most: int) -> list[Line]:
    """At most so many lines, the same ones whatever their order."""
    return sorted(lines, key=lambda line: line.asked)[:most] if len(lines) > most else list(lines)


def split_file(path: Path, one_in: int, say: Say) -> None:
    """Divide a file into ``….train.jsonl`` and ``….held-out.jsonl``, by what each line asks."""
    if one_in < 2:
        raise ConfigError(f"--one-in {one_in}: would hold out everything; give 2 or more")
    texts = dict(read_lines(path))
    train, held_out = split(read_examples(path), one_in)
    for lines, kind in ((train, "train"), (held_out, "held-out")):
        out = path.with_name(f"{path.name.removesuffix('.jsonl')}.{kind}.jsonl")
        if out.exists():
            raise ConfigError(f"{out} is there already; remove it first")
        numbers = [int(line.where.rpartition(":")[2]) for line in lines]
        write_whole(out, "".join(f"{texts[number].strip()}\n" for number in numbers))
        say(f"{len(lines)} lines are in {out}")


def carried(
    config: Config, options: argparse.Namespace, say: Say, before: Callable[[ModelConfig], None]
) -> dict[str, list[Card]]:
    """The reference of the merged model, and the variant of the base that carries the adapter, by model.
    ``before`` is what else is looked at before work, for the model."""
    model = one_model(config, options.model)
    base, variant = variant_of(config, options.carrier)
    if base.name == model.name:
        raise ConfigError(
            f"{options.carrier} is a variant of the merged model, which has the adapter in its weights; name "
            "one of the base's"
        )
    of_base, registry = registry_of(base, say), registry_of(model, say)
    of_base.current(variant)
    carrier = of_base.card(variant)
    refuse_carrier(carrier)
    asked = Carrying(
        adapter=options.adapter,
        carrier=carrier,
        directory=of_base.path(variant, carrier.version),
        base=checkpoint_of(base, say),
        merged=checkpoint_of(model, say),
        scales=_scales(base, carrier) if is_smoothed(carrier) else None,
    )
    examine_adapter(asked)
    before(model)
    reference = registry.add_reference(asked.merged)
    return {model.name: [reference, registry.carry(options.name, asked)]}


def _scales(base: ModelConfig, carrier: Card) -> dict[str, Tensor] | None:
    """What a smoothed variant's channels were scaled by; None where that is gone."""
    checkpoint = checkpoint_of(base)
    calibration = calibration_for(base, checkpoint, version_in_use(base))
    store = smoothing(base, checkpoint, target(detect()), calibration, carrier)
    return None if store is None else store.everything(read_modules(checkpoint).layers)
