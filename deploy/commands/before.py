"""What a command looks at before the first minute of work: all that would stop it at the end."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence

from deploy.commands import say
from deploy.fleet.room import too_large
from deploy.machine import look
from deploy.making import labelled_items
from deploy.models import checkpoint_of
from deploy.placement import Need, PlacementError
from gateway.config import ModelConfig
from quantize.core.checkpoint import Checkpoint, CheckpointError
from quantize.core.jsonl import read_lines
from quantize.core.tokenizer import encode_messages, load_tokenizer
from quantize.evaluate.scripts import unlike
from quantize.evaluate.tasks import Item, TaskError
from quantize.make.compress import QuantizeError


def refuse_unmeasurable(model: ModelConfig) -> None:
    """Raise an error for what would keep variants from being measured: no items, items that the chat template
    refuses, no engine, no room for the reference's. Imports transformers."""
    if not model.roles:
        raise QuantizeError(
            f"no role may be served by {model.name}, so that nothing judges its variants; name it in "
            "roles.ROLE.models, or use --no-evaluate"
        )
    tasks = labelled_items(model)
    python = model.engine.python
    if python is None or not python.exists():
        raise QuantizeError(
            f"no engine environment at {python}, and variants are measured on the engine; run `make setup`, "
            "set engine.python, or use --no-evaluate"
        )
    checkpoint = checkpoint_of(model, say)
    refuse_roomless(model, checkpoint)
    tokenizer = load_tokenizer(checkpoint.path)
    for role, items in tasks.items():
        for number, item in enumerate(items, 1):
            try:
                encode_messages(tokenizer, item.messages, model.path)
            except CheckpointError as error:
                raise TaskError(f"roles.{role}: item {number}: {error}") from None
    for sentence in calibration_unlike_items(model, tasks):
        say(sentence)


def calibration_unlike_items(model: ModelConfig, tasks: Mapping[str, Sequence[Item]]) -> Iterator[str]:
    """A sentence for every role whose items are written otherwise than what calibrates. Of the latter the
    conversations that can be read count: reading it in earnest says what is wrong."""
    if model.calibration is None or not model.calibration.is_file():
        return
    read: list[str] = []
    for _, line in read_lines(model.calibration):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            read += [str(message["content"]) for message in json.loads(line)["messages"]]
    for role, items in tasks.items():
        texts = [str(one["content"]) for item in items for one in item.messages]
        if why := unlike(read, texts):
            yield (
                f"{model.calibration.name} is unlike the items of {role}: it is in {why}; a variant loses "
                "least on what it was calibrated with: take conversations like those to be served"
            )


def refuse_roomless(model: ModelConfig, checkpoint: Checkpoint) -> None:
    """Raise PlacementError where the reference, which all variants are compared with, fits nowhere here."""
    per_token = checkpoint.kv_bytes_per_token(2)
    settings, config = model.engine, checkpoint.text_config
    heads = (config.get(name) for name in ("num_attention_heads", "num_key_value_heads"))
    need = Need(
        name=model.id(model.reference),
        weight_bytes=sum(checkpoint.kept(name, one).bytes for name, one in checkpoint.tensors.items()),
        kv_bytes=settings.kv_bytes(checkpoint.max_model_len, per_token),
        heads=tuple(int(count) for count in heads if count),
        env=settings.env,
        arguments=settings.extra_args,
        token_bytes=per_token,
        context=settings.context(checkpoint.max_model_len, per_token),
        needed=True,
    )
    for why in too_large(look(), [need]).values():
        raise PlacementError(why)
