"""Quantization-aware training of a quantized checkpoint: what is asked, what it takes, and its two stages.

>>> work = Work(checkpoint, modules, plan, base, original, text, choosing, directory, run={"data": digest})
>>> refuse_no_room(work, settings)
>>> with trained(work, settings) as (student, report):
...     export(student, copy_of_base)

Stage one goes block by block (:mod:`quantize.train.qat_blocks`), stage two trains all of it
(:mod:`quantize.train.qat_distill`). Both are kept in ``directory`` and gone on from after a stop.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.core.checkpoint import Checkpoint
from quantize.core.legality import is_experts
from quantize.core.modules import HEAD, Group, Linear, Modules
from quantize.core.plan import Plan
from quantize.core.schemes import BF16_BYTES, Numbers, scheme
from quantize.core.tensors import read_parts
from quantize.cost import LIBRARIES_BYTES
from quantize.train.loop import Outcome, Place, Settings, TrainError

if TYPE_CHECKING:
    from torch import Tensor

    from quantize.train.qat_blocks import BlockFigures
    from quantize.train.qat_distill import Distillation
    from quantize.train.qat_student import Student

STEPS, BLOCK_STEPS, BATCH = 300, 60, 8
RATE, RATE_OF = 0.006, 4e6
"""Adam's rate of latent weights, in steps of their grid, of a model of so many weights: all of them change at
once, so that it falls with the root of their number."""
FINE_BITS, FINE_RATE = 4, 0.0012
"""From so many bits on it is no more than this: what GPTQ leaves is less than what weights lose that wander
(docs/benchmarks/training.md#qat)."""
BLOCK_RATE = 0.5
"""That of the first stage over that of the second."""
BETAS = (0.9, 0.99)
NARROW = 20_000_000
"""Weights from which on products are of bfloat16, and operations long enough to be shared out over cores. The
losses of a small model are of the size of what bfloat16 rounds."""
LOOKS = 10
"""Times that the loss on the choosing conversations is looked at."""
KEPT = 25
"""Steps between checkpoints."""


@dataclass(frozen=True)
class QatSettings:
    """How a variant is trained. Raises TrainError for what cannot be."""

    steps: int = STEPS
    block_steps: int = BLOCK_STEPS
    """Of every block in the first stage; 0: without it."""
    learning_rate: float | None = None
    """Of latent weights, in steps of their grid per step of training; None: by the model's size and bits."""
    batch: int = BATCH
    hidden: float = 0.0
    """Weight of the last hidden states' relative error beside the KL."""
    saturating: bool = True
    """Whether no gradient passes where a weight is clipped."""
    seed: int = 0
    narrow: bool | None = None
    """bfloat16 products; None: by the model's size."""

    def __post_init__(self) -> None:
        if self.steps < 0 or self.block_steps < 0 or not self.steps + self.block_steps:
            raise TrainError(
                f"steps: {self.steps}, block_steps: {self.block_steps}; both must be 0 or more, and one of "
                f"them above 0, such as {STEPS} and {BLOCK_STEPS}"
            )
        if self.hidden < 0:
            raise TrainError(f"hidden: {self.hidden}; is a weight, 0 or more")
        self.whole(1, FINE_BITS)  # which refuses a rate or a batch that cannot be

    def rate(self, weights: int, bits: int) -> float:
        """Of a model of so many weights, the coarsest of which have so many bits."""
        if self.learning_rate is not None:
            return self.learning_rate
        usual = RATE / math.sqrt(max(1.0, weights / RATE_OF))
        return usual if bits < FINE_BITS else min(usual, FINE_RATE)

    def whole(self, weights: int, bits: int) -> Settings:
        """Of the second stage, of a model of so many weights and bits."""
        return Settings(
            steps=max(1, self.steps),
            learning_rate=self.rate(weights, bits),
            batch=self.batch,
            together=self.batch,
            last_rate=0.0,
            betas=BETAS,
            evaluate_every=max(1, self.steps // LOOKS),
            keep_every=KEPT,
            seed=self.seed,
        )

    def blocks(self, weights: int, bits: int) -> Settings | None:
        """Of the first stage; None without it."""
        if not self.block_steps:
            return None
        return Settings(
            steps=self.block_steps,
            learning_rate=BLOCK_RATE * self.rate(weights, bits),
            batch=self.batch,
            together=self.batch,
            last_rate=0.0,
            betas=BETAS,
            keep_every=self.block_steps,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Text:
    """Token sequences, and from which token on they are learned or judged (1: all that can be predicted)."""

    sequences: Sequence[Sequence[int]]
    starts: Sequence[int] | None = None

    @property
    def tokens(self) -> int:
        return sum(map(len, self.sequences))


@dataclass(frozen=True)
class Work:
    """What is trained, from what, on what, and where it is kept."""

    checkpoint: Checkpoint
    modules: Modules
    plan: Plan
    base: Path
    """The quantized checkpoint that is begun with."""
    original: Callable[[Linear], Tensor | None]
    text: Text
    choosing: Text
    directory: Path
    run: Mapping[str, str] = field(default_factory=dict)
    """What the run depends on beside its settings: digests by name."""
    items: Mapping[str, Text] = field(default_factory=dict)
    """A role's items with their right answers, from which on they are judged; nothing is trained on them."""

    @property
    def weights(self) -> int:
        """Weights that are trained."""
        return sum(group.weights for group, _ in self._trained())

    @property
    def bits(self) -> int:
        """Of the coarsest of them."""
        return min((numbers.bits for _, numbers in self._trained()), default=8 * BF16_BYTES)

    def _trained(self) -> Iterator[tuple[Group, Numbers]]:
        for group in self.modules:
            numbers = scheme(self.plan.groups[group.name]).weights
            if group.kind != HEAD and numbers is not None:
                yield group, numbers


@dataclass
class Report:
    """What training did. KL in nats per token, on the choosing conversations or on a role's right answers; of
    what is begun with, and of what came out. ``right`` are shares of items whose whole answer is the
    likeliest."""

    before: float
    after: float
    blocks: list[dict[str, float]]
    curve: dict[str, Any]
    items: dict[str, dict[str, float]] = field(default_factory=dict)
    weights: int = 0
    moved: int = 0
    """Stored integers that are others than those that were begun with."""

    @property
    def recovered(self) -> float:
        """Share of the loss that is gone."""
        return 1 - self.after / self.before if self.before > 0 else 0.0

    def as_words(self) -> dict[str, Any]:
        return {**asdict(self), "recovered": self.recovered}

    def as_json(self) -> str:
        return json.dumps(self.as_words(), indent=1) + "\n"


def refuse_untrainable(plan: Plan, modules: Modules) -> None:
    """Raise TrainError for schemes that are not trained, before any work."""
    named = {plan.groups[group.name] for group in modules if group.kind != HEAD}
    quantized = [name for name in sorted(named) if scheme(name).weights is not None]
    if not quantized:
        raise TrainError(
            "the plan keeps all weights in 16 bits: there is nothing to train; name a quantized scheme"
        )
    for name in quantized:
        w = scheme(name).weights
        assert w is not None
        if w.kind == "float" and (w.bits != 8 or w.strategy != "channel"):
            instead = "fp8-dynamic" if w.bits == 8 else "w4a16-g32-asym"
            raise TrainError(
                f"{name} is not trained here: engines put scales of whole tensors together and round again, "
                f"and blocks and 4-bit floats have no trained form; take {instead}"
            )
    if any(is_experts(group) for group in modules):
        raise TrainError("experts are not trained here; give a dense model")


def memory(work: Work, settings: QatSettings) -> int:
    """Bytes that training takes at most: latent weights, gradients, Adam's moments and what is computed with,
    in 32 bits; all else of the model; activations and logits of a batch; hidden states of the text."""
    text = work.checkpoint.text_config
    hidden, layers = int(text["hidden_size"]), int(text["num_hidden_layers"])
    inner, vocabulary = int(text["intermediate_size"]), int(text["vocab_size"])
    others = work.modules.other_bytes // BF16_BYTES
    longest = max(map(len, work.text.sequences))
    batch = min(settings.batch * longest, max(longest, 2048 * -(-settings.batch * longest // 2048)))
    activations = 4 * batch * layers * (16 * hidden + 6 * inner)
    states = 4 * hidden * 3 * (work.text.tokens + work.choosing.tokens)
    logits = 4 * 6 * 256 * vocabulary
    return LIBRARIES_BYTES + 22 * work.weights + 4 * others + activations + states + logits


def refuse_no_room(work: Work, settings: QatSettings, fix: str = "") -> int:
    """The bytes that training will take, of the accelerator's memory where there is one. Raises TrainError,
    which tells ``fix``, where they are not free."""
    from quantize.make.blocks import best_device, free_memory

    needed, free = memory(work, settings), free_memory(best_device())
    if needed > free:
        raise TrainError(
            f"training {work.weights / 1e6:.0f} M weights would take about {needed / 1e9:.1f} GB of memory, "
            f"and {free / 1e9:.1f} GB are free; "
            + (fix or f"lower --batch (now {settings.batch}), or free some")
        )
    return needed


def train_variant(work: Work, settings: QatSettings) -> tuple[Student, Report]:
    """Train. Raises DivergedError and TrainError; what was finished is kept in the work's directory."""
    refuse_untrainable(work.plan, work.modules)
    with _cores(work.weights):
        return _trained(_Run(work, settings))


@contextlib.contextmanager
def _cores(weights: int) -> Iterator[None]:
    """A small model is computed on one core: its operations are too short to be shared out."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1 if weights < NARROW else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _trained(run: _Run) -> tuple[Student, Report]:
    from quantize.train.qat_distill import Distillation

    work, settings = run.work, run.settings
    student, _ = run.begun(None)
    codes = {name: one.codes() for name, one in student.weights.items()}
    with Distillation(run.passes, work.modules, work.plan, run.tensors, student) as whole:
        before = run.look(whole)
    blocks: list[BlockFigures] = []
    if settings.block_steps:
        student, blocks = run.begun(settings.blocks(work.weights, work.bits))
    outcome = Outcome()
    with Distillation(run.passes, work.modules, work.plan, run.tensors, student) as whole:
        if settings.steps:
            outcome = run.train(whole)
        after = run.look(whole)
    moved = sum(int((one.codes() != codes[name]).sum()) for name, one in student.weights.items())
    both = (("before", before), ("after", after))
    items = {
        role: {f"{when}_{what}": value for when, of in both for what, value in of[role].items()}
        for role in work.items
    }
    curve, mended = outcome.as_words(), [asdict(one) for one in blocks]
    return student, Report(before[""]["kl"], after[""]["kl"], mended, curve, items, work.weights, moved)


class _Run:
    """The reference's hidden states, and the pieces of a run that need them."""

    def __init__(self, work: Work, settings: QatSettings) -> None:
        import torch

        from quantize.make.blocks import Blocks
        from quantize.train.qat_passes import Passes

        self.work, self.settings = work, settings
        self.tensors = read_parts(work.base)
        narrow = settings.narrow if settings.narrow is not None else work.weights >= NARROW
        self.passes = Passes(Blocks(work.checkpoint, work.modules, dtype=torch.float32), narrow)
        self._named = {**work.run, "qat": json.dumps(asdict(settings), sort_keys=True)}
        self._wanted = self.passes.last(work.text.sequences, "reference")
        self._looked_at = {"": work.choosing, **work.items}
        self._aims = {
            name: self.passes.last(text.sequences, "reference") for name, text in self._looked_at.items()
        }

    def begun(self, first_stage: Settings | None) -> tuple[Student, list[BlockFigures]]:
        """The student after the first stage; as it begins without one."""
        from quantize.train.qat_blocks import reconstruct

        work = self.work
        return reconstruct(
            self.passes,
            work.modules,
            work.plan,
            self.tensors,
            work.original,
            work.text.sequences,
            first_stage,
            self.settings.saturating,
            Place(work.directory, self._named),
        )

    def train(self, whole: Distillation) -> Outcome:
        """The second stage."""
        return whole.train(
            self.work.text.sequences,
            self._wanted,
            self.settings.whole(self.work.weights, self.work.bits),
            Place(self.work.directory / "whole", self._named),
            self.settings.hidden,
            lambda _step: figures(whole, self.work.choosing, self._aims[""]),
            self.work.text.starts or [1] * len(self.work.text.sequences),
        )

    def look(self, whole: Distillation) -> dict[str, dict[str, float]]:
        """Figures of all that is looked at; the choosing conversations have no name."""
        return {name: figures(whole, text, self._aims[name]) for name, text in self._looked_at.items()}


def figures(whole: Distillation, text: Text, aims: Sequence[Tensor]) -> dict[str, float]:
    """Mean KL of a text, and of items the shares that student and reference answer right."""
    import torch

    total, tokens, right, reference, count = 0.0, 0, 0, 0, 0
    pairs = whole.predictions(text.sequences, aims, text.starts)
    for number, (mine, theirs) in enumerate(pairs):
        p, q = torch.log_softmax(theirs, -1), torch.log_softmax(mine, -1)
        total, tokens = total + float((p.exp() * (p - q)).sum()), tokens + len(p)
        if text.starts is not None:
            aim = torch.tensor(list(text.sequences[number][text.starts[number] :])).to(mine.device)
            right += int((mine.argmax(-1) == aim).all())
            reference += int((theirs.argmax(-1) == aim).all())
            count += 1
    found = {"kl": total / max(1, tokens)}
    if count:
        found |= {"right": right / count, "reference_right": reference / count}
    return found
