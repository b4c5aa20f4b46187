"""Right answers in their conversations, as an engine's chat template renders them: which tokens are the
answer's, and whether a variant's are the reference's.

Mostly what is rendered of a conversation begins with the words that ask for its answer, and the rest is the
answer. Templates of models that think ask with the beginning of a thought that they leave out of what was
said; others write what was asked otherwise once an answer follows; and a space at the end of the words that
ask becomes part of the answer's first token.
"""

from __future__ import annotations

from collections.abc import Sequence

from quantize.core.tokenizer import alike
from quantize.evaluate.client import EngineClient, EngineError
from quantize.evaluate.reference import ReferenceFile, span_sha256
from quantize.evaluate.tasks import Item, TaskError

Part = tuple[int, list[int], int]
"""An item's place in its list, tokens of its conversation, and the first of them that is the answer's, or
scored."""
DATED = 256
"""Tokens of a prompt in which two renderings of it may differ: a date, or two and the text between them."""
DATES = 4
"""Such differences among all items of a role: one, unless an engine was asked before and after midnight. Of
another tokenizer there are as many as items."""


async def right_answer(client: EngineClient, item: Item, role: str, index: int) -> Part:
    """The item's right answer in its conversation, and where it begins.

    Where what is rendered does not begin with the words that ask, the answer begins where the two part; where
    what was asked is written otherwise when an answer follows, the answer is put after the words that ask.
    Raises TaskError where nothing of it is left.
    """
    more = item.chat_template_kwargs
    prompt = await client.tokenize(item.messages, True, more)
    if item.expected_tokens:
        return index, [*prompt, *item.expected_tokens], len(prompt)

    async def answered(text: str) -> list[int]:
        return await client.tokenize([*item.messages, {"role": "assistant", "content": text}], template=more)

    whole = await answered(item.expected)
    tokens, start = whole, alike(prompt, whole)
    if start < len(prompt) and item.expected.strip():
        try:
            own = alike(await answered(""), whole)
        except EngineError as error:
            if " answered 4" not in str(error):  # the template may want every message to say something
                raise
            own = 0
        if own > start:
            tokens, start = [*prompt, *whole[own:]], len(prompt)
    if start >= len(tokens):
        raise TaskError(
            f"tasks of role {role}, item {index + 1}: the chat template renders nothing of the right answer "
            f"{item.expected[:40]!r}, so that it cannot be scored; give another one, or chat_template_kwargs"
        )
    return index, tokens, start


def as_kept(kept: ReferenceFile, role: str, answers: Sequence[Part], stretches: Sequence[Part]) -> list[Part]:
    """The stretches of a variant's ``answers`` that were scored of the reference, in the reference's tokens.

    A chat template may write today's date: what was asked of the reference on another day differs in that
    alone, and the variant is scored after the reference's date. Raises TaskError for any other difference.
    """
    found: list[Part] = []
    dates: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    for (index, whole, answer), (_, tokens, start) in zip(answers, stretches, strict=True):
        known = kept.tokens_sha256(role, index)
        if known is None:
            raise TaskError(
                f"tasks of role {role}, item {index + 1}: {kept.path} holds nothing of its right answer; "
                "measure the reference first"
            )
        if known == span_sha256(tokens, start):
            found.append((index, tokens, start))
            continue
        span = kept.span(role, index)
        date = _other_date(*span, whole, answer) if span else None
        dates |= {date} if date else set()
        if span is None or date is None or len(dates) > DATES:
            older = f", or remove {kept.path}, which an older version wrote, and measure again"
            raise TaskError(
                f"tasks of role {role}, item {index + 1}: the variant's tokenizer splits the right answer, "
                "or what was asked, in another way than the reference's; make the variant from the "
                f"reference's checkpoint{'' if span else older}"
            )
        found.append((index, *span))
    return found


def _other_date(
    kept: Sequence[int], start: int, whole: Sequence[int], answer: int
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The one short stretch of what was asked in which a conversation differs from the one that was ``kept``
    up to the end of its scored tokens, from ``start`` on; None where more differs."""
    begin = alike(kept, whole)

    def differ(longer: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """The same where the conversation is that many tokens longer."""
        if start + longer < answer or len(kept) + longer > len(whole):
            return None
        end = len(kept)
        while end > begin and end + longer > begin and kept[end - 1] == whole[end + longer - 1]:
            end -= 1
        if end > start or end + longer > answer or max(end, end + longer) - begin > DATED:
            return None
        return tuple(kept[begin:end]), tuple(whole[begin : end + longer])

    found = filter(None, map(differ, range(-DATED, DATED + 1)))
    return min(found, key=lambda pair: len(pair[0]) + len(pair[1]), default=None)
