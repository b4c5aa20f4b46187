"""What is found, as data: points of the curves, and figures by layer."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from quantize.report.distributions import GroupFigures

What = Literal["nothing", "weights", "inputs", "kv"]
"""What alone is rounded, everything else being as it is."""
WHATS: tuple[What, ...] = ("weights", "inputs", "kv")
WORDS: dict[What, str] = {
    "nothing": "16 bits",
    "weights": "weights",
    "inputs": "inputs of linear modules",
    "kv": "KV cache",
}


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RoleAnswers(_Frozen):
    """Greedy answers to a role's items, judged. Lists have an entry per item, in order."""

    right: tuple[bool, ...] = Field(description="by the item's own check")
    invented: tuple[bool, ...] = Field(
        description="a word that is neither in the grounds nor in the wording of right answers"
    )
    values: tuple[bool, ...] = Field(description="a number, identifier or name that the grounds do not hold")
    samples: tuple[str, ...] = Field(description="the first answers")


class PointFound(_Frozen):
    """The model with one thing rounded to so many bits."""

    what: What
    bits: int
    quantizer: str = Field(description="by name; empty for nothing")
    loss: float = Field(description="mean negative log-likelihood of the tokens of right answers, nats")
    kl: float = Field(description="mean KL(16 bits || this) at those tokens, nats")
    agreement: float = Field(description="share of those tokens at which the first choice is the same")
    tokens: int
    depth: tuple[float, ...] = Field(
        description="after each block: median over tokens of |h' - h| / |h|; empty for nothing"
    )
    roles: dict[str, RoleAnswers]


class ErrorRow(_Frozen):
    """One module group's weights or inputs, at one format."""

    what: Literal["weights", "inputs"]
    group: str
    kind: str
    layer: int
    quantizer: str
    error: float = Field(description="|x̂ - x| / |x|, Frobenius norms")


class ScaleRow(_Frozen):
    """Scales of one module group: of its weights at 4 bits, and of its inputs, per token, at 8."""

    what: Literal["weights", "inputs"]
    group: str
    kind: str
    layer: int
    least: float
    median: float
    largest: float


class Layers(_Frozen):
    """What is known of every layer."""

    errors: tuple[ErrorRow, ...]
    scales: tuple[ScaleRow, ...]
    groups: tuple[GroupFigures, ...]
    tokens: int = Field(description="that went through for what is said of inputs")


class Exploration(_Frozen):
    """All of it."""

    model: str
    parameters: int
    layers: Layers
    points: tuple[PointFound, ...]
    items: dict[str, int] = Field(description="role to items that were asked")
    seconds: float

    def reference(self) -> PointFound:
        return next(point for point in self.points if point.what == "nothing")

    def of(self, what: What) -> list[PointFound]:
        """By falling bits."""
        return sorted((p for p in self.points if p.what == what), key=lambda point: -point.bits)
