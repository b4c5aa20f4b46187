"""A quantized checkpoint that was made elsewhere: everything that is checked before it is registered."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantize.core.checkpoint import Checkpoint
from quantize.core.companions import (
    TOKENIZER_FILES,
    chat_template,
    companion_files,
    read_object,
    with_file_class,
    wrong_class,
)
from quantize.core.model_config import TEXT_CONFIGS
from quantize.core.modules import Modules
from quantize.core.plan import Plan
from quantize.core.targets import Target
from quantize.core.weights import (
    CONFIGS,
    INDEX,
    CheckpointError,
    ignored_files,
    read_tensors,
    weight_files,
)
from quantize.register.formats import Prequantized, bits_of, read_prequantized
from quantize.register.stored import SAME_FIELDS, check_stored

RECIPES = ("recipe.yaml",)
"""What llm-compressor leaves beside the weights: how they were made."""
TOKENIZER_NAMES = ("token", "vocab", "merges")
TEMPLATE_NAMES = ("chat_template", "additional_chat_templates")


@dataclass(frozen=True)
class Outside:
    """What was found. ``files``, each with its name in the variant, are to be taken as they are, the base
    model's among them; ``written`` are texts by the name of the file that they stand in for."""

    files: tuple[tuple[Path, Path], ...]
    plan: Plan
    module_bits: dict[str, int]
    bits_per_weight: float
    notes: tuple[str, ...]
    written: Mapping[str, str] = field(default_factory=dict)


def examine(directory: Path, base: Checkpoint, modules: Modules, where: Target | None = None) -> Outside:
    """Check a quantized checkpoint against the base model, and the order of its columns against ``where``.

    Raises CheckpointError with one sentence.
    """
    config, written = _config(directory)
    text_config = next((config[key] for key in TEXT_CONFIGS if isinstance(config.get(key), dict)), config)
    for name in SAME_FIELDS:
        ours, theirs = base.text_config.get(name), text_config.get(name)
        if ours is not None and theirs is not None and ours != theirs:
            raise CheckpointError(
                f"{directory}/config.json: {name} is {theirs}, the base model {base.path} has {ours}; "
                "register it with the model that it was made from"
            )
    read_tensors(directory)
    found = read_prequantized(directory, config, modules.linears)
    _refuse_order(directory, found, where)
    notes = check_stored(directory, base, modules, found, text_config.get("tie_word_embeddings"))
    plan = Plan(
        groups={group.name: _one_scheme(directory, group.members, found.schemes) for group in modules},
        kv=found.kv,
        method=found.method,
    )
    supplied, more = _supplied(directory, base)
    files = [(directory / name, name) for name in _files(directory)]
    if wrong_class(directory) is not None:
        written["tokenizer_config.json"] = with_file_class(directory / "tokenizer_config.json")
        more.append(
            "tokenizer_config.json names PreTrainedTokenizerFast, with which tokenizer.json is read as it is"
        )
    names = {name for _, name in files}
    if left := [name for name in ignored_files(directory) if Path(name) not in names]:
        more.append(f"left behind, because it is no part of the model: {', '.join(left)}")
    return Outside(
        files=(*files, *supplied),
        plan=plan,
        module_bits=bits_of(found.schemes),
        bits_per_weight=_bits_per_weight(directory, modules),
        notes=(*notes, *more),
        written=written,
    )


def _files(directory: Path) -> list[Path]:
    """What a quantized checkpoint consists of, relative to its directory."""
    weights = [path.relative_to(directory) for path in weight_files(directory)]
    named = (Path(name) for name in (*CONFIGS, INDEX, *RECIPES))
    return [*(name for name in named if (directory / name).is_file()), *weights, *companion_files(directory)]


def _refuse_order(directory: Path, found: Prequantized, where: Target | None) -> None:
    """The columns of a matrix may stand in the order of their activations, which not every engine undoes."""
    for module, order in found.orders.items() if where else ():
        if where and (problems := where.act_order_problems(module, order)):
            raise CheckpointError(f"{directory}: {problems[0]}")


def _config(directory: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The configuration, and what is written so that an engine finds in it what a file beside it says."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; give a Hugging Face checkpoint directory") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); save the checkpoint again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no JSON object; save the checkpoint again")
    if not config.get("quantization_config"):
        for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
            if settings := read_object(directory / name):
                config["quantization_config"] = {"quant_method": method, **settings}
                return config, {"config.json": json.dumps(config, indent=2) + "\n"}
    return config, {}


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


def _supplied(directory: Path, base: Checkpoint) -> tuple[list[tuple[Path, Path]], list[str]]:
    """The base model's tokenizer and chat template, where the checkpoint has none."""
    files: list[Path] = []
    notes: list[str] = []
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        files += [name for name in base.companions if any(part in name.name for part in TOKENIZER_NAMES)]
        notes.append("the tokenizer is the base model's: the checkpoint has none")
    else:
        _same_tokenizer(directory, base.path)
    if chat_template(directory) is None:
        if Path("tokenizer_config.json") not in files or not _template_in_config(base.path):
            files += [name for name in base.companions if name.as_posix().startswith(TEMPLATE_NAMES)]
        notes.append("the chat template is the base model's: the checkpoint has none")
    return [(base.path / name, name) for name in files if not (directory / name).exists()], notes


def _template_in_config(path: Path) -> bool:
    return bool(read_object(path / "tokenizer_config.json").get("chat_template"))


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
