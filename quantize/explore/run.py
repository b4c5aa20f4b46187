"""All of it for one model: points one after another, each kept as it is finished."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from tqdm import tqdm

from quantize.core.checkpoint import Checkpoint, CheckpointError, base_sha256
from quantize.core.jsonl import append_kept, read_kept
from quantize.core.modules import Modules, read_modules
from quantize.evaluate.tasks import Item
from quantize.explore.asked import LOGITS_BYTES, Questions, answers, log_probabilities
from quantize.explore.found import WHATS, Exploration, Layers, PointFound, What
from quantize.explore.layers import TOKENS, drift, first_tokens, hidden_states, look
from quantize.explore.rounded import RoundedModel, quantizer_for

if TYPE_CHECKING:
    from torch import Tensor

FORM = 1
"""Raised whenever points or layers are computed in another way: what is kept is then taken anew."""
RUNTIME_BYTES = 700 << 20
"""Of torch and transformers themselves, and of a batch's logits."""


@dataclass(frozen=True)
class Wanted:
    """What is to be looked at."""

    bits: tuple[int, ...]
    roles: Mapping[str, Sequence[Item]]
    journal: Path
    """Lines of finished points; those of another model, other items or another form are passed over."""
    of: tuple[What, ...] = WHATS
    """What is rounded, one after another."""


def needed_bytes(checkpoint: Checkpoint, modules: Modules) -> int:
    """Memory that exploring takes: the model in 32 bits, its largest matrix a few times, inputs of linear
    modules, log-probabilities."""
    parameters = sum(_size(tensor.shape) for tensor in checkpoint.tensors.values())
    largest = max(linear.weights for linear in modules.linears)
    inputs = TOKENS * sum(group.members[0].in_features for group in modules)
    return 4 * (parameters + 12 * largest + 2 * inputs) + 2 * LOGITS_BYTES + RUNTIME_BYTES


def refuse_large(checkpoint: Checkpoint, modules: Modules, available: int | None = None) -> None:
    """Raise CheckpointError, before any work, where the model does not fit into memory."""
    free = psutil.virtual_memory().available if available is None else available
    if (needed := needed_bytes(checkpoint, modules)) > free:
        raise CheckpointError(
            f"{checkpoint.path}: exploring it takes {needed:,} bytes of memory, the model in 32 bits, and "
            f"{free:,} are available; take a machine with more, or explore a smaller model of its family"
        )


def explore(checkpoint: Checkpoint, wanted: Wanted) -> Exploration:
    """Look at everything that is not known yet, with a progress bar. Raises CheckpointError and TaskError."""
    began = time.monotonic()
    modules = read_modules(checkpoint)
    refuse_large(checkpoint, modules)
    questions = Questions(checkpoint, wanted.roles)
    key = _key(checkpoint, wanted.roles)
    kept = [
        entry for entry in read_kept(wanted.journal) if isinstance(entry, dict) and entry.get("key") == key
    ]
    points = {
        (p.what, p.bits): p for p in (PointFound.model_validate(e["point"]) for e in kept if "point" in e)
    }
    layers = next((Layers.model_validate(entry["layers"]) for entry in kept if "layers" in entry), None)
    order: list[tuple[What, int]] = [
        ("nothing", 16),
        *((what, bits) for what in wanted.of for bits in wanted.bits),
    ]
    missing = [one for one in order if one not in points]
    if missing or layers is None:
        run = _Run(RoundedModel(checkpoint, modules), questions)
        wanted.journal.parent.mkdir(parents=True, exist_ok=True)
        steps = len(missing) * run.steps + (len(modules.groups) if layers is None else 0)
        with tqdm(total=steps, desc="explore", unit="step", file=sys.stderr, mininterval=0.5) as bar:
            for what, bits in missing:
                bar.set_postfix_str(f"{what}, {bits} bits")
                points[what, bits] = found = run.point(what, bits, bar.update)
                append_kept(wanted.journal, [{"key": key, "point": found.model_dump()}])
            if layers is None:
                bar.set_postfix_str("layers")
                layers = look(run.rounded, questions.sequences, bar.update)
                append_kept(wanted.journal, [{"key": key, "layers": layers.model_dump()}])
    return Exploration(
        model="/".join(checkpoint.path.resolve().parts[-2:]).lstrip("/"),
        parameters=sum(_size(tensor.shape) for tensor in checkpoint.tensors.values()),
        layers=layers,
        points=tuple(points[one] for one in order),
        items={role: len(items) for role, items in wanted.roles.items()},
        seconds=round(time.monotonic() - began, 1),
    )


class _Run:
    """The model, and what of its reference is compared with: found once, when it is first needed."""

    def __init__(self, rounded: RoundedModel, questions: Questions) -> None:
        self.rounded, self.questions = rounded, questions
        self.steps = 1 + sum(len(asked.items) for asked in questions.roles.values())
        self._sequences = first_tokens(questions.sequences, TOKENS)
        self._clean: tuple[list[Tensor], list[Tensor]] | None = None

    def point(self, what: What, bits: int, done: Callable[[int], object]) -> PointFound:
        clean, states = self._reference()
        with self.rounded.rounded(what, bits):
            depth: tuple[float, ...] = ()
            rows = clean
            if what != "nothing":
                rows = log_probabilities(self.rounded, self.questions.spans)
                depth = drift(states, hidden_states(self.rounded, self._sequences))
            done(1)
            roles = {}
            for role, asked in self.questions.roles.items():
                written = answers(self.rounded, asked, self.questions.ends, done)
                roles[role] = self.questions.judged(role, written)
        return PointFound(
            what=what,
            bits=bits,
            quantizer="" if what == "nothing" else quantizer_for(what, bits),
            **_token_figures(self.questions, clean, rows),
            depth=depth,
            roles=roles,
        )

    def _reference(self) -> tuple[list[Tensor], list[Tensor]]:
        if self._clean is None:
            self._clean = (
                log_probabilities(self.rounded, self.questions.spans),
                hidden_states(self.rounded, self._sequences),
            )
        return self._clean


def _token_figures(questions: Questions, clean: Sequence[Tensor], rows: Sequence[Tensor]) -> dict[str, Any]:
    import torch

    count = sum(len(row) for row in rows)
    loss = kl = same = 0.0
    for (tokens, start), p, q in zip(questions.spans, clean, rows, strict=True):
        came = torch.tensor(tokens[start:]).unsqueeze(1)
        loss -= float(q.gather(1, came).double().sum())
        kl += float((p.exp() * (p - q)).double().sum())
        same += float((p.argmax(-1) == q.argmax(-1)).sum())
    return {"loss": loss / count, "kl": max(0.0, kl / count), "agreement": same / count, "tokens": count}


def _key(checkpoint: Checkpoint, roles: Mapping[str, Sequence[Item]]) -> str:
    """Of the model's files and the items; which bits are wanted is not part of it."""
    listing = {
        "form": FORM,
        "model": base_sha256(checkpoint),
        "roles": {role: [item.model_dump() for item in items] for role, items in roles.items()},
    }
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()[:16]


def _size(shape: Sequence[int]) -> int:
    total = 1
    for one in shape:
        total *= one
    return total
