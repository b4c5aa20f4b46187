"""What travels with a checkpoint's weights: tokenizer, chat template, generation and processor configs.

They are copied byte for byte and never saved anew: a library that reads a tokenizer and writes it out
changes it. One field may be set right on the way: a ``tokenizer_config.json`` that names a SentencePiece
class over a byte-level ``tokenizer.json``. transformers 5 builds such a tokenizer anew from its vocabulary,
in the product and in the engine, and all spaces are lost; the class that reads the file as it is loses none.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from quantize.core.files import writing
from quantize.core.weights import CheckpointError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
"""One of these is the tokenizer."""
PATTERNS = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v*", "tekken.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.tiktoken"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("video_preprocessor_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)
FROM_FILE = "PreTrainedTokenizerFast"
"""The class that reads ``tokenizer.json`` as it is."""
SENTENCEPIECE_CLASSES = ("LlamaTokenizer", "GemmaTokenizer", "CodeLlamaTokenizer", "MistralTokenizer")
"""Classes for which transformers 5 builds pre-tokenizer and decoder itself, for pieces with ``▁``."""


def companion_files(path: Path) -> tuple[Path, ...]:
    """The files of a checkpoint directory that travel with a variant, relative to it."""
    found = {file.relative_to(path) for pattern in PATTERNS for file in path.glob(pattern) if file.is_file()}
    return tuple(sorted(found))


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is none. Raises CheckpointError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no JSON object; download it again")
    return found


def copy_companion_files(source: Path, out: Path) -> None:
    """Copy a directory's companions into ``out``, byte for byte but for the tokenizer's class where
    :func:`wrong_class` finds one. Files that are there already stay."""
    renamed = wrong_class(source) is not None
    for name in companion_files(source):
        target = out / name
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if renamed and name == Path("tokenizer_config.json"):
            target.write_text(with_file_class(source / name), encoding="utf-8")
        else:
            with writing(target, (source / name).stat().st_size):
                shutil.copyfile(source / name, target)


def with_file_class(tokenizer_config: Path) -> str:
    """The text of a ``tokenizer_config.json`` with the class that reads ``tokenizer.json`` as it is."""
    settings = read_object(tokenizer_config) | {"tokenizer_class": FROM_FILE}
    return json.dumps(settings, indent=2, ensure_ascii=False) + "\n"


def wrong_class(path: Path) -> str | None:
    """The class in ``tokenizer_config.json`` if it is one for SentencePiece and ``tokenizer.json`` is
    byte-level; None otherwise."""
    named = read_object(path / "tokenizer_config.json").get("tokenizer_class")
    if not isinstance(named, str) or named.removesuffix("Fast") not in SENTENCEPIECE_CLASSES:
        return None
    content = read_object(path / "tokenizer.json")
    parts = json.dumps([content.get("pre_tokenizer"), content.get("decoder")])
    return named if '"ByteLevel"' in parts else None


def chat_template(path: Path) -> str | None:
    """The chat template that transformers and engines take from a directory; None where there is none.

    Raises CheckpointError for a list of named templates without a default.
    """
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8") or None
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file} is not UTF-8 ({error.reason}); save it as UTF-8") from None
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = read_object(path / name).get("chat_template")
        if isinstance(found, str) and found:
            return found
        if isinstance(found, list) and found:
            named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
            if not isinstance(named.get("default"), str):
                raise CheckpointError(
                    f"{path / name}: chat_template has no template named 'default', only "
                    f"{', '.join(map(str, named))}; write the one to use to {file}"
                )
            return str(named["default"])
    return None


def largest_token(path: Path) -> int | None:
    """The largest id that text or the chat template can come to, by ``tokenizer.json``; None without it.

    An added token beyond the vocabulary counts where the template writes it: Gemma 3 has one for images,
    equal to ``vocab_size``, which text never comes to. Raises CheckpointError.
    """
    file = path / "tokenizer.json"
    if not file.is_file():
        return None
    content = read_object(file)
    template = chat_template(path) or ""
    try:
        vocabulary = content["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        added = (
            token["id"]
            for token in content.get("added_tokens") or ()
            if str(token.get("content") or "\0") in template
        )
        return max((*ids, *added), default=None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is no tokenizer ({type(error).__name__}: {error}); download it again"
        ) from None


def refuse_bad_companions(path: Path) -> None:
    """Raise CheckpointError, with the fix, for a missing tokenizer or template, or a damaged file."""
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{path} has no tokenizer ({', '.join(TOKENIZER_FILES)}); save the model's tokenizer beside it"
        )
    if (path / "vocab.json").is_file() and not any(
        (path / name).is_file() for name in (*TOKENIZER_FILES[:2], "merges.txt")
    ):
        raise CheckpointError(f"{path} has vocab.json without merges.txt; download the whole tokenizer")
    for name in companion_files(path):
        if name.suffix == ".json" and not re.fullmatch("vocab.json|tokenizer.json|tekken.json", name.name):
            read_object(path / name)
    if chat_template(path) is None:
        raise CheckpointError(
            f"{path} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json), "
            "and agents talk through it; add the model's chat_template.jinja"
        )
