"""What is found out about the engine that serves a variant: what it has loaded, and how fast it is.

Parts of a variant's card (:mod:`quantize.card`). Needs pydantic alone.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Strict(BaseModel):
    """A part of a card: a field that it does not know is an error, and none changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Kernel(Strict):
    """The linear modules of an engine that one kernel computes."""

    count: int = Field(ge=1, description="modules, as the engine fuses them")
    bits: int = Field(ge=0, description="of a weight; 0 where the engine does not tell")
    bytes: int = Field(ge=0, description="of their parameters, on all ranks, after the engine repacked them")


class EngineAccount(Strict):
    """What the engine said of itself after it had loaded the variant."""

    source: Literal["workers", "log"] = Field(
        description="every module, told by the engine's workers; or what a stock server's log shows"
    )
    engine: str = Field(description="vLLM's version")
    quantization: str = Field(description="the quantization config that it resolved; 'none' without one")
    kernels: dict[str, Kernel] = Field(default_factory=dict, description="'method/kernel' to its modules")
    kv_dtype: str = Field(default="", description="of the KV cache; empty where it is not told")
    weight_bytes: int | None = Field(default=None, description="of all parameters, on all ranks")
    device_bytes: int | None = Field(default=None, description="taken on the accelerators, KV cache included")
    ranks: int = Field(default=1, ge=1, description="workers that share the model")


class SpeedPoint(Strict):
    """How long an engine takes for requests that come together, none of whose prompts it has seen before."""

    together: int = Field(ge=1, description="requests")
    prompt_tokens: int = Field(ge=1, description="of each")
    answer_tokens: int = Field(ge=2, description="of each")
    prompt_s: float = Field(gt=0, description="until all have their first token")
    step_s: float = Field(gt=0, description="for one more token of each, the mean over their answers")


class Speed(Strict):
    """How fast the serving engine wrote, prompts included, with so many requests at a time."""

    tokens_per_s: float = Field(gt=0, description="tokens written per second, the median of some passes")
    tokens_per_joule: float | None = Field(
        default=None,
        gt=0,
        description="of all that ran on the machine meanwhile; None where it does not tell",
    )
    energy: str = Field(default="", description="what told the joules, or that nothing does")
    slowest: float = Field(gt=0, description="of the passes")
    fastest: float = Field(gt=0)
    together: int = Field(ge=1, description="requests at a time")
    prompt_tokens: int = Field(ge=1, description="of each")
    answer_tokens: int = Field(ge=1, description="of each")
    points: tuple[SpeedPoint, ...] = Field(default=(), description="at several loads, each a median")


RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM 0.32 can be told to make room for."""


class AdapterCarried(Strict):
    """A LoRA adapter that a variant carries: it is served, measured and judged with it."""

    rank: int = Field(ge=1)
    sha256: str = Field(description="of its files, as they were given")
    bytes: int = Field(ge=0)
    carrier: str = Field(description="model:variant that it was put on, and that one's version")

    @property
    def engine_rank(self) -> int:
        """The smallest rank that an engine can be told which holds this one."""
        return next(one for one in RANKS if one >= self.rank)
