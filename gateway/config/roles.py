"""Roles: what agents do, and the quality they need."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from gateway.config.access import PRIORITY
from gateway.config.kept import Recording
from gateway.config.section import Section
from gateway.config.watch import WATCHED
from quantize.gate.judgement import QualityBudget
from tiercel_agents.roles import settings_like


class WhenFull(StrEnum):
    """What becomes of a request when every replica of its variant is full."""

    RAISE = "raise"
    """A more precise variant takes it."""
    QUEUE = "queue"
    """It waits for a replica of this variant, up to ``wait_s``."""
    REFUSE = "refuse"


class Canary(Section):
    """A share of a role's sessions that another variant serves."""

    variant: str
    percent: float = Field(ge=0, le=100)


class Target(Section):
    """How soon a role wants its answers."""

    ttft_s: float | None = Field(default=None, gt=0, description="to the first token, of streams")
    total_s: float | None = Field(default=None, gt=0, description="to the end of the answer")

    @model_validator(mode="after")
    def _sets_a_limit(self) -> Target:
        if self.ttft_s is None and self.total_s is None:
            raise ValueError("sets no limit; give ttft_s, total_s, or both, or leave it out")
        return self


class RoleSettings(Section):
    """What an agent does, and the quality it needs."""

    like: str | None = Field(
        default=None,
        description="a role of the library (docs/agents.md), whose settings hold where none are given here",
    )
    models: tuple[str, ...] = Field(
        default=(),
        description="that may serve it: the cheapest variant of any of them that passes does; the reference "
        "of the first is what all others are measured against. Default: the first of models",
    )
    budget: QualityBudget = QualityBudget()
    agents: tuple[str, ...] = Field(default=(), description="agent names that mean this role")
    grounded: bool = Field(default=False, description="check answers against the conversation's context")
    tasks: Path | None = Field(default=None, description="JSON Lines of held-out items for the gate")
    long_context: Path | None = Field(
        default=None, description="the same with prompts that fill the context, judged apart from tasks"
    )
    training: Path | None = Field(
        default=None, description="JSON Lines to train on for the role, of which none may be among tasks"
    )
    max_tokens: int | None = Field(
        default=None, ge=1, description="of an answer to an item of tasks that does not say; default 256"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="for the chat template when tasks are asked, such as {enable_thinking: false}",
    )

    record: Recording | None = Field(
        default=None,
        description="keep a sample of what it is asked, for `tiercel tasks record`; needs the section `kept`",
    )

    when_full: WhenFull = WhenFull.RAISE
    wait_s: float = Field(
        default=0.0, ge=0, description="how long a request may wait for a replica that starts or is full"
    )
    hedge: bool = Field(
        default=False, description="ask a second replica when the first is slower than 95 % of answers"
    )
    target: Target | None = Field(
        default=None,
        description="the cheapest variant that is expected to answer within it gets the request; where none "
        "is, the cheapest",
    )
    canary: Canary | None = None
    priority: int = PRIORITY
    escalate: bool = Field(
        default=False,
        description="an answer that is not streamed and fails a check is asked of the next higher precision",
    )
    confidence: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="with escalate: also when the tokens' geometric mean probability is below this",
    )
    rates: dict[str, tuple[float, float]] = Field(
        default_factory=dict,
        description="check of the watch to the share of bad answers that is tolerated, and that alarms",
    )

    @model_validator(mode="before")
    @classmethod
    def _is_like_another(cls, raw: Any) -> Any:
        """What the library says, as if it stood in the file."""
        if isinstance(raw, dict) and isinstance(name := raw.get("like"), str):
            try:
                return settings_like(name, raw)
            except ValueError as error:
                raise ValueError(f"like: {error}") from None
        return raw

    @field_validator("rates")
    @classmethod
    def _are_rates(cls, rates: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        for check, (tolerated, alarming) in rates.items():
            if check not in WATCHED:
                raise ValueError(f"{check!r} is not a check; known: {', '.join(WATCHED)}")
            if not 0 < tolerated < alarming < 1:
                raise ValueError(
                    f"{check}: [{tolerated}, {alarming}] must be two shares, the lower one first"
                )
        return rates

    @model_validator(mode="after")
    def _has_tasks_too(self) -> RoleSettings:
        if len(set(self.models)) != len(self.models):
            raise ValueError("models: a model is listed twice; list each once")
        if self.long_context is not None and self.tasks is None:
            raise ValueError(f"long_context: {str(self.long_context)!r} needs tasks as well; give tasks")
        return self
