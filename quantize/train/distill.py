"""What a student learns of its teacher: its answers' distributions, hidden states and attention.

A student is a smaller model with the same tokenizer, most often what :mod:`quantize.compact` left of the
teacher. Its layers are matched with the teacher's evenly: layer i of s with layer round(i t / s) of t, so
that the last ones are a pair.

Per learned token, nats (Hinton et al., arXiv:1503.02531; hidden states and attention after arXiv:1909.10351):

responses  KL(teacher || student) over the vocabulary at a temperature T, times T²
hidden     the mean over pairs of layers and over tokens of |student - teacher|² / |teacher|²
attention  the mean over pairs of layers and over tokens of KL(teacher || student) of where a token looks,
           heads averaged, so that a student may have fewer
answers    the negative log-probability of the right answer, as any training has it
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from quantize.core.checkpoint import Checkpoint, base_sha256
from quantize.core.modules import Modules, read_modules
from quantize.train.answers import NOTHING, Portion, portion_of
from quantize.train.base import load_base, refuse_untrainable
from quantize.train.data import Example
from quantize.train.identity import tokenizer_sha256
from quantize.train.loop import TrainError
from quantize.train.memory import Need, Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LEAST = 1e-12


@dataclass(frozen=True)
class Weights:
    """Of the parts of the loss. Raises TrainError for what cannot be."""

    responses: float = 1.0
    hidden: float = 0.0
    attention: float = 0.0
    answers: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for one in fields(self):
            if not 0 <= getattr(self, one.name) < math.inf:
                raise TrainError(f"{one.name}: {getattr(self, one.name)}; must be a number, 0 or more")
        if self.temperature == 0:
            raise TrainError("temperature: 0; must be above 0, such as 1")
        if not self.responses + self.hidden + self.attention + self.answers:
            raise TrainError("nothing is to be learned: give --responses, --hidden, --attention or --answers")


@dataclass(frozen=True)
class Teaching:
    """Who teaches, and what of it is learned."""

    teacher: Checkpoint
    weights: Weights = Weights()

    def identity(self) -> dict[str, str]:
        """What a run depends on beside its student."""
        return {"teacher": base_sha256(self.teacher), "teaching": repr(asdict(self.weights))}

    def described(self) -> dict[str, Any]:
        """For a record."""
        return {"teacher": self.teacher.path.resolve().name, **asdict(self.weights)}


def refuse_unlike(student: Checkpoint, teaching: Teaching) -> None:
    """Raise TrainError where a student cannot learn from that teacher, before any work."""
    teacher, weights = teaching.teacher, teaching.weights
    refuse_untrainable(teacher, read_modules(teacher))
    if base_sha256(student) == base_sha256(teacher):
        raise TrainError(
            f"{student.path} is the teacher itself; make a student of it by `tiercel quantize compact`"
        )
    if tokenizer_sha256(student) != tokenizer_sha256(teacher):
        raise TrainError(
            f"{student.path} has another tokenizer or chat template than its teacher {teacher.path}; their "
            "tokens cannot be compared"
        )
    sizes = [int(one.text_config["vocab_size"]) for one in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise TrainError(
            f"{student.path} has {sizes[0]} words, its teacher {sizes[1]}; they must be the same"
        )
    widths = [int(one.text_config["hidden_size"]) for one in (student, teacher)]
    if weights.hidden and widths[0] != widths[1]:
        raise TrainError(
            f"hidden: states of {student.path} are {widths[0]} wide, its teacher's {widths[1]}, and are not "
            "compared; give --hidden 0"
        )
    layers = [int(one.text_config["num_hidden_layers"]) for one in (student, teacher)]
    if layers[0] > layers[1]:
        raise TrainError(
            f"{student.path} has {layers[0]} layers, its teacher {layers[1]}; give a smaller one"
        )


def pairs(student: int, teacher: int) -> list[tuple[int, int]]:
    """Layers of both that are compared, counted from 1; the last ones are a pair."""
    return [(one, round(one * teacher / student)) for one in range(1, student + 1)]


def with_teacher(need: Need, teaching: Teaching, modules: Modules, shape: Shape, width: int) -> Need:
    """The memory of training with the teacher's: its weights, logits, and what of it is compared."""
    config = teaching.teacher.text_config
    numbers = sum(linear.weights for linear in modules.linears) + modules.other_bytes // 2
    layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
    tokens = shape.examples * shape.tokens
    more = layers * tokens * int(config["hidden_size"]) * width
    if teaching.weights.attention:
        more += 3 * layers * heads * tokens * shape.tokens * 4
    return replace(
        need,
        base=need.base + width * numbers,
        logits=2 * need.logits,
        activations=need.activations + more,
    )


class Lessons:
    """A teacher in memory, and the loss of a student that is asked the same."""

    def __init__(self, teaching: Teaching, student: Any, device: torch.device) -> None:
        self.weights, self._device = teaching.weights, device
        self._teacher = load_base(teaching.teacher, "lora", device).model.eval()
        if self.weights.attention:  # kernels that are faster do not tell where a token looks
            for model in (student, self._teacher):
                model.set_attn_implementation("eager")
        layers = [int(one.config.num_hidden_layers) for one in (student, self._teacher)]
        self._pairs = pairs(layers[0], layers[1])

    def loss(self, student: Any, examples: Sequence[Example]) -> tuple[Tensor, float]:
        """The sum over learned tokens, and how many there are."""
        import torch
        from torch.nn.functional import cross_entropy

        weights = self.weights
        portion = portion_of(examples, self._device)
        mine = self._asked(student, portion)
        with torch.no_grad():
            theirs = self._asked(self._teacher, portion)
        learned = portion.targets != NOTHING
        logits = mine.logits[learned].float()
        total = logits.new_zeros(())
        count = len(logits)
        if weights.responses:
            total = total + weights.responses * responses(
                logits, theirs.logits[learned].float(), weights.temperature
            )
        if weights.answers:
            targets = portion.targets[learned]
            total = total + weights.answers * cross_entropy(logits, targets, reduction="sum")
        real = portion.mask.bool()
        if weights.hidden:
            errors = [
                hidden(mine.hidden_states[one][real], theirs.hidden_states[other][real])
                for one, other in self._pairs
            ]
            total = total + weights.hidden * count * torch.stack(errors).mean()
        if weights.attention:
            errors = [
                attention(mine.attentions[one - 1], theirs.attentions[other - 1], real)
                for one, other in self._pairs
            ]
            total = total + weights.attention * count * torch.stack(errors).mean()
        return total, float(count)

    def _asked(self, model: Any, portion: Portion) -> Any:
        return model(
            input_ids=portion.ids,
            attention_mask=portion.mask,
            position_ids=portion.positions,
            logits_to_keep=portion.keep,
            use_cache=False,
            output_hidden_states=bool(self.weights.hidden),
            output_attentions=bool(self.weights.attention),
        )


def responses(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The sum over tokens of KL(teacher || student) of logits (tokens, vocabulary), times T²."""
    p, q = (one.div(temperature).log_softmax(-1) for one in (teacher, student))
    return temperature**2 * (p.exp() * (p - q)).sum()


def hidden(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over tokens of the relative squared error of states (tokens, hidden)."""
    student, teacher = student.float(), teacher.float()
    size = teacher.square().sum(-1).clamp_min(LEAST)
    return ((student - teacher).square().sum(-1) / size).mean()


def attention(student: Tensor, teacher: Tensor, real: Tensor) -> Tensor:
    """The mean over tokens of KL(teacher || student) of where each looks, from weights (examples, heads,
    tokens, tokens); ``real`` (examples, tokens) are tokens that are no padding."""
    p, q = (one.float().mean(1)[real].clamp_min(LEAST) for one in (teacher, student))
    return (p * (p.log() - q.log())).sum(-1).mean()
