"""What a command looks at before the first minute of work: all that would stop it at the end."""

from __future__ import annotations

from deploy.commands import say
from deploy.fleet.room import too_large
from deploy.machine import look
from deploy.making import labelled_items
from deploy.models import checkpoint_of
from deploy.placement import Need, PlacementError
from gateway.config import ModelConfig
from quantize.core.checkpoint import Checkpoint, CheckpointError
from quantize.core.tokenizer import encode_messages, load_tokenizer
from quantize.evaluate.tasks import TaskError
from quantize.make.compress import QuantizeError


def refuse_unmeasurable(model: ModelConfig) -> None:
    """Raise an error for what would keep variants from being measured: no items, items that the chat template
    refuses, no engine, no room for the reference's. Imports transformers."""
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
