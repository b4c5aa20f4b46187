"""Which tokens of a conversation are the assistant's own, by the chat template.

Where the template marks them (``{% generation %}``, transformers' assistant mask), its marks are taken, and
the end of the turn that follows them. Else the conversation is rendered up to each answer, with the words
that ask for one, and up to its end; what is between is the answer. The parts are encoded one by one, as an
engine encodes what comes before an answer and writes the answer's tokens after it.

Templates of models that think ask with the beginning of a thought, and may leave thoughts out of what was
said: there an answer begins where question and rendering part, and what is left of it is learned.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MARKS = re.compile(r"{%-?\s*generation\s*-?%}")
THOUGHT_ENDS = ("</think>", "[/THINK]")
"""What ends the thought of an answer, which templates may leave out."""
SHOWN = 40


class MaskError(ValueError):
    """The template does not show where the answers are, or leaves one out."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of a conversation, and which of them are learned."""

    ids: tuple[int, ...]
    learned: tuple[bool, ...]


def learned_tokens(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    answers: Sequence[int],
    tools: Sequence[Mapping[str, Any]] | None,
    kwargs: Mapping[str, Any],
) -> Encoded:
    """Tokens of the conversation up to its last learned answer. ``answers`` are the places of those that are
    learned. Raises MaskError."""
    upto = [dict(one) for one in messages[: answers[-1] + 1]]
    more: dict[str, Any] = {"tools": list(tools)} if tools else {}
    more |= kwargs
    every = [n for n, one in enumerate(upto) if one["role"] == "assistant"]
    if MARKS.search(tokenizer.chat_template) and list(answers) == every:
        return _by_marks(tokenizer, upto, more)
    return _by_rendering(tokenizer, upto, answers, more)


def _by_marks(tokenizer: Any, messages: list[dict[str, Any]], more: Mapping[str, Any]) -> Encoded:
    ids, marks = _marked(tokenizer, messages, more)
    if not any(marks):
        raise MaskError("the chat template marks no token as the assistant's; give its own template")
    own = [one for one, on in zip(ids, marks, strict=True) if on]
    _refuse_lost(tokenizer, tokenizer.decode(own), own, messages[-1])
    answers = [n for n, one in enumerate(messages[:-1]) if one["role"] == "assistant"]
    parts = [_marked(tokenizer, messages[: answer + 1], more) for answer in answers]
    special, last = _special(tokenizer), _last(marks)
    ends = {end for part in (*parts, (ids, marks)) if (end := _end_after(*part, special))}
    learned = list(marks)
    for at in (n for n in range(1, len(ids)) if marks[n - 1] and not marks[n]):
        for end in ends:
            if ids[at : at + len(end)] == end and ids[at - 1] != end[-1]:
                learned[at : at + len(end)] = [True] * len(end)
    if _last(learned) == last and ids[last - 1] not in special and tokenizer.eos_token_id is not None:
        return Encoded((*ids[:last], int(tokenizer.eos_token_id)), (*learned[:last], True))
    return Encoded(ids[: _last(learned)], tuple(learned[: _last(learned)]))


def _marked(
    tokenizer: Any, messages: list[dict[str, Any]], more: Mapping[str, Any]
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Tokens of a conversation, and which of them the template marks."""
    how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    found = _applied(tokenizer, messages, {**how, **more})
    return tuple(map(int, found["input_ids"])), tuple(map(bool, found["assistant_masks"]))


def _last(marks: Sequence[bool]) -> int:
    """The place after the last mark; 0 where there is none."""
    return max((n + 1 for n, on in enumerate(marks) if on), default=0)


def _end_after(ids: tuple[int, ...], marks: Sequence[bool], special: Mapping[int, str]) -> tuple[int, ...]:
    """What ends the turn after a conversation's last mark; empty where the marked tokens end with that."""
    last = _last(marks)
    if last and ids[last - 1] in special:
        return ()
    return next((ids[last : n + 1] for n in range(last, len(ids)) if ids[n] in special), ())


def _by_rendering(
    tokenizer: Any, messages: list[dict[str, Any]], answers: Sequence[int], more: Mapping[str, Any]
) -> Encoded:
    whole = _render(tokenizer, messages, False, more)
    ids, learned, at = list[int](), list[bool](), 0
    for answer in answers:
        upto = _render(tokenizer, messages[: answer + 1], False, more)
        if not whole.startswith(upto):
            raise MaskError(
                f"the chat template writes answer {answer + 1} otherwise when more follows; give each answer "
                "a line of its own, after those before it with a weight of 0"
            )
        begin = _begin(tokenizer, messages, answer, upto, more)
        if begin is None or begin < at:
            raise MaskError(
                f"the chat template writes what is before answer {answer + 1} otherwise when the answer "
                "follows; mark the answers in chat_template.jinja with {% generation %}"
            )
        said = upto[begin:]
        own = _ended(tokenizer, tokenizer.encode(said, add_special_tokens=False))
        _refuse_lost(tokenizer, said, own, messages[answer])
        asked = tokenizer.encode(whole[at:begin], add_special_tokens=False)
        ids += asked + own
        learned += [False] * len(asked) + [True] * len(own)
        rest = said[_end_of(tokenizer, said) :]
        at = len(upto) - len(rest)
    return Encoded(tuple(ids), tuple(learned))


def _begin(
    tokenizer: Any, messages: list[dict[str, Any]], answer: int, upto: str, more: Mapping[str, Any]
) -> int | None:
    """Where an answer begins in the rendering ``upto`` its end: after the words that ask for it, as far as
    they stand there. None where what is before them does not."""
    before = _render(tokenizer, messages[:answer], True, more)
    if upto.startswith(before):
        return len(before)
    plain = _render(tokenizer, messages[:answer], False, more)
    if not (upto.startswith(plain) and before.startswith(plain)):
        return None
    begin = len(plain) + _alike(tokenizer, before[len(plain) :], upto[len(plain) :])
    said = upto.rfind(_kept(messages[answer]))
    return begin if said < len(plain) else min(begin, said)


def _alike(tokenizer: Any, one: str, other: str) -> int:
    """Characters of the whole tokens that two texts begin with alike."""
    first, second = (
        tokenizer(text, add_special_tokens=False, return_offsets_mapping=True) for text in (one, other)
    )
    end = 0
    for mine, others, (_, upto) in zip(
        first["input_ids"], second["input_ids"], second["offset_mapping"], strict=False
    ):
        if mine != others or one[:upto] != other[:upto]:
            break
        end = int(upto)
    return end


def _render(tokenizer: Any, messages: Sequence[Any], asking: bool, more: Mapping[str, Any]) -> str:
    how = {"tokenize": False, "add_generation_prompt": asking}
    return str(_applied(tokenizer, messages, {**how, **more}))


def _applied(tokenizer: Any, messages: Sequence[Any], how: Mapping[str, Any]) -> Any:
    """What the chat template makes of a conversation. Raises MaskError where it refuses it."""
    try:
        return tokenizer.apply_chat_template(list(messages), **how)
    except Exception as error:  # whatever a template raises
        raise MaskError(
            f"the chat template refuses the conversation ({type(error).__name__}: {error}); use roles that "
            "it knows"
        ) from None


def _kept(message: Mapping[str, Any]) -> str:
    """What of an answer a template has to write: all of it but a thought."""
    content = str(message.get("content") or "")
    for end in THOUGHT_ENDS:
        content = content.rpartition(end)[2]
    return content.strip()


def _refuse_lost(tokenizer: Any, said: str, ids: Sequence[int], message: Mapping[str, Any]) -> None:
    """What a template strips at the ends of an answer is no matter, nor that it leaves out a thought."""
    content, kept = str(message.get("content") or "").strip(), _kept(message)
    if kept not in said and " ".join(kept.split()) not in " ".join(said.split()):
        raise MaskError(
            f"the chat template cuts off the answer {content[:SHOWN]!r}: rendered it is {said[:SHOWN]!r}; "
            "put the model's own chat_template.jinja beside it"
        )
    if not kept and not tokenizer.decode(ids, skip_special_tokens=True).strip():
        what = f"the answer {content[:SHOWN]!r}" if content else "an answer that calls tools"
        raise MaskError(
            f"the chat template writes nothing of {what}; say something after the thought, or put the "
            "model's own chat_template.jinja beside it"
        )


def _special(tokenizer: Any) -> dict[int, str]:
    """Special tokens, of which one may end a turn, by id."""
    found = {int(n): str(one) for n, one in tokenizer.added_tokens_decoder.items() if one.special}
    return found | dict(zip(map(int, tokenizer.all_special_ids), tokenizer.all_special_tokens, strict=False))


def _ended(tokenizer: Any, ids: list[int]) -> list[int]:
    """An answer's tokens up to the one that ends its turn; the end is added where the template has none."""
    ends = _special(tokenizer)
    last = next((n for n in range(len(ids) - 1, -1, -1) if ids[n] in ends), None)
    if last is not None:
        return ids[: last + 1]
    return ids if tokenizer.eos_token_id is None else [*ids, int(tokenizer.eos_token_id)]


def _end_of(tokenizer: Any, said: str) -> int:
    """Where, in the text of an answer, its turn has ended: what follows belongs to the next part."""
    found = [said.rfind(one) + len(one) for one in _special(tokenizer).values() if one and one in said]
    return max(found, default=len(said))
