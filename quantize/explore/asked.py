"""What a model is asked: right answers to score, conversations to answer greedily; and how it is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantize.core.checkpoint import Checkpoint
from quantize.core.tokenizer import load_tokenizer
from quantize.evaluate.grounding import Grounding
from quantize.evaluate.tasks import Item, TaskError
from quantize.explore.found import RoleAnswers
from quantize.explore.rounded import RoundedModel
from quantize.make.blocks import batched

if TYPE_CHECKING:
    from torch import Tensor

LOGITS_BYTES = 256 << 20
"""Of the reference's log-probabilities, which are kept; so many tokens are scored at most."""
SCORED_TOKENS = 1000
BATCH_TOKENS = 1024
"""Padded tokens of a batch whose logits are computed."""
ANSWERED_TOGETHER = 32
SAMPLES = 3


@dataclass(frozen=True)
class Asked:
    """A role's items as token ids: prompts, and (tokens, where the right answer begins) to score."""

    items: tuple[Item, ...]
    prompts: tuple[tuple[int, ...], ...]
    spans: tuple[tuple[tuple[int, ...], int], ...]


class Questions:
    """Everything that is asked of one model. Raises TaskError for items that it cannot be asked."""

    def __init__(self, checkpoint: Checkpoint, roles: Mapping[str, Sequence[Item]]) -> None:
        if not roles:
            raise TaskError("no role with items to ask; name roles whose items have grounds")
        self.tokenizer = load_tokenizer(checkpoint.path)
        vocabulary = int(checkpoint.text_config["vocab_size"])
        self._context = checkpoint.max_model_len
        self.roles = {role: self._asked(role, items) for role, items in roles.items()}
        most = min(SCORED_TOKENS, LOGITS_BYTES // (4 * vocabulary))
        self.spans = _cut([span for asked in self.roles.values() for span in asked.spans], most)
        self.ends = _ends(checkpoint, self.tokenizer)
        self._grounding = {role: Grounding(asked.items) for role, asked in self.roles.items()}

    def _asked(self, role: str, items: Sequence[Item]) -> Asked:
        prompts, spans = [], []
        for number, item in enumerate(items, 1):
            prompt = self._encode(item, ())
            whole = self._encode(item, ({"role": "assistant", "content": item.expected},))
            if whole[: len(prompt)] != prompt:  # a template that writes something else before an answer
                words = self.tokenizer.encode(item.expected, add_special_tokens=False)
                whole = (*prompt, *words)
            if len(prompt) + item.max_tokens > self._context:
                raise TaskError(
                    f"tasks of role {role}, item {number}: {len(prompt)} tokens and an answer of "
                    f"{item.max_tokens} do not fit the model's {self._context}; leave the role out"
                )
            prompts.append(prompt)
            spans.append((whole, len(prompt)))
        return Asked(tuple(items), tuple(prompts), tuple(spans))

    def _encode(self, item: Item, more: tuple[dict[str, str], ...]) -> tuple[int, ...]:
        try:
            encoded = self.tokenizer.apply_chat_template(
                [*item.messages, *more],
                tokenize=True,
                return_dict=True,
                add_generation_prompt=not more,
                **(item.chat_template_kwargs or {}),
            )
        except Exception as error:  # whatever a template raises
            raise TaskError(
                f"the chat template refuses an item ({type(error).__name__}: {error}); leave its role out"
            ) from None
        return tuple(int(token) for token in encoded["input_ids"])

    @property
    def sequences(self) -> list[tuple[int, ...]]:
        """Whole conversations, role by role in turns."""
        lists = [[tokens for tokens, _ in asked.spans] for asked in self.roles.values()]
        longest = max(map(len, lists), default=0)
        return [one[number] for number in range(longest) for one in lists if number < len(one)]

    def judged(self, role: str, answers: Sequence[Sequence[int]]) -> RoleAnswers:
        """Answers as token ids, judged."""
        items, grounding = self.roles[role].items, self._grounding[role]
        texts = [self.tokenizer.decode(list(ids), skip_special_tokens=True) for ids in answers]
        pairs = list(zip(items, texts, strict=True))
        return RoleAnswers(
            right=tuple(item.is_right(text) for item, text in pairs),
            invented=tuple(bool(grounding.invented(item, text)) for item, text in pairs),
            values=tuple(bool(grounding.invented_values(item, text)) for item, text in pairs),
            samples=tuple(texts[:SAMPLES]),
        )


def _cut(spans: Sequence[tuple[tuple[int, ...], int]], most: int) -> list[tuple[tuple[int, ...], int]]:
    """Spans in order until ``most`` tokens are scored; the first one at any rate."""
    found: list[tuple[tuple[int, ...], int]] = []
    total = 0
    # Roles come one after another: taken in turns of a fixed step, all are in what is kept.
    for number in sorted(range(len(spans)), key=lambda one: (one % 7, one)):
        tokens, start = spans[number]
        if found and total + len(tokens) - start > most:
            break
        found.append(spans[number])
        total += len(tokens) - start
    return found


def _ends(checkpoint: Checkpoint, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer."""
    from quantize.core.companions import read_object

    named = read_object(checkpoint.path / "generation_config.json").get("eos_token_id")
    named = named if named is not None else checkpoint.text_config.get("eos_token_id")
    found = set(named if isinstance(named, list) else [named]) - {None}
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return frozenset(int(token) for token in found)


def log_probabilities(rounded: RoundedModel, spans: Sequence[tuple[tuple[int, ...], int]]) -> list[Tensor]:
    """Per span (scored tokens, vocabulary), float32: padded on the right, where a causal model does not
    look."""
    import torch

    rows: dict[int, Tensor] = {}
    with torch.inference_mode():
        for batch in batched([len(tokens) for tokens, _ in spans], BATCH_TOKENS):
            width = max(len(spans[number][0]) for number in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            for line, number in enumerate(batch):
                tokens = spans[number][0]
                ids[line, : len(tokens)] = torch.tensor(tokens)
            logits = rounded.model(ids, past_key_values=rounded.cache(), use_cache=True).logits
            for line, number in enumerate(batch):
                tokens, start = spans[number]
                rows[number] = torch.log_softmax(logits[line, start - 1 : len(tokens) - 1].float(), -1)
    return [rows[number] for number in range(len(spans))]


def answers(
    rounded: RoundedModel, asked: Asked, ends: frozenset[int], done: Callable[[int], object]
) -> list[list[int]]:
    """Greedy answers to a role's items, as token ids; ``done`` is told how many more there are."""
    found: dict[int, list[int]] = {}
    order = sorted(range(len(asked.items)), key=lambda one: len(asked.prompts[one]))
    for at in range(0, len(order), ANSWERED_TOGETHER):
        numbers = order[at : at + ANSWERED_TOGETHER]
        limits = [asked.items[number].max_tokens for number in numbers]
        written = _written(rounded, [asked.prompts[number] for number in numbers], limits, ends)
        found |= dict(zip(numbers, written, strict=True))
        done(len(numbers))
    return [found[number] for number in range(len(order))]


def _written(
    rounded: RoundedModel, prompts: Sequence[Sequence[int]], limits: Sequence[int], ends: frozenset[int]
) -> list[list[int]]:
    """Prompts side by side, padded on the left; each ends at a token of ``ends``, or at its limit."""
    import torch

    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for line, prompt in enumerate(prompts):
        ids[line, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[line, width - len(prompt) :] = 1
    cache, written = rounded.cache(), [list[int]() for _ in prompts]
    running = [True] * len(prompts)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.inference_mode():
        while any(running):
            logits = rounded.model(
                ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
                logits_to_keep=1,
            ).logits  # fmt: skip
            chosen = logits[:, -1].argmax(-1)
            for line, token in enumerate(chosen.tolist()):
                if running[line] and token in ends:
                    running[line] = False
                elif running[line]:
                    written[line].append(token)
                    running[line] = len(written[line]) < limits[line]
            ids, positions = chosen.unsqueeze(1), positions[:, -1:] + 1
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return written
