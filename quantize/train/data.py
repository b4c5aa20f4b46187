"""What is trained on: a role's items, or conversations in the form of OpenAI's chat messages, as JSON Lines.

>>> lines = read_examples(Path("intents.train.jsonl"))
>>> encoded = encode(lines, checkpoint, length=512)
>>> encoded.examples[0].ids, encoded.examples[0].learned

A line is ``{"messages": [..., {"role": "assistant", "content": "…"}]}``, or an item of a role
(:class:`quantize.evaluate.tasks.Item`), whose answer is ``expected``. What is learned is what the assistant
says, up to the token that ends its turn, and nothing else. Everything that is wrong is said before any work.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from quantize.core.checkpoint import Checkpoint
from quantize.core.jsonl import read_json, read_lines
from quantize.core.refusals import first_fault
from quantize.core.tokenizer import load_tokenizer
from quantize.evaluate.tasks import Item
from quantize.train.masks import Encoded, MaskError, learned_tokens

HELD_OUT = 10
"""Of the lines of a file that has none held out, one in so many is."""
FEWEST_HELD_OUT = 8


class DataError(ValueError):
    """Training data cannot be used. The text names the file, the line, the field and the fix."""


class ChatMessage(BaseModel):
    """One of OpenAI's chat messages, text alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None = None
    name: str | None = None
    tool_calls: tuple[dict[str, Any], ...] | None = None
    tool_call_id: str | None = None
    weight: Literal[0, 1] = Field(default=1, description="0: this answer is not learned")


class Chat(BaseModel):
    """A conversation with answers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    messages: tuple[ChatMessage, ...] = Field(min_length=1)
    tools: tuple[dict[str, Any], ...] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _has_an_answer(self) -> Chat:
        answers = [one for one in self.messages if one.role == "assistant" and one.weight]
        if not answers:
            raise ValueError("there is no answer: no message has the role 'assistant' (and a weight of 1)")
        for one in answers:
            if not (one.content or "").strip() and not one.tool_calls:
                raise ValueError("an answer is empty: give the assistant's message content or tool_calls")
        return self


@dataclass(frozen=True)
class Line:
    """One conversation with answers, and the item that it is of, if it is of one."""

    where: str
    messages: tuple[Mapping[str, Any], ...]
    learned: tuple[int, ...]
    """Which messages are answers to be learned."""
    item: Item | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    template: Mapping[str, Any] | None = None

    @property
    def asked(self) -> str:
        """A digest of what is asked before the first answer: two lines of one are the same question."""
        asked = [[one["role"], one.get("content")] for one in self.messages[: self.learned[0]]]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    @property
    def is_plain(self) -> bool:
        """Whether it is made of texts alone, as the template has them where it is told nothing else."""
        return not (self.tools or self.template) and all(
            isinstance(one.get("content"), str) and one.keys() <= {"role", "content"} for one in self.messages
        )


@dataclass(frozen=True)
class Example:
    """Token ids, and which of them are learned. ``is_whole`` unless it lost its end to a length."""

    ids: tuple[int, ...]
    learned: tuple[bool, ...]
    line: Line
    is_whole: bool = True

    @property
    def labels(self) -> int:
        return sum(self.learned)


@dataclass(frozen=True)
class Examples:
    """All examples of a file. ``cut`` is how many lost their end to ``length``."""

    examples: tuple[Example, ...]
    cut: int

    @property
    def sha256(self) -> str:
        """Changes with any token, or what of it is learned."""
        listing = [[one.ids, one.learned] for one in self.examples]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()

    @property
    def tokens(self) -> int:
        return sum(len(one.ids) for one in self.examples)

    @property
    def labels(self) -> int:
        return sum(one.labels for one in self.examples)

    @property
    def longest(self) -> int:
        return max(len(one.ids) for one in self.examples)

    @property
    def most_labels(self) -> int:
        return max(len(one.ids) - one.learned.index(True) for one in self.examples)


def read_examples(path: Path) -> list[Line]:
    """All lines of a file. Raises DataError."""
    try:
        lines = read_lines(path)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; give a file of JSON Lines") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give a file of JSON Lines") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} cannot be read ({error}); save it as UTF-8") from None
    if not lines:
        raise DataError(f'{path} is empty; give lines {{"messages": [{{"role": "user", …}}, …]}}')
    return [_line(f"{path}:{number}", text) for number, text in lines]


def _line(where: str, text: str) -> Line:
    try:
        raw = read_json(text)
    except ValueError as error:
        raise DataError(f"{where}: is not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise DataError(f"{where}: is no JSON object; give {{'messages': […]}}")
    try:
        return of_item(Item.model_validate(raw), where) if "expected" in raw else _of_chat(raw, where)
    except ValidationError as error:
        raise DataError(f"{where}: {first_fault(error)}") from None


def of_item(item: Item, where: str) -> Line:
    """An item with its answer at the end. Raises DataError for one without."""
    if not item.expected.strip():
        raise DataError(f"{where}: expected: there is no answer; give the right one")
    messages = (*item.messages, {"role": "assistant", "content": item.expected})
    return Line(where, messages, (len(messages) - 1,), item, template=item.chat_template_kwargs)


def _of_chat(raw: Mapping[str, Any], where: str) -> Line:
    chat = Chat.model_validate(raw)
    messages = tuple(one.model_dump(exclude_none=True, exclude={"weight"}) for one in chat.messages)
    learned = tuple(n for n, one in enumerate(chat.messages) if one.role == "assistant" and one.weight)
    return Line(where, messages, learned, None, chat.tools, chat.chat_template_kwargs)


def as_item(line: Line) -> Item:
    """An item whose answer is a line's last one. Raises DataError for one that is no text."""
    if line.item is not None:
        return line.item
    asked, answer = line.messages[: line.learned[-1]], line.messages[line.learned[-1]]
    if not answer.get("content") or any(not isinstance(one.get("content"), str) for one in asked):
        raise DataError(f"{line.where}: an answer that judges is text, without calls of tools")
    messages = tuple({"role": str(one["role"]), "content": str(one["content"])} for one in asked)
    kwargs = dict(line.template) if line.template else None
    return Item(messages=messages, expected=str(answer["content"]), chat_template_kwargs=kwargs)


def encode(lines: Sequence[Line], checkpoint: Checkpoint, length: int) -> Examples:
    """Token ids by the checkpoint's own tokenizer and chat template, at most ``length`` of each.

    Raises DataError where the template leaves an answer out, or ``length`` leaves nothing to learn.
    """
    if not lines:
        raise DataError("there is nothing to train on; give some lines")
    tokenizer = load_tokenizer(checkpoint.path)
    examples, cut = [], 0
    for line in lines:
        try:
            found = learned_tokens(
                tokenizer, line.messages, line.learned, line.tools, dict(line.template or {})
            )
        except MaskError as error:
            raise DataError(f"{line.where}: {error}") from None
        cut += len(found.ids) > length
        examples.append(_cut(found, length, line))
    return Examples(tuple(examples), cut)


def _cut(found: Encoded, length: int, line: Line) -> Example:
    ids, learned = found.ids[:length], found.learned[:length]
    if not any(learned):
        needed = found.learned.index(True) + 1
        raise DataError(
            f"{line.where}: its first {length} tokens hold none of the answer, which begins at token "
            f"{needed}; raise --length to {len(found.ids)}, or take the line out"
        )
    return Example(ids, learned, line, len(found.ids) <= length)


def split(lines: Iterable[Line], one_in: int = HELD_OUT) -> tuple[list[Line], list[Line]]:
    """Lines to train on, and those held out: one in so many, by a digest of what they ask, so that the same
    question is on one side, and stays there when more lines come. Raises DataError where too few are."""
    train, held_out = list[Line](), list[Line]()
    for line in lines:
        (held_out if int(line.asked[:8], 16) % one_in == 0 else train).append(line)
    if len(held_out) < FEWEST_HELD_OUT or not train:
        raise DataError(
            f"of {len(train) + len(held_out)} lines {len(held_out)} would be held out to see what training "
            f"does, and {FEWEST_HELD_OUT} are needed; give more lines, or others with --held-out"
        )
    return train, held_out


def refuse_overlap(train: Iterable[Line], held_out: Iterable[Line]) -> None:
    """Raise DataError where what is judged with is trained on."""
    judged = {line.asked: line for line in held_out}
    for line in train:
        if (other := judged.get(line.asked)) is not None:
            raise DataError(
                f"{line.where} asks what {other.where} asks, which judges: a gate would see what was learned "
                "by heart; take it out of one of them (`tiercel train split` divides a file)"
            )
