"""A model beside the one that it was made of, on the same tokens: block by block, so that any size fits.

Simulated in the type that is served, without an engine: it says whether a step is worth a gate."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from quantize.core.checkpoint import Checkpoint
from quantize.core.modules import read_modules
from quantize.evaluate.bench import Span
from quantize.make.blocks import Blocks, States

MOST_TOKENS = 4000


class Compared(BaseModel):
    """Means per token, nats."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    loss_before: float
    loss_after: float
    kl: float = Field(description="KL(before || after)")
    agreement: float = Field(description="share of tokens with the same first choice")
    tokens: int


def compare(before: Checkpoint, after: Checkpoint, spans: Sequence[Span]) -> Compared:
    """What both models make of the same tokens; of a span, those from its start (1 or more) on."""
    import torch

    chosen = _first(spans)
    one, theirs = _last_states(before, [tokens for tokens, _ in chosen])
    other, ours = _last_states(after, [tokens for tokens, _ in chosen])
    sums = [0.0, 0.0, 0.0, 0.0]
    count = 0
    with one.head_only() as logits_one, other.head_only() as logits_other, torch.inference_mode():
        for mine, its in zip(theirs.batches, ours.batches, strict=True):
            ids, start = chosen[mine.numbers[0]]
            tokens = torch.tensor(list(ids)[start:]).unsqueeze(1)
            p = torch.log_softmax(logits_one(mine.hidden[:, start - 1 : -1])[0].float(), -1).cpu()
            q = torch.log_softmax(logits_other(its.hidden[:, start - 1 : -1])[0].float(), -1).cpu()
            sums[0] -= float(p.gather(1, tokens).double().sum())
            sums[1] -= float(q.gather(1, tokens).double().sum())
            sums[2] += float((p.exp() * (p - q)).double().sum())
            sums[3] += float((p.argmax(-1) == q.argmax(-1)).sum())
            count += len(tokens)
    return Compared(
        loss_before=sums[0] / count,
        loss_after=sums[1] / count,
        kl=max(0.0, sums[2] / count),
        agreement=sums[3] / count,
        tokens=count,
    )


def _last_states(checkpoint: Checkpoint, sequences: Sequence[Sequence[int]]) -> tuple[Blocks, States]:
    blocks = Blocks(checkpoint, read_modules(checkpoint))
    states = blocks.start(sequences, alone=True)
    for layer in range(len(blocks)):
        with blocks.loaded(layer):
            blocks.forward(layer, states)
    return blocks, states


def _first(spans: Sequence[Span]) -> list[Span]:
    """As many as hold ``MOST_TOKENS`` tokens; at least one."""
    found: list[Span] = []
    total = 0
    for tokens, start in spans:
        if len(tokens) <= start:
            continue
        if found and total + len(tokens) > MOST_TOKENS:
            break
        found.append((tokens, start))
        total += len(tokens)
    return found
