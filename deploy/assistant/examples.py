"""Conversations as what a step of training learns: token ids with the loss weight of each, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from deploy.assistant.corpus import intent_messages

IGNORED = -100
"""Target value of positions that carry no loss (torch's cross-entropy convention)."""
WORDS_WEIGHT = 0.1
"""Loss weight of an utterance's own words beside its label's."""

Tokens = list[int]


@dataclass(frozen=True)
class Example:
    """Token ids, and per position the loss weight of predicting that token (0 = not learned)."""

    ids: Tokens
    weights: list[float]


class Encoder:
    """Conversations to examples, with the special tokens that the chat template writes."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        ids = tokenizer.convert_tokens_to_ids
        self.begin, self.end = ids("<|begin|>"), ids("<|end|>")
        self._roles = {role: ids(f"<|{role}|>") for role in ("system", "user", "assistant", "tool")}

    def text(self, text: str) -> Tokens:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def conversation(self, messages: Sequence[dict[str, str]]) -> Example:
        ids, weights = [self.begin], [0.0]
        for message in messages:
            content = [*self.text(message["content"]), self.end]
            learned = 1.0 if message["role"] == "assistant" else 0.0
            ids += [self._roles[message["role"]], *content]
            weights += [0.0, *[learned] * len(content)]
        return Example(ids, weights)

    def utterance(self, words: Tokens, intent: str) -> Example:
        system = self.conversation(intent_messages("")[:1]).ids
        label = [*self.text(intent), self.end]
        ids = [*system, self._roles["user"], *words, self.end, self._roles["assistant"], *label]
        before = len(system) + 1
        weights = [0.0] * before + [WORDS_WEIGHT] * len(words) + [0.0, 0.0] + [1.0] * len(label)
        return Example(ids, weights)


def batch(examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded (ids, targets, weights), each [batch, length]; targets are shifted by one."""
    length = max(len(example.ids) for example in examples) - 1
    ids = torch.zeros(len(examples), length, dtype=torch.long)
    targets = torch.full((len(examples), length), IGNORED, dtype=torch.long)
    weights = torch.zeros(len(examples), length)
    for row, example in enumerate(examples):
        n = len(example.ids) - 1
        ids[row, :n] = torch.tensor(example.ids[:-1])
        targets[row, :n] = torch.tensor(example.ids[1:])
        weights[row, :n] = torch.tensor(example.weights[1:])
    return ids, targets, weights
