"""What a command looks at before the first minute of work: all that would stop it at the end."""

from __future__ import annotations

from deploy.making import role_tasks
from gateway.config import ModelConfig
from quantize.core.checkpoint import CheckpointError
from quantize.core.tokenizer import encode_messages, load_tokenizer
from quantize.evaluate.tasks import TaskError
from quantize.make.compress import QuantizeError


def refuse_unmeasurable(model: ModelConfig) -> None:
    """Raise an error for what would keep variants from being measured: no items, items that the chat template
    refuses, no engine. Imports transformers."""
    tasks = role_tasks(model)
    python = model.engine.python
    if python is None or not python.exists():
        raise QuantizeError(
            f"no engine environment at {python}, and variants are measured on the engine; run `make setup`, "
            "set engine.python, or use --no-evaluate"
        )
    tokenizer = load_tokenizer(model.path)
    for role, items in tasks.items():
        for number, item in enumerate(items, 1):
            try:
                encode_messages(tokenizer, item.messages, model.path)
            except CheckpointError as error:
                raise TaskError(f"roles.{role}: item {number}: {error}") from None
