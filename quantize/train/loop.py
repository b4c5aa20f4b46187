"""A small training loop: what is trained is a set of tensors, and what it is trained for a function.

>>> outcome = train(
...     {"scale": scale}, loss, len(examples), Settings(steps=100, learning_rate=1e-3),
...     Place(Path("var/run"), {"model": digest, "data": other}), evaluate=evaluate,
... )
>>> outcome.points[-1].loss, outcome.evaluations[-1].figures["loss"]

A run that was stopped, however that happened, goes on from its last checkpoint to the same result, bit for
bit, on the same machine with as many threads: the order of examples and the random numbers of a step follow
from the seed and the step alone, and everything else that a step depends on is in the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from quantize.train.interrupt import Interrupt
from quantize.train.state import read_state, write_state

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import AdamW

CHECKPOINT = "checkpoint.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each tensor, by torch's names."""
FASTEST = 1e30
"""A learning rate that no 32-bit number overflows by."""
MOST_STEPS = 10_000_000
"""More than anybody waits for; beyond it a number has slipped."""
RECENT = 5
"""Steps whose mean loss is looked at, to see that it explodes without ever being infinite."""
EXPLODED = 10.0
"""Times the first steps' mean loss."""

Loss = Callable[[int, Sequence[int]], tuple["Tensor", float]]
"""Is given the step and the numbers of the examples that go through the model together; returns the sum of
their losses, and what the sum over a whole step is to be divided by (tokens with a label, or examples)."""
Evaluate = Callable[[int], Mapping[str, Any]]
"""Is given the step; returns figures by name, as JSON has them."""


class TrainError(RuntimeError):
    """Training cannot begin or go on. The text says why and what to change."""


class DivergedError(TrainError):
    """The loss became NaN or infinite, or exploded; the last good checkpoint is kept."""


@dataclass(frozen=True)
class Settings:
    """How long and how fast. Raises TrainError for what cannot be."""

    steps: int
    learning_rate: float
    batch: int = 8
    """Examples of a step."""
    together: int = 8
    """Examples that go through the model at once; gradients of a step's portions are added."""
    warm_up: float = 0.05
    """Share of the steps in which the rate rises; it falls by a cosine afterwards."""
    last_rate: float = 0.1
    """What the rate ends at, as a share of ``learning_rate``."""
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_norm: float = 1.0
    """Longer gradients are shortened to this."""
    evaluate_every: int = 0
    """Steps; 0: before the first and after the last alone."""
    keep_every: int = 20
    """Steps between checkpoints."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "together", "keep_every"):
            if getattr(self, name) < 1:
                raise TrainError(f"{name}: {getattr(self, name)}; must be 1 or more")
        if self.steps > MOST_STEPS:
            raise TrainError(f"steps: {self.steps:.3g}; give at most {MOST_STEPS:,}, or fewer epochs")
        if self.evaluate_every < 0:
            raise TrainError(f"evaluate_every: {self.evaluate_every}; give a number of steps, or 0 for none")
        if not (0 < self.learning_rate <= FASTEST):
            raise TrainError(
                f"learning_rate: {self.learning_rate}; must be above 0 and at most {FASTEST:g}, such as 2e-4"
            )
        if not 0 <= self.warm_up < 1:
            raise TrainError(f"warm_up: {self.warm_up}; is a share of the steps, from 0 to below 1")
        if self.max_norm <= 0:
            raise TrainError(f"max_norm: {self.max_norm}; must be above 0")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rising = max(1, round(self.warm_up * self.steps))
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        done = (step - rising) / max(1, self.steps - rising)
        fall = self.last_rate + (1 - self.last_rate) * (1 + math.cos(math.pi * done)) / 2
        return self.learning_rate * fall


@dataclass(frozen=True)
class Place:
    """Where a run keeps its checkpoint, and which run it is: what it depends on, by name (``model``, ``data``
    …), as digests or short texts. A checkpoint of another run is refused by these."""

    directory: Path
    run: Mapping[str, str]

    @property
    def checkpoint(self) -> Path:
        return self.directory / CHECKPOINT


@dataclass(frozen=True)
class Point:
    """One step: its mean loss, the length of its gradient before it was shortened, and its rate."""

    step: int
    loss: float
    norm: float
    rate: float


@dataclass(frozen=True)
class Figures:
    """What ``evaluate`` said after so many steps."""

    step: int
    figures: Mapping[str, Any]


@dataclass
class Outcome:
    """The curve of a run. ``begun_at`` is the step that this process began with; ``seconds`` are those of all
    processes that took part."""

    points: list[Point] = field(default_factory=list)
    evaluations: list[Figures] = field(default_factory=list)
    begun_at: int = 0
    seconds: float = 0.0

    def as_words(self) -> dict[str, Any]:
        return {
            "points": [list(asdict(point).values()) for point in self.points],
            "evaluations": [[one.step, dict(one.figures)] for one in self.evaluations],
            "seconds": self.seconds,
        }

    @classmethod
    def of_words(cls, words: Mapping[str, Any]) -> Outcome:
        points = [Point(*values) for values in words["points"]]
        evaluations = [Figures(step, figures) for step, figures in words["evaluations"]]
        return cls(points, evaluations, len(points), words["seconds"])


def train(
    trained: Mapping[str, Tensor],
    loss: Loss,
    examples: int,
    settings: Settings,
    place: Place | None = None,
    evaluate: Evaluate | None = None,
    rates: Mapping[str, float] | None = None,
    label: str = "train",
) -> Outcome:
    """Train the tensors in place. With ``place`` what is done is kept there, and gone on from.

    ``rates`` are factors of the learning rate by tensor (default: 1). A checkpoint is written once the step
    after it has shown that its loss is finite. Raises DivergedError at the first step whose loss or gradient
    is not, before it changes a tensor; TrainError for a checkpoint of another run, and KeyboardInterrupt
    after a checkpoint was written.
    """
    if examples < 1:
        raise TrainError("there are no examples to train on; give some")
    run = _Run(trained, settings, place, rates or {})
    outcome = run.resumed()
    started, before = time.monotonic(), outcome.seconds

    def keep() -> None:
        outcome.seconds = before + time.monotonic() - started
        run.keep(outcome)

    def look(step: int) -> None:
        if evaluate is not None and not any(one.step == step for one in outcome.evaluations):
            outcome.evaluations.append(Figures(step, dict(evaluate(step))))

    def due(step: int, every: int) -> bool:
        return step in (0, settings.steps) or (every > 0 and step % every == 0)

    first = len(outcome.points)
    with (
        Interrupt() as interrupt,
        tqdm(total=settings.steps, initial=first, desc=label, unit="step", file=sys.stderr) as bar,
    ):
        for step in range(first, settings.steps + 1):
            if due(step, settings.evaluate_every) and not interrupt.asked:
                look(step)
            if step == settings.steps or interrupt.asked:
                keep()
                break
            anew = step == 0 or step != first
            to_keep = keep if anew and due(step, settings.keep_every) else None
            point = run.step(step, loss, examples, interrupt, to_keep)
            if point is None:
                keep()
                break
            outcome.points.append(point)
            run.refuse_explosion(outcome.points)
            bar.set_postfix(loss=f"{point.loss:.4f}")
            bar.update()
    if interrupt.asked:
        raise KeyboardInterrupt
    return outcome


class _Run:
    """The tensors, their optimizer, and the file that both are kept in."""

    def __init__(
        self,
        trained: Mapping[str, Tensor],
        settings: Settings,
        place: Place | None,
        rates: Mapping[str, float],
    ) -> None:
        from torch.optim import AdamW

        if not trained:
            raise TrainError("there is nothing to train: no tensor was given")
        self.trained, self.settings, self.place = trained, settings, place
        self.factors = [rates.get(name, 1.0) for name in trained]
        for tensor in trained.values():
            tensor.requires_grad_()
        groups = [{"params": [tensor], "lr": 0.0} for tensor in trained.values()]
        # One tensor after another: side by side, the optimizer would need temporary copies of them all.
        self.optimizer: AdamW = AdamW(
            groups, lr=0.0, betas=settings.betas, weight_decay=settings.weight_decay, foreach=False
        )

    def step(
        self, step: int, loss: Loss, examples: int, interrupt: Interrupt, keep: Callable[[], None] | None
    ) -> Point | None:
        """One step; None where a person stopped it, before it changed anything. ``keep`` is called when what
        was before it has been seen to be good."""
        import torch

        settings = self.settings
        torch.manual_seed(_number(settings.seed, "step", step))
        batch = batch_of(step, examples, settings.batch, settings.seed)
        total = weight = 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for at in range(0, len(batch), settings.together):
            if interrupt.asked:
                return None
            value, portion = loss(step, batch[at : at + settings.together])
            self._refuse(step, "loss", float(value.detach()))
            value.backward()  # type: ignore[no-untyped-call]
            total, weight = total + float(value.detach()), weight + portion
        norm = self._scale(1 / max(weight, 1e-12))
        self._refuse(step, "gradient", norm)
        if keep is not None:
            keep()
        rate = settings.rate(step)
        for group, factor in zip(self.optimizer.param_groups, self.factors, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Point(step, total / max(weight, 1e-12), norm, rate)

    def _scale(self, factor: float) -> float:
        """Make gradients of sums those of means, and shorten them; their length before that."""
        import torch

        found = []
        for tensor in self.trained.values():
            if tensor.grad is None:  # what no example came to, as an expert
                tensor.grad = torch.zeros_like(tensor)
            found.append(tensor.grad.mul_(factor).float().norm())
        norm = float(torch.stack([one.to(found[0].device) for one in found]).norm())
        if self.settings.max_norm < norm < math.inf:
            for tensor in self.trained.values():
                assert tensor.grad is not None
                tensor.grad.mul_(self.settings.max_norm / norm)
        return norm

    def _refuse(self, step: int, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise DivergedError(f"step {step + 1}: the {what} is {value}; {self._fix()}")

    def refuse_explosion(self, points: Sequence[Point]) -> None:
        """Raise DivergedError where the loss has grown out of all proportion, and is finite still."""
        if len(points) < 2 * RECENT:
            return
        first = sum(point.loss for point in points[:RECENT]) / RECENT
        last = sum(point.loss for point in points[-RECENT:]) / RECENT
        if last > EXPLODED * max(first, 0.1):
            raise DivergedError(
                f"step {len(points)}: the loss has grown from {first:.3g} to {last:.3g}; {self._fix()}"
            )

    def _fix(self) -> str:
        kept = ""
        if self.place is not None and self.place.checkpoint.is_file():
            kept = f"; the last good checkpoint is kept in {self.place.checkpoint}"
        rate = self.settings.learning_rate
        return f"lower learning_rate, which is {rate:g} (try {rate / 10:g}){kept}"

    def keep(self, outcome: Outcome) -> None:
        """Write the checkpoint, the old one or the new one whatever happens."""
        if self.place is None:
            return
        self.place.directory.mkdir(parents=True, exist_ok=True)
        tensors = {f"weights.{name}": tensor.detach() for name, tensor in self.trained.items()}
        for name, tensor in self.trained.items():
            for moment in MOMENTS:
                if tensor in self.optimizer.state:
                    tensors[f"{moment}.{name}"] = self.optimizer.state[tensor][moment]
        words = {"run": self._named(), **outcome.as_words()}
        write_state(self.place.checkpoint, tensors, words)

    def resumed(self) -> Outcome:
        """What an earlier process of this run has done, taken over into the tensors."""
        import torch

        if self.place is None or not self.place.checkpoint.is_file():
            return Outcome()
        try:
            tensors, words = read_state(self.place.checkpoint)
        except ValueError as error:
            raise TrainError(f"{error}; remove it, training begins anew then") from None
        refuse_other_run(self.place.checkpoint, words.get("run", {}), self._named())
        outcome = Outcome.of_words(words)
        with torch.no_grad():
            for name, tensor in self.trained.items():
                tensor.copy_(tensors[f"weights.{name}"])
                moments = {
                    moment: tensors[f"{moment}.{name}"].to(tensor.device)
                    for moment in MOMENTS
                    if f"{moment}.{name}" in tensors
                }
                if moments:
                    self.optimizer.state[tensor] = {"step": torch.tensor(float(outcome.begun_at)), **moments}
        return outcome

    def _named(self) -> dict[str, str]:
        assert self.place is not None
        shapes = {name: [str(tensor.dtype), *tensor.shape] for name, tensor in self.trained.items()}
        digest = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()
        decisive = {
            name: value
            for name, value in asdict(self.settings).items()
            if name not in ("evaluate_every", "keep_every")
        }
        return {**self.place.run, "tensors": digest, "settings": json.dumps(decisive)}


def refuse_other_run(path: Path, kept: Mapping[str, str], mine: Mapping[str, str]) -> None:
    """Raise TrainError where a checkpoint is of another run, and say what is different."""
    other = [name for name in sorted({*kept, *mine}) if kept.get(name) != mine.get(name)]
    if not other:
        return
    name, what = other[0], ", ".join(other)
    shown = ""
    if name == "settings" and name in kept and name in mine:
        old, new = json.loads(kept[name]), json.loads(mine[name])
        changed = [key for key in new if json.loads(json.dumps(new[key])) != old.get(key)]
        shown = f" ({changed[0]} was {old.get(changed[0])} and is {new[changed[0]]})" if changed else ""
    shown = f" (set OMP_NUM_THREADS={kept[name]})" if name == "threads" and name in kept else shown
    raise TrainError(
        f"{path} is of another run: it differs in {what}{shown}; give the same again to go on with it, or "
        "another directory to begin anew"
    )


def batch_of(step: int, examples: int, size: int, seed: int) -> list[int]:
    """Numbers of the examples of a step. Every example comes once before any comes again, in an order that
    the seed decides, another one each time."""
    return [number for _, number in zip(range(size), _from(step * size, examples, seed), strict=False)]


def _from(start: int, examples: int, seed: int) -> Iterator[int]:
    """The endless order of examples from a place in it."""
    import torch

    epoch, at = divmod(start, examples)
    while True:
        generator = torch.Generator().manual_seed(_number(seed, "order", epoch))
        yield from torch.randperm(examples, generator=generator)[at:].tolist()
        epoch, at = epoch + 1, 0


def _number(*parts: object) -> int:
    """A seed of 63 bits that depends on all of ``parts``."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1
