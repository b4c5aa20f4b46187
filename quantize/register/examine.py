"""A quantized checkpoint that was made elsewhere: everything that is checked before it is registered."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.card import CARD_NAME
from quantize.core.checkpoint import TOKENIZER_FILES, Checkpoint, CheckpointError, read_tensors, weight_files
from quantize.core.modules import Modules
from quantize.core.plan import Plan
from quantize.register.formats import bits_of, read_prequantized
from quantize.register.stored import SAME_FIELDS, check_stored

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
"""Weights in formats that run code when they are read: left behind."""
TOKENIZER_PATTERNS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")
TEMPLATE_PATTERNS = ("chat_template*",)


@dataclass(frozen=True)
class Outside:
    """What was found. ``files`` are to be taken as they are, the base model's among them."""

    files: tuple[Path, ...]
    plan: Plan
    module_bits: dict[str, int]
    bits_per_weight: float
    notes: tuple[str, ...]


def examine(directory: Path, base: Checkpoint, modules: Modules) -> Outside:
    """Check a quantized checkpoint against the base model. Raises CheckpointError with one sentence."""
    config = _config(directory)
    for name in SAME_FIELDS:
        ours, theirs = base.config.get(name), config.get(name)
        if ours is not None and theirs is not None and ours != theirs:
            raise CheckpointError(
                f"{directory}/config.json: {name} is {theirs}, the base model {base.path} has {ours}; "
                "register it with the model that it was made from"
            )
    weight_files(directory)
    found = read_prequantized(directory, config, modules.linears)
    notes = check_stored(directory, base.path, modules, found)
    plan = Plan(
        groups={group.name: _one_scheme(directory, group.members, found.schemes) for group in modules},
        kv=found.kv,
        method=found.method,
    )
    supplied, more = _supplied(directory, base)
    files = [path for path in sorted(directory.iterdir()) if _taken(path)]
    left = [path.name for path in directory.iterdir() if path.suffix in PICKLES]
    if left:
        more.append(f"left behind, because reading them can run code: {', '.join(sorted(left))}")
    return Outside(
        files=(*files, *supplied),
        plan=plan,
        module_bits=bits_of(found.schemes),
        bits_per_weight=_bits_per_weight(directory, modules),
        notes=(*notes, *more),
    )


def _config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; give a Hugging Face checkpoint directory") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); save the checkpoint again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no JSON object; save the checkpoint again")
    return config


def _taken(path: Path) -> bool:
    return path.is_file() and path.name != CARD_NAME and path.name[0] != "." and path.suffix not in PICKLES


def _one_scheme(directory: Path, members: Any, schemes: Any) -> str:
    names = {schemes[member.name] for member in members}
    if len(names) > 1:
        listed = ", ".join(f"{member.name} is {schemes[member.name]}" for member in members)
        raise CheckpointError(f"{directory}: engines fuse these, so they must share one scheme: {listed}")
    (name,) = names
    return str(name)


def _bits_per_weight(directory: Path, modules: Modules) -> float:
    """Of the linear modules, as stored: packed values, scales, zero points."""
    names = {linear.name for linear in modules.linears}
    stored = sum(
        tensor.bytes
        for name, tensor in read_tensors(directory).items()
        if name.rpartition(".")[0] in names and not name.endswith((".bias", "k_scale", "v_scale"))
    )
    return 8 * stored / sum(linear.weights for linear in modules.linears)


def _supplied(directory: Path, base: Checkpoint) -> tuple[list[Path], list[str]]:
    """The base model's tokenizer and chat template, where the checkpoint has none."""
    files: list[Path] = []
    notes: list[str] = []
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        files += _matching(base.path, TOKENIZER_PATTERNS)
        notes.append("the tokenizer is the base model's: the checkpoint has none")
    else:
        _same_tokenizer(directory, base.path)
    if not _has_template(directory) and not any(_has_template(path) for path in files):
        files += _matching(base.path, TEMPLATE_PATTERNS)
        notes.append("the chat template is the base model's: the checkpoint has none")
    names = {path.name for path in directory.iterdir()}
    return [path for path in files if path.name not in names], notes


def _matching(directory: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in directory.glob(pattern) if path.is_file()})


def _has_template(path: Path) -> bool:
    """Of a checkpoint directory, or of a tokenizer_config.json."""
    if path.is_dir():
        return bool(_matching(path, TEMPLATE_PATTERNS)) or _has_template(path / "tokenizer_config.json")
    if path.name != "tokenizer_config.json" or not path.is_file():
        return False
    return bool(json.loads(path.read_text(encoding="utf-8")).get("chat_template"))


def _same_tokenizer(directory: Path, base: Path) -> None:
    """Comparisons are of the same tokens, so that another vocabulary makes them impossible."""
    ours, theirs = base / "tokenizer.json", directory / "tokenizer.json"
    if not (ours.is_file() and theirs.is_file()):
        return
    if _vocabulary(ours) != _vocabulary(theirs):
        raise CheckpointError(
            f"{theirs} has another vocabulary than the base model's tokenizer; "
            "register it with the model that it was made from"
        )


def _vocabulary(path: Path) -> Any:
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    added = sorted((entry["id"], entry["content"]) for entry in tokenizer.get("added_tokens") or ())
    return tokenizer.get("model", {}).get("vocab"), added
