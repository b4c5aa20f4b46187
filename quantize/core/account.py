"""Whether a checkpoint's tensors are those that its architecture needs, by transformers' own account.

The architecture is set up on the meta device, which holds shapes and no numbers, and is loaded from the
headers as it will be from the files: renamed and fused as transformers does it for that architecture. What is
missing, left over or of another shape there would have been invented, dropped or left random later, with a
warning that nobody reads. An 8B model takes seconds, of which most are the import of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantize.core.checkpoint import Checkpoint
from quantize.core.model_config import first_line, quiet_transformers, read_config
from quantize.core.tensors import read_parts, same_bytes
from quantize.core.weights import CheckpointError, Tensor

FLOATS = ("BF16", "F16", "F32", "F64")
SHOWN = 3
"""Tensors that a refusal names."""
HEAD = "lm_head.weight"
MOST_MISSING_LAYERS = 1000
"""Up to which their tensors are named."""
_LAYER = re.compile(r"\blayers\.(\d+)\.")
EMBEDDINGS = re.compile(r"(^|.*\.)(embed_tokens|wte|word_embeddings)\.weight")


def refuse_other_tensors(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless the files hold exactly the tensors of the architecture in ``config.json``,
    each of its shape, in 16 or 32 bits, and a head of its own only where the configuration has one.

    For unquantized checkpoints. Reads headers, and head and embeddings where both are stored and tied.
    """
    if packed := sorted(name for name, one in checkpoint.tensors.items() if one.dtype not in FLOATS):
        one = checkpoint.tensors[packed[0]]
        raise CheckpointError(
            f"{checkpoint.path}: {_listed(packed)} in {one.dtype}, and config.json has no "
            "quantization_config: a quantized checkpoint without its configuration; give the 16-bit original"
        )
    _refuse_more_layers(checkpoint)
    config = read_config(checkpoint.path)
    _refuse_second_head(checkpoint, bool(getattr(config.get_text_config(), "tie_word_embeddings", False)))
    found = _loaded(checkpoint, config)
    where, file = f"{checkpoint.path}:", checkpoint.path / "config.json"
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(
            f"{where} {_listed(missing)} missing, which {file} needs{_missing_fix(missing)}"
        )
    if others := sorted(found["mismatched_keys"], key=str):
        name, stored, wanted = others[0]
        more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
        raise CheckpointError(
            f"{where} {name} has shape {tuple(stored)}, {file} makes it {tuple(wanted)}{more}; "
            "the two are of different models: download the checkpoint again"
        )
    if extra := sorted(found["unexpected_keys"]):
        raise CheckpointError(
            f"{where} {_listed(extra)} stored, which the model in {file} has no place for; "
            "the two are of different models: download the checkpoint again"
        )


def _missing_fix(missing: list[str]) -> str:
    if missing == [HEAD]:
        return (
            ": its output head. Download the checkpoint again, or set tie_word_embeddings to true if the "
            "model shares it with the embeddings"
        )
    them = "it" if len(missing) == 1 else "they"
    return f": {them} would be random numbers. Download the checkpoint again"


def _refuse_more_layers(checkpoint: Checkpoint) -> None:
    """Before a model of as many is built, were it only of names: a billion of them takes hours."""
    said = int(checkpoint.text_config["num_hidden_layers"])
    stored = 1 + max((int(n) for name in checkpoint.tensors for n in _LAYER.findall(name)), default=-1)
    if said > stored + MOST_MISSING_LAYERS:
        raise CheckpointError(
            f"{checkpoint.path}: config.json has num_hidden_layers {said}, and tensors of {stored} are "
            "stored; download the checkpoint again"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more are" if len(names) > SHOWN else ""
    verb = "" if more else (" is" if len(names) == 1 else " are")
    return ", ".join(names[:SHOWN]) + more + verb


def _refuse_second_head(checkpoint: Checkpoint, tied: bool) -> None:
    """A head that is stored beside the embeddings it is tied to must equal them: engines drop it."""
    embeddings = next((name for name in checkpoint.tensors if EMBEDDINGS.fullmatch(name)), None)
    head = next((name for name in checkpoint.tensors if re.fullmatch(r"(.*\.)?lm_head\.weight", name)), None)
    if not tied or head is None or embeddings is None:
        return
    parts = read_parts(checkpoint.path)
    if not same_bytes(parts[head], parts[embeddings]):
        raise CheckpointError(
            f"{checkpoint.path}: {head} differs from {embeddings}, and config.json ties them, so that "
            "engines would drop it; set tie_word_embeddings to false"
        )


def _loaded(checkpoint: Checkpoint, config: Any) -> Mapping[str, Any]:
    """What transformers says of loading the checkpoint: missing, unexpected and mismatched tensors."""
    import torch

    names = config.architectures or []
    architecture = _class(checkpoint.path, str(names[0]) if names else "none")
    if not isinstance(config, architecture.config_class):
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'}: model_type {config.model_type} is none of {names[0]}'s, "
            f"which is {architecture.config_class.model_type}; download the checkpoint again"
        )
    state = {name: _empty(one) for name, one in checkpoint.tensors.items()}
    with quiet_transformers():
        try:
            _, found = architecture.from_pretrained(
                None,
                config=config,
                state_dict=state,
                device_map={"": torch.device("meta")},
                dtype=torch.bfloat16,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except Exception as error:  # tensors that do not go together, a configuration without sense
            raise CheckpointError(
                f"{checkpoint.path}: transformers cannot make a {names[0]} of these tensors and this "
                f"config.json ({first_line(error)}); download the checkpoint again"
            ) from None
    if errors := found.get("error_msgs"):
        raise CheckpointError(f"{checkpoint.path}: {errors[0]}; download the checkpoint again")
    made: Mapping[str, Any] = found
    return made


def _class(path: Path, name: str) -> Any:
    import transformers

    found = getattr(transformers, name, None)
    if found is None:
        raise CheckpointError(
            f"{path / 'config.json'}: architecture {name} is not in transformers {transformers.__version__}"
        )
    return found


def _empty(tensor: Tensor) -> Any:
    """A tensor of that shape that holds no numbers. Its type does not matter: all of them are floats."""
    import torch

    return torch.empty(tensor.shape, dtype=torch.bfloat16, device="meta")
