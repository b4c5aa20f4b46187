"""A text classifier on an encoder: one linear layer on the mean of its hidden states, trained here.

The encoder stays as it is, so that training is one pass over the texts and a convex problem after it:
multinomial logistic regression, solved by L-BFGS. The result is a directory like the encoder's, with the
layer among its tensors, its labels in the configuration, and a chat template that passes the last user's
message on: a model of the fleet like any other, whose answer is the label.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.core.companions import companion_files
from quantize.core.files import write_whole
from quantize.export.encoder import BATCH, HEAD, Encoder, Tokens, load_encoder, mean_of, open_encoder, padded
from quantize.export.types import ExportError

if TYPE_CHECKING:
    from torch import Tensor

TEMPLATE = (
    "{%- for message in messages if message.role == 'user' -%}{%- if loop.last -%}{{ message.content }}"
    "{%- endif -%}{%- endfor -%}\n"
)
"""Whatever else is said, the last user's message is what is classified."""
DECAY = 1e-5
"""Of the squared weights, in the sum that is made small."""
STEPS = 300
FEWEST = 2
"""Texts of a label, and labels."""
HELD_OUT = 5
"""Every so many texts of a label one is held out, by which the classifier is known before it is measured."""


@dataclass(frozen=True)
class Trained:
    """What came of it. Shares of right labels are of texts that training saw, and of those held out."""

    directory: Path
    labels: int
    texts: int
    seen: float
    held_out: float | None
    """None where no label has texts enough that one is held out."""


def train_classifier(encoder: Encoder, rows: Sequence[tuple[str, str]], out: Path) -> Trained:
    """Write the classifier of ``rows``, texts and labels, to the directory ``out``. Raises ExportError."""
    import torch

    if encoder.labels:
        raise ExportError(f"{encoder.path} is a classifier already; give the encoder that it was made from")
    if out.exists() and any(out.iterdir()):
        raise ExportError(f"{out} is not empty; give another directory")
    counts = Counter(label for _, label in rows)
    if few := [label for label, count in counts.items() if count < FEWEST]:
        raise ExportError(f"label {few[0]!r} has {counts[few[0]]} text; give each at least {FEWEST}")
    if len(counts) < FEWEST:
        raise ExportError(f"the rows have {len(counts)} labels; a classifier needs at least {FEWEST}")
    labels = sorted(counts)
    model, tokens = load_encoder(encoder), Tokens(encoder)
    embedded = embeddings(model, [tokens.whole(text) for text, _ in rows])
    targets = torch.tensor([labels.index(label) for _, label in rows])
    held = _held_out(targets)
    weight, bias = _solved(embedded[~held], targets[~held], len(labels))

    def share(which: Tensor) -> float:
        chosen = (embedded[which] @ weight.T + bias).argmax(-1)
        return float((chosen == targets[which]).float().mean())

    seen, unseen = share(~held), share(held) if bool(held.any()) else None
    weight, bias = _solved(embedded, targets, len(labels))  # what is kept learns from all of them
    partial = out.with_name(f".partial-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(encoder, labels, weight, bias, partial)
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Trained(out, len(labels), len(rows), seen, unseen)


def embeddings(model: Any, ids: Sequence[Sequence[int]]) -> Tensor:
    """(n, width) of texts' token ids, by torch."""
    import torch

    order = sorted(range(len(ids)), key=lambda at: len(ids[at]))
    parts = []
    with torch.no_grad():
        for at in range(0, len(order), BATCH):
            given = {
                k: torch.from_numpy(v) for k, v in padded([ids[n] for n in order[at : at + BATCH]]).items()
            }
            parts.append(mean_of(model(**given).last_hidden_state, given["attention_mask"]))
    found = torch.cat(parts)
    return found[torch.argsort(torch.tensor(order))]


def _held_out(targets: Tensor) -> Tensor:
    """Which rows are held out: every fifth of each label."""
    import torch

    seen: Counter[int] = Counter()
    held = torch.zeros(len(targets), dtype=torch.bool)
    for at, target in enumerate(targets.tolist()):
        seen[target] += 1
        held[at] = seen[target] % HELD_OUT == 0
    return held


def _solved(x: Tensor, targets: Tensor, labels: int) -> tuple[Tensor, Tensor]:
    """Weight (labels, width) and bias of the least cross-entropy."""
    import torch

    weight = torch.zeros(labels, x.shape[1], requires_grad=True)
    bias = torch.zeros(labels, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Any:
        solver.zero_grad()
        found = (
            torch.nn.functional.cross_entropy(x @ weight.T + bias, targets) + DECAY * weight.square().sum()
        )
        found.backward()  # type: ignore[no-untyped-call]
        return found

    solver.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def _write(encoder: Encoder, labels: Sequence[str], weight: Tensor, bias: Tensor, out: Path) -> None:
    from safetensors.torch import load_file, save_file

    out.mkdir(parents=True, exist_ok=True)
    tensors = load_file(encoder.path / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler.")}
    tensors |= dict(zip(HEAD, (weight.contiguous(), bias.contiguous()), strict=True))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for name in companion_files(encoder.path):
        if name.name not in ("chat_template.jinja", "generation_config.json"):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(encoder.path / name, out / name)
    write_whole(out / "chat_template.jinja", TEMPLATE)
    named = {str(number): label for number, label in enumerate(labels)}
    config = {**encoder.config, "classifier_on": "mean", "id2label": named}
    write_whole(out / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    open_encoder(out)
