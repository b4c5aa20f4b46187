"""A checkpoint's tokenizer, loaded as an engine loads it, and what can be wrong with it before any work.

A tokenizer that loads may still lose spaces, or know other words than the model. Both are seen at once in a
round trip, decode(encode(x)), and in what the reference's engine makes of the same texts.

Some chat templates write today's date (``strftime_now``). Here it is always :data:`CLOCK`: what is calibrated
and trained must be the same tomorrow, and so must the digests by which it is found again.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from quantize.core.checkpoint import Checkpoint
from quantize.core.companions import chat_template, wrong_class
from quantize.core.model_config import first_line, quiet_transformers
from quantize.core.weights import CheckpointError

Message = dict[str, str]
Tokenize = Callable[[Sequence[Message]], Awaitable[Sequence[int]]]
"""An engine's tokens of a conversation: ``EngineClient.tokenize``."""

TEXTS = (
    "The quick brown fox jumps over the lazy dog, 1234567890 times.",
    "two  spaces,   three, a tab\tand\na new line\n\n  indented",
    "def f(x: int) -> dict[str, int]:\n    return {'a': x ** 2}  # done\n",
    "Größe, naïve, Zażółć gęślą jaźń",
    "Привет, мир. 你好。世界。 こんにちは",
    "tea ☕ and a family 👩‍👩‍👧",
)
"""Round trips are made of these; the last three may hold characters that a small vocabulary lacks."""
CLOCK = datetime(2024, 7, 26, 23, 45)
"""The time that templates are told; the date is the one that Llama's write where nobody tells them."""
OTHER_CLOCK = datetime(1999, 12, 13, 10, 56)
"""Differs in every digit, by which it is seen where a template writes the time."""


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a checkpoint directory, whose chat template always sees the same time. Raises
    CheckpointError when it cannot be loaded, or has no chat template."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    loader = PreTrainedTokenizerFast if wrong_class(path) is not None else AutoTokenizer
    try:
        with quiet_transformers():
            tokenizer = loader.from_pretrained(path, local_files_only=True)
    except Exception as error:  # whatever transformers raises, the files are at fault
        raise CheckpointError(
            f"{path}: transformers cannot load the tokenizer ({first_line(error)}); download it again"
        ) from None
    if not tokenizer.chat_template:
        tokenizer.chat_template = chat_template(path)
    if not tokenizer.chat_template:
        raise CheckpointError(
            f"{path}: the tokenizer has no chat template; add chat_template.jinja beside it"
        )
    if _asks_the_time(tokenizer):
        # What a template is given by name goes before what transformers' environment has of that name.
        tokenizer.apply_chat_template = functools.partial(
            tokenizer.apply_chat_template, strftime_now=CLOCK.strftime
        )
    # Sequences are cut where they are too long; transformers would warn of errors that do not come.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def refuse_bad_tokenizer(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError when text does not come back from the tokenizer, when the chat template cannot be
    rendered, or when either comes to ids that the model has no embedding for."""
    tokenizer = load_tokenizer(checkpoint.path)
    vocabulary = int(checkpoint.text_config["vocab_size"])
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        _refuse_large(checkpoint, ids, vocabulary, f"{text[:30]!r}")
        with quiet_transformers():
            again = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if _plain(again) == _plain(text) or tokenizer.unk_token_id in ids:
            continue
        raise CheckpointError(
            f"{checkpoint.path}: the tokenizer turns {text[:40]!r} into {again[:40]!r}"
            f"{_class_fix(checkpoint.path, tokenizer)}"
        )
    ids = encode_messages(tokenizer, [{"role": "user", "content": TEXTS[0]}], checkpoint.path)
    _refuse_large(checkpoint, ids, vocabulary, "the chat template")


def _asks_the_time(tokenizer: Any) -> bool:
    return "strftime_now" in str(tokenizer.chat_template)


def encode_messages(tokenizer: Any, messages: Sequence[Message], path: Path, **more: Any) -> list[int]:
    """Token ids of a conversation by the chat template, which is told ``more``. Raises CheckpointError when
    that refuses it."""
    try:
        encoded = tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True, **more)
    except Exception as error:  # whatever a template raises
        raise CheckpointError(
            f"{path}: the chat template cannot be rendered ({type(error).__name__}: {error}); "
            "put the model's own beside it"
        ) from None
    return [int(token) for token in encoded["input_ids"]]


def _plain(text: str) -> str:
    """Without the space that SentencePiece puts in front."""
    return text.removeprefix(" ")


def _class_fix(path: Path, tokenizer: Any) -> str:
    """What mends a tokenizer that loses text: the class that reads the file as it is, where that helps."""
    file = path / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer

        raw = Tokenizer.from_file(str(file))
        encoded = {text: raw.encode(text, add_special_tokens=False).ids for text in TEXTS[:3]}
        if all(_plain(raw.decode(ids, skip_special_tokens=False)) == text for text, ids in encoded.items()):
            return (
                f" under the class {type(tokenizer).__name__}, and not by tokenizer.json alone; "
                "set tokenizer_class to PreTrainedTokenizerFast in tokenizer_config.json"
            )
    return "; download the model's own tokenizer"


def _refuse_large(checkpoint: Checkpoint, ids: Sequence[int], vocabulary: int, what: str) -> None:
    if (largest := max(ids, default=0)) >= vocabulary:
        raise CheckpointError(
            f"{checkpoint.path}: the tokenizer makes id {largest} of {what}, the model's vocab_size is "
            f"{vocabulary}; put the model's own tokenizer beside it"
        )


async def tokenizer_differences(checkpoint: Checkpoint, tokenize: Tokenize) -> tuple[str, ...]:
    """Where an engine makes other tokens of a conversation than the checkpoint's tokenizer, a sentence each.

    ``tokenize`` is the engine's way, such as ``EngineClient.tokenize``, which adds no generation prompt. What
    is calibrated, scored and served must be the same text, so that ids are compared and nothing else. Where
    the template writes the time, the engine's is another one: what is before and after it is compared.
    """
    tokenizer = load_tokenizer(checkpoint.path)
    found = []
    for text in TEXTS:
        messages = [{"role": "user", "content": text}]
        ours = encode_messages(tokenizer, messages, checkpoint.path)
        theirs = [int(token) for token in await tokenize(messages)]
        if _asks_the_time(tokenizer):
            then = encode_messages(tokenizer, messages, checkpoint.path, strftime_now=OTHER_CLOCK.strftime)
            theirs = _at_our_time(ours, then, theirs)
        if ours != theirs:
            at = alike(ours, theirs)
            found.append(
                f"{text[:30]!r} is {len(theirs)} tokens to the engine and {len(ours)} to {checkpoint.path}, "
                f"different from token {at} on: {tokenizer.decode(theirs[at : at + 4])!r} for "
                f"{tokenizer.decode(ours[at : at + 4])!r}"
            )
    return tuple(found)


def _at_our_time(ours: list[int], then: list[int], theirs: list[int]) -> list[int]:
    """``theirs`` with our time in the place of another, which is where ``ours`` differs from what it is at
    another time; as it is where what is before differs."""
    if ours == then:
        return theirs
    before, after = alike(ours, then), alike(ours[::-1], then[::-1])
    if theirs[:before] != ours[:before] or len(theirs) < before + after:
        return theirs
    return ours[: len(ours) - after] + theirs[len(theirs) - after :]


def alike(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens with which both begin."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (mine, its) in enumerate(pairs) if mine != its), min(len(one), len(other)))
