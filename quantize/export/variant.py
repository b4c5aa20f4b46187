"""GGUF files as variants: made here from the model's checkpoint, or made elsewhere and registered.

A variant of this kind has the target ``llama.cpp`` on its card, and one file of weights beside the model's
configuration, tokenizer and chat template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.card import LLAMA, CardError
from quantize.core.checkpoint import Checkpoint, base_sha256, copy_companions
from quantize.core.files import link_or_copy, sha256_of, write_whole
from quantize.core.resources import measured
from quantize.core.tokenizer import TEXTS, load_tokenizer
from quantize.export.gguf_file import GgufFile, read_gguf
from quantize.export.modules import bits_per_weight, module_bits
from quantize.export.types import ExportError, export_type

if TYPE_CHECKING:
    from quantize.card import Card
    from quantize.make.calibration import CalibrationSet
    from quantize.registry import Registry

MODEL_FILE = "model.gguf"
IMATRIX, PLAIN = "imatrix", "rtn"
"""What the methods are called by which llama.cpp finds numbers: ranges weighted by E[x²], or not."""
SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
"""Settings of a GGUF file to those of a checkpoint that they must equal."""


def add_gguf(
    registry: Registry,
    checkpoint: Checkpoint,
    variant: str,
    kind: str,
    calibration: CalibrationSet | None = None,
) -> Card:
    """Make a GGUF variant of the model, or return it if the same inputs made it before.

    ``calibration`` weighs ranges, where the type uses that. Raises ExportError.
    """
    from quantize.export.gguf import examine, export_gguf
    from quantize.export.importance import importance_of

    how = export_type(kind)
    if variant == registry.reference:
        raise CardError(f"{variant!r} is the reference's name; give the export another one (--name)")
    used = calibration if how.wants_importance else None
    packages = {name: version(name) for name in ("tiercel", "gguf", "llama-cpp-py-sync")}
    base = base_sha256(checkpoint)
    inputs = {
        "base": base,
        "gguf": how.name,
        "calibration": used.description.sha256 if used else None,
        "versions": packages,
    }

    def fill(partial: Path) -> dict[str, Any]:
        source = examine(checkpoint)
        with measured() as taken:
            importance = importance_of(source, used.sequences) if used else None
            made = export_gguf(source, how.name, partial / MODEL_FILE, importance)
        _companions(checkpoint, partial)
        return described(checkpoint, made.file) | {
            "scheme": how.name,
            "method": "none" if how.bits == 16 else IMATRIX if used else PLAIN,
            "calibration": used.description if used else None,
            "making": asdict(taken),
            "versions": packages,
            "notes": (_kinds(made.kinds),),
        }

    return registry.take_in(variant, inputs, fill, checkpoint)


def register_gguf(registry: Registry, checkpoint: Checkpoint, path: Path, variant: str) -> Card:
    """Take in a GGUF file that was made elsewhere, without changing a byte of it.

    ``checkpoint`` is the model that it was made from: sizes and tokens must be its own. Raises ExportError.
    """
    if variant == registry.reference:
        raise CardError(f"{variant!r} is the reference's name; register {path} under another one")
    file = read_gguf(path)
    more = refuse_other_model(checkpoint, file)

    def fill(partial: Path) -> dict[str, Any]:
        link_or_copy(path, partial / MODEL_FILE)
        _companions(checkpoint, partial)
        matrices: dict[str, int] = {}
        for tensor in file.tensors.values():
            if len(tensor.shape) > 1:
                matrices[tensor.type] = matrices.get(tensor.type, 0) + 1
        return described(checkpoint, file) | {
            "origin": "registered",
            "scheme": scheme_of(file),
            "method": "unknown",
            "versions": {"tiercel": version("tiercel")},
            "notes": (_kinds(matrices), "tokenizer and chat template are the base model's", *more),
        }

    inputs = {"base": base_sha256(checkpoint), "registered": {path.name: sha256_of(path)}}
    return registry.take_in(variant, inputs, fill, checkpoint)


def refuse_other_model(checkpoint: Checkpoint, file: GgufFile) -> tuple[str, ...]:
    """Raise ExportError where a file is not of the model, or reads usual text otherwise; what it reads
    otherwise of rare signs, and where it writes on, is returned, for the card. Loads its vocabulary."""
    from quantize.export.llama import LlamaModel
    from quantize.export.vocabulary import endless, other_tokens

    for theirs, ours in SIZES.items():
        given, wanted = file.of_architecture(theirs), checkpoint.text_config.get(ours)
        if given is not None and wanted is not None and given != wanted:
            raise ExportError(
                f"{file.path}: {theirs} is {given}, {ours} of {checkpoint.path} is {wanted}; register it "
                "with the model that it was made from"
            )
    with LlamaModel(file.path, only_vocabulary=True) as model:
        size = int(checkpoint.text_config["vocab_size"])
        if model.vocabulary != size:
            raise ExportError(
                f"{file.path} has {model.vocabulary} tokens, {checkpoint.path} has {size}; register it with "
                "the model that it was made from"
            )
        tokenizer = load_tokenizer(checkpoint.path)
        said = other_tokens(checkpoint, tokenizer, model, TEXTS)
        rare = other_tokens(checkpoint, tokenizer, model)
        lost = endless(checkpoint, model)
    if said:
        raise ExportError(
            f"{file.path}: llama.cpp makes other tokens of text than the tokenizer of {checkpoint.path}: "
            f"{said}; register it with the model that it was made from"
        )
    notes = [f"llama.cpp makes other tokens {rare}"] if rare else []
    if lost:
        notes.append(f"answers do not end at {', '.join(map(str, lost))}, where the base model's do")
    return tuple(notes)


def described(checkpoint: Checkpoint, file: GgufFile) -> dict[str, Any]:
    """Fields of a card that follow from the file."""
    bits = module_bits(file)
    if not bits:
        raise ExportError(f"{file.path} has no matrices that are known here; give a decoder model's file")
    return {
        "target": LLAMA,
        "weight_bits": min(bits.values()),
        "module_bits": bits,
        "bits_per_weight": bits_per_weight(file),
        "weight_bytes": file.weight_bytes,
        "kv_bytes_per_token": checkpoint.kv_bytes_per_token(2),
    }


def scheme_of(file: GgufFile) -> str:
    """What a file is quantized to, by the number that its maker wrote into it."""
    from gguf import LlamaFileType

    try:
        name = str(LlamaFileType(int(file.fields["general.file_type"])).name)
    except (KeyError, ValueError):
        return "gguf"
    return name.removeprefix("MOSTLY_").removeprefix("ALL_").lower()


def write_file_card(file: GgufFile, fields: Mapping[str, Any]) -> Path:
    """``FILE.card.json`` beside a file that is no variant: what it is, of what, by what."""
    path = file.path.with_name(f"{file.path.name}.card.json")
    content = {**fields, "sha256": sha256_of(file.path)}
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return path


def _companions(checkpoint: Checkpoint, partial: Path) -> None:
    copy_companions(checkpoint, partial)
    link_or_copy(checkpoint.path / "config.json", partial / "config.json")


def _kinds(kinds: Mapping[str, int]) -> str:
    listed = ", ".join(f"{count} of {kind}" for kind, count in kinds.items())
    return f"matrices: {listed}"
