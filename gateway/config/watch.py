"""The watch: quantized answers compared with the reference's while they are served."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from gateway.config.section import Secret, Section, Variable

WATCHED = ("shadow", "regenerated", "signals", "rules", "grounded", "judge")
"""Checks by which the watch acts."""


class Judge(Section):
    """Who judges whether an answer is grounded, beside the rules that need no model."""

    model: str = Field(description="the model (its reference), model:variant, or a provider's model")
    rate: float = Field(default=0.02, ge=0, le=1, description="share of answers of grounded roles")
    max_tokens: int = Field(default=512, ge=16)
    timeout_s: float = Field(default=60.0, gt=0)


class Batch(Section):
    """Answers that wait until the reference is started for them."""

    most: int = Field(
        default=200, ge=1, description="answers of a variant in a role that wait; the oldest leave"
    )
    every_s: float | None = Field(
        default=None,
        gt=0,
        description="seconds after which `tiercel up` scores what waits, if there is room for the reference; "
        "default: only `tiercel watch score` does",
    )


class WatchSettings(Section):
    """Quantized answers compared with the reference's while they are served, and what follows from it."""

    enabled: bool = True
    reference: Literal["live", "batch", "none"] = Field(
        default="live",
        description="live: the reference is served, and asked about a share of quantized answers; batch: it "
        "need not be served, the share is kept (section `kept`) and scored when it is started for that; "
        "none: it need not be served, and rules and signals alone watch",
    )
    batch: Batch | None = Field(default=None, description="of reference: batch; default: as its fields say")
    store: Annotated[str | None, Secret.URL] = Field(
        default=None, description="SQLAlchemy URL of what all gateways share; default: SQLite in run_dir"
    )
    store_env: Variable | None = Field(
        default=None, description="environment variable that holds that URL, where it has a password"
    )
    rate: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="share of the quantized answers that are listened to (quality.sample_rate) that the "
        "reference is asked about",
    )
    in_flight: int = Field(default=2, ge=1, description="requests of the watch under way at a time")
    queue: int = Field(default=64, ge=1, description="answers that wait for it; the oldest is given up first")
    busy_at: int = Field(
        default=32, ge=1, description="requests at a replica from which on the watch leaves it alone"
    )
    priority: int = Field(
        default=1000,
        ge=0,
        description="vLLM's: higher comes later; users' requests have those of their keys and roles",
    )
    timeout_s: float = Field(default=60.0, gt=0)
    answers_per_false_alarm: float = Field(
        default=1e6, ge=100, description="looked at, on average, until a healthy variant alarms"
    )
    agree: int = Field(default=2, ge=1, description="checks that must agree before a variant is demoted")
    demotions_per_hour: int = Field(default=6, ge=0)
    probation_after_s: float = Field(
        default=300.0, gt=0, description="from a demotion to its first probation; doubled after each failure"
    )
    probation_rate: float = Field(
        default=0.1, gt=0, le=1, description="share of the role's requests that it gets copies of"
    )
    escalated_share: float = Field(
        default=0.2, ge=0, le=1, description="of a role's answers, that may be asked again at most"
    )
    webhook: Annotated[str | None, Secret.LINK] = Field(
        default=None, description="URL that every event is posted to as JSON"
    )
    judge: Judge | None = None

    @model_validator(mode="after")
    def _one_store(self) -> WatchSettings:
        if self.store is not None and self.store_env is not None:
            raise ValueError("store and store_env both say where the store is; give one")
        if self.batch is not None and self.reference != "batch":
            raise ValueError(f"batch: has no meaning with reference: {self.reference}; set reference: batch")
        return self

    @property
    def waiting(self) -> Batch:
        """What holds of answers that wait for the reference."""
        return self.batch or Batch()

    @property
    def compares(self) -> bool:
        """Whether a reference is asked about answers, at once or later."""
        return self.reference != "none"
