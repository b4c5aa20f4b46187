"""Which tokens of a conversation are the assistant's own, by the chat template.

Where the template marks them (``{% generation %}``, transformers' assistant mask), its marks are taken. Else
the conversation is rendered up to each answer, with the words that ask for one, and up to its end; what is
between is the answer. The parts are encoded one by one, as an engine encodes what comes before an answer and
writes the answer's tokens after it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MARKS = re.compile(r"{%-?\s*generation\s*-?%}")
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
    found = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **more
    )
    ids, mask = tuple(map(int, found["input_ids"])), tuple(map(bool, found["assistant_masks"]))
    if not any(mask):
        raise MaskError("the chat template marks no token as the assistant's; give its own template")
    last = len(mask) - mask[::-1].index(True)
    _refuse_lost(tokenizer.decode([one for one, on in zip(ids, mask, strict=True) if on]), messages[-1])
    return Encoded(ids[:last], mask[:last])


def _by_rendering(
    tokenizer: Any, messages: list[dict[str, Any]], answers: Sequence[int], more: Mapping[str, Any]
) -> Encoded:
    whole = _render(tokenizer, messages, False, more)
    ids, learned, at = list[int](), list[bool](), 0
    for answer in answers:
        before = _render(tokenizer, messages[:answer], True, more)
        upto = _render(tokenizer, messages[: answer + 1], False, more)
        if not upto.startswith(before) or not whole.startswith(upto) or len(before) < at:
            raise MaskError(
                f"the chat template writes what is before answer {answer + 1} otherwise when more follows; "
                "give each answer a line of its own, or chat_template_kwargs such as "
                '{"enable_thinking": false}'
            )
        said = upto[len(before) :]
        _refuse_lost(said, messages[answer])
        asked = tokenizer.encode(whole[at : len(before)], add_special_tokens=False)
        own = _ended(tokenizer, tokenizer.encode(said, add_special_tokens=False))
        ids += asked + own
        learned += [False] * len(asked) + [True] * len(own)
        rest = said[_end_of(tokenizer, said) :]
        at = len(upto) - len(rest)
    return Encoded(tuple(ids), tuple(learned))


def _render(tokenizer: Any, messages: Sequence[Any], asking: bool, more: Mapping[str, Any]) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=asking, **more
            )
        )
    except Exception as error:  # whatever a template raises
        raise MaskError(
            f"the chat template refuses the conversation ({type(error).__name__}: {error}); use roles that "
            "it knows"
        ) from None


def _refuse_lost(said: str, message: Mapping[str, Any]) -> None:
    """What a template strips at the ends of an answer is no matter."""
    content = str(message.get("content") or "").strip()
    if content and content not in said and " ".join(content.split()) not in " ".join(said.split()):
        raise MaskError(
            f"the chat template cuts off the answer {content[:SHOWN]!r}: rendered it is {said[:SHOWN]!r}; "
            "put the model's own chat_template.jinja beside it"
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
