"""The configuration of a model without some of its layers: what it says layer by layer goes with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantize.core.checkpoint import Checkpoint
from quantize.core.model_config import read_config

NO_LAYERS = ("architectures", "token_id")
"""Ends of names of lists that are not of layers, however long they are."""
TYPES, DENSE, SPARSE_STEP = "layer_types", "mlp_only_layers", "decoder_sparse_step"


def without_layers(checkpoint: Checkpoint, left: Sequence[int]) -> dict[str, Any]:
    """``config.json`` with those layers alone.

    Where layers differ by their number (Gemma's windows, Qwen's experts), the files of older models give a
    rule, which would make other layers of those that move up: it is written out. Raises CheckpointError.
    """
    config = dict(checkpoint.config)
    count = int(config["num_hidden_layers"])
    if types := getattr(read_config(checkpoint.path), TYPES, None):
        config[TYPES] = list(types)
    for key, value in config.items():
        if isinstance(value, list) and len(value) == count and key != DENSE and not key.endswith(NO_LAYERS):
            config[key] = [value[layer] for layer in left]
    if DENSE in config or SPARSE_STEP in config:
        dense, step = config.get(DENSE) or (), int(config.get(SPARSE_STEP) or 1)
        config[DENSE] = [at for at, layer in enumerate(left) if layer in dense or (layer + 1) % step]
        config[SPARSE_STEP] = 1
    config["num_hidden_layers"] = len(left)
    return config
