"""The loss of examples, and whether a model gives their answers: what training follows and is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantize.make.blocks import batched
from quantize.train.data import Example

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NOTHING = -100
"""What torch's cross entropy passes over."""


@dataclass
class Portion:
    """Examples side by side, padded on the left, so that answers end together: logits are computed for few
    places alone. ``keep`` are the places whose next token is learned in any of them."""

    ids: Tensor
    mask: Tensor
    positions: Tensor
    keep: Tensor
    targets: Tensor

    @property
    def labels(self) -> int:
        return int((self.targets != NOTHING).sum())


def portion_of(examples: Sequence[Example], device: torch.device) -> Portion:
    """Tensors of some examples: (examples, tokens), and targets (examples, places)."""
    import torch

    width = max(len(one.ids) for one in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    mask, targets = torch.zeros_like(ids), torch.full_like(ids, NOTHING)
    for row, one in enumerate(examples):
        at = width - len(one.ids)
        ids[row, at:] = torch.tensor(one.ids)
        mask[row, at:] = 1
        learned = torch.tensor(one.learned)
        targets[row, at:][learned] = ids[row, at:][learned]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    keep = (targets != NOTHING).any(0).nonzero()[:, 0] - 1
    keep = keep[keep >= 0]
    wanted = targets[:, keep + 1]
    return Portion(*(one.to(device) for one in (ids, mask, positions, keep, wanted)))


def logits_of(model: Any, portion: Portion) -> Tensor:
    """(examples, places, vocabulary) of the places that are kept, in 32 bits."""
    found: Tensor = model(
        input_ids=portion.ids,
        attention_mask=portion.mask,
        position_ids=portion.positions,
        logits_to_keep=portion.keep,
        use_cache=False,
    ).logits
    return found.float()


def loss_of(model: Any, examples: Sequence[Example], device: torch.device) -> tuple[Tensor, float]:
    """The sum of the learned tokens' negative log-probabilities, nats, and how many there are."""
    from torch.nn.functional import cross_entropy

    portion = portion_of(examples, device)
    logits = logits_of(model, portion)
    total = cross_entropy(
        logits.flatten(0, 1), portion.targets.flatten(), ignore_index=NOTHING, reduction="sum"
    )
    return total, float(portion.labels)


@dataclass(frozen=True)
class Judged:
    """Held-out examples: mean loss of their learned tokens, nats, and which answers are right."""

    loss: float
    right: tuple[bool, ...]

    @property
    def share(self) -> float:
        return sum(self.right) / len(self.right)


def judge(model: Any, examples: Sequence[Example], tokenizer: Any, device: torch.device, room: int) -> Judged:
    """Loss and right answers of held-out examples; ``room`` is how many padded tokens go at once.

    An answer that is compared as a whole is right where every token of it is the likeliest after those before
    it: then it is what is written greedily. An item with another check is answered, and the check asked.
    """
    import torch

    was_training = model.training
    model.eval()
    total = count = 0.0
    right = [False] * len(examples)
    ends = _ends(examples, tokenizer)
    try:
        with torch.inference_mode():
            for numbers in batched([len(one.ids) for one in examples], room):
                some = [examples[number] for number in numbers]
                portion = portion_of(some, device)
                logits = logits_of(model, portion)
                came = logits.log_softmax(-1).gather(2, portion.targets.clamp_min(0)[..., None])[..., 0]
                learned = portion.targets != NOTHING
                total -= float(came[learned].sum())
                count += float(learned.sum())
                same = ((logits.argmax(-1) == portion.targets) | ~learned).all(1).tolist()
                for number, one in zip(numbers, same, strict=True):
                    right[number] = one
            for number in (n for n, one in enumerate(examples) if _is_asked(one)):
                right[number] = _answers(model, examples[number], tokenizer, device, ends)
    finally:
        model.train(was_training)
    return Judged(total / max(count, 1.0), tuple(right))


def _ends(examples: Sequence[Example], tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the last ones of examples that were not cut, or else the tokenizer's."""
    found = sorted({one.ids[-1] for one in examples if one.is_whole})
    return found or ([] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)])


def _is_asked(example: Example) -> bool:
    item = example.line.item
    return item is not None and item.check in ("contains", "json")


def _answers(model: Any, example: Example, tokenizer: Any, device: torch.device, ends: Sequence[int]) -> bool:
    """Whether the answer that is written greedily passes the item's check."""
    import torch

    item = example.line.item
    assert item is not None
    asked = example.ids[: example.learned.index(True)]
    ids = torch.tensor([asked], device=device)
    wanted = {"max_new_tokens": item.max_tokens, "do_sample": False, "use_cache": True}
    written = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else 0,
        **wanted,
    )
    return item.is_right(tokenizer.decode(written[0, len(asked) :], skip_special_tokens=True))
