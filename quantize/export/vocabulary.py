"""A tokenizer as llama.cpp has it, proven equal on texts by llama.cpp's own tokenizer.

``tokenizer.json`` is carried over: words, merges, special tokens, the chat template. How text is parted
before its words are looked up, llama.cpp knows by name for each family of models, and nothing in the file
gives that name. So names are tried, the likeliest first, until llama.cpp makes the same tokens of
:data:`PROBES` as the model's own tokenizer; without one the model is refused.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantize.core.checkpoint import Checkpoint
from quantize.core.companions import chat_template, read_object
from quantize.core.tokenizer import TEXTS, encode_messages, load_tokenizer
from quantize.export.llama import LlamaError, LlamaModel
from quantize.export.types import ExportError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of tokens, by llama.cpp's numbers."""
NAMES = (
    *("llama-bpe", "qwen2", "smollm", "gpt-2", "tekken", "deepseek-llm", "gpt-4o", "mpt", "olmo"),
    *("falcon3", "command-r", "refact", "starcoder", "smaug-bpe", "qwen35", "superbpe", "exaone4"),
    *("hunyuan", "kimi-k2", "lfm2", "dbrx", "default"),
)
PROBES = (
    *TEXTS,
    "I'm sure they'll say it's what we've wanted; HE'D'VE done so.",
    "1 22 333 4444 55555, 3.14159e-10, 2026-11-26T20:00:00Z, v1.2.3",
    "    four spaces\n\tand a tab  \r\nthen a line\n\n\n",
    '{"intent": "book_flight", "slots": ["to", null]} <b>html</b> C:\\path\\x',
    "안녕하세요 สวัสดี مرحبا שלום नमस्ते ① ² ½ ﬁ",
)


@dataclass(frozen=True)
class Vocabulary:
    """``kind`` is llama.cpp's: ``gpt2`` for byte-level BPE, ``llama`` for SentencePiece's."""

    kind: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    scores: Sequence[float]
    special: Mapping[str, int]
    """``bos``, ``eos`` and so on to ids."""
    adds_bos: bool
    space_prefix: bool
    template: str | None

    def write(self, writer: Any) -> None:
        """Into a ``gguf.GGUFWriter``."""
        writer.add_tokenizer_model(self.kind)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores(self.scores)
        for name, token in self.special.items():
            getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(self.adds_bos)
        if self.kind == "llama":
            writer.add_add_space_prefix(self.space_prefix)
        if self.template:
            writer.add_chat_template(self.template)


def read_vocabulary(checkpoint: Checkpoint, architecture: str) -> Vocabulary:
    """The checkpoint's vocabulary, with the name that llama.cpp parts text by. Raises ExportError."""
    path = checkpoint.path / "tokenizer.json"
    if not path.is_file():
        raise ExportError(
            f"{checkpoint.path} has no tokenizer.json, from which the vocabulary is carried over; save the "
            "tokenizer with transformers (AutoTokenizer.from_pretrained(…).save_pretrained(…))"
        )
    content = read_object(path)
    model = content.get("model") or {}
    parts = json.dumps([content.get("pre_tokenizer"), content.get("decoder")])
    if model.get("type") != "BPE" or not ('"ByteLevel"' in parts or model.get("byte_fallback")):
        raise ExportError(
            f"{path}: a tokenizer of type {model.get('type')} is not carried over; byte-level BPE and BPE "
            "with byte fallback are"
        )
    if words := [one["content"] for one in content.get("added_tokens") or () if one.get("single_word")]:
        raise ExportError(
            f"{path}: {len(words)} added tokens stand for whole words alone ({', '.join(words[:3])} …), and "
            "llama.cpp finds them within words as well: it would read other tokens; serve it with vLLM"
        )
    tokenizer = load_tokenizer(checkpoint.path)
    found = _described(checkpoint, content, tokenizer, byte_level='"ByteLevel"' in parts)
    said = ""
    for name in _likely(parts) if found.kind == "gpt2" else ("default",):
        found = replace(found, pre=name)
        said = _difference(checkpoint, found, architecture, tokenizer)
        if not said:
            return found
    raise ExportError(
        f"{path}: llama.cpp makes other tokens of text than the model's own tokenizer: {said}; serve it "
        "with vLLM"
    )


def _described(
    checkpoint: Checkpoint, content: Mapping[str, Any], tokenizer: Any, byte_level: bool
) -> Vocabulary:
    model, size = content["model"], int(checkpoint.text_config["vocab_size"])
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [UNUSED] * size
    for word, number in model["vocab"].items():
        if number < size:  # the model has no embeddings of others
            tokens[number], types[number] = word, NORMAL
    for added in content.get("added_tokens") or ():
        if added["id"] < size:
            tokens[added["id"]] = added["content"]
            types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model.get("merges") or ()]
    scores: list[float] = []
    if not byte_level:
        scores = [0.0] * size
        for rank, pair in enumerate(pairs):
            at = model["vocab"].get("".join(pair))
            if at is not None and scores[at] == 0.0:
                scores[at] = -float(rank + 1)
        types = [
            BYTE if len(word) == 6 and word.startswith("<0x") and kind == NORMAL else kind
            for word, kind in zip(tokens, types, strict=True)
        ]
        if (unknown := model["vocab"].get(str(model.get("unk_token")))) is not None:
            types[unknown] = UNKNOWN
    return Vocabulary(
        kind="gpt2" if byte_level else "llama",
        pre="",
        tokens=tokens,
        types=types,
        merges=[" ".join(part.replace(" ", chr(ord(" ") + 256)) for part in pair) for pair in pairs]
        if byte_level
        else (),
        scores=scores,
        special=_special(checkpoint, tokenizer),
        adds_bos=_adds_bos(tokenizer),
        space_prefix=_space_prefix(content),
        template=chat_template(checkpoint.path),
    )


def _special(checkpoint: Checkpoint, tokenizer: Any) -> dict[str, int]:
    """Ids of special tokens; answers end with ``eos``, ``eot`` and ``eom``."""
    found = {
        name: int(token)
        for name in ("bos", "eos", "unk", "pad")
        if (token := getattr(tokenizer, f"{name}_token_id", None)) is not None
    }
    ends = ends_of(checkpoint)
    if ends and found.get("eos") not in ends:
        found["eos"] = ends[0]
    others = [token for token in ends if token != found.get("eos")]
    return found | dict(zip(("eot", "eom"), others, strict=False))


def ends_of(checkpoint: Checkpoint) -> list[int]:
    """Tokens that end an answer, as the model says."""
    generation = read_object(checkpoint.path / "generation_config.json")
    ends = generation.get("eos_token_id") or checkpoint.text_config.get("eos_token_id")
    return list(map(int, ends if isinstance(ends, list) else [] if ends is None else [ends]))


def endless(checkpoint: Checkpoint, model: LlamaModel) -> list[int]:
    """Of those the ones that end no answer in llama.cpp, which keeps three beside what it knows by name."""
    return [token for token in ends_of(checkpoint) if token < model.vocabulary and not model.ends(token)]


def _adds_bos(tokenizer: Any) -> bool:
    with_it, without = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    return bool(with_it != without and with_it[:1] == [tokenizer.bos_token_id])


def _space_prefix(content: Mapping[str, Any]) -> bool:
    text = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def _likely(parts: str) -> Iterator[str]:
    """Names to try, those first that a tokenizer of this pre-tokenizer mostly has."""
    first = []
    if "{1,3}" in parts:
        first = ["llama-bpe"]
    elif '"Digits"' in parts:
        first = ["smollm"]
    elif "p{N}" in parts:
        first = ["qwen2"]
    else:
        first = ["gpt-2"]
    yield from dict.fromkeys((*first, *NAMES))


def _difference(checkpoint: Checkpoint, found: Vocabulary, architecture: str, tokenizer: Any) -> str:
    """The first text of which llama.cpp makes other tokens, in words; an empty string where none is. Raises
    ExportError where it makes the same, and ends answers otherwise."""
    import gguf

    with tempfile.TemporaryDirectory(prefix="tiercel-") as made:
        path = Path(made) / "vocabulary.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_block_count(1)
        found.write(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        try:
            with LlamaModel(path, only_vocabulary=True) as model:
                said = other_tokens(checkpoint, tokenizer, model)
                if not said and (lost := endless(checkpoint, model)):
                    raise ExportError(
                        f"{checkpoint.path}/generation_config.json: llama.cpp would write on after token "
                        f"{lost[0]}, which ends one; leave it out of eos_token_id, or serve it with vLLM"
                    )
                return said
        except LlamaError as error:
            return str(error)


def other_tokens(
    checkpoint: Checkpoint, tokenizer: Any, model: LlamaModel, probes: Sequence[str] = PROBES
) -> str:
    """The first text of which llama.cpp makes other tokens than the model's tokenizer; empty where none is.

    Among the texts is a conversation by the chat template, special tokens included.
    """
    rendered = [{"role": "user", "content": PROBES[0]}, {"role": "assistant", "content": PROBES[1]}]
    pairs = [(text, tokenizer.encode(text, add_special_tokens=False)) for text in probes]
    ids = encode_messages(tokenizer, rendered, checkpoint.path)
    pairs.append((tokenizer.apply_chat_template(rendered, tokenize=False), ids))
    for text, ours in pairs:
        theirs, wanted = model.tokenize(text), [int(token) for token in ours]
        if theirs != wanted:
            pairs_of = zip(theirs, wanted, strict=False)
            same = min(len(theirs), len(wanted))
            at = next((n for n, (one, other) in enumerate(pairs_of) if one != other), same)
            part, instead = theirs[at : at + 4], wanted[at : at + 4]
            return f"of {text[:30]!r} from token {at} on {part} instead of {instead}"
    return ""
