"""What a role tolerates."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

LEAST_REFERENCE_ACCURACY = 0.1


class QualityBudget(BaseModel):
    """What a role tolerates. Every limit that is set must hold; the reference itself always may serve."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_accuracy_drop: float | None = Field(
        default=0.02,
        ge=0,
        le=1,
        description="largest drop in accuracy against the reference; null where items have no right answers",
    )
    min_accuracy: float | None = Field(default=None, ge=0, le=1)
    min_reference_accuracy: float = Field(
        default=LEAST_REFERENCE_ACCURACY,
        ge=0,
        lt=1,
        description="a drop against a reference that is not shown to be better than this says nothing",
    )
    max_kl: float | None = Field(
        default=0.1, ge=0, description="largest mean KL on the role's answers, nats per token"
    )
    max_grounded_drop: float | None = Field(
        default=None, ge=0, le=1, description="largest drop in the share of answers without invented words"
    )
    min_valid_json: float | None = Field(
        default=None, ge=0, le=1, description="smallest share of answers that match their JSON schema"
    )
    max_long_context_loss: float | None = Field(
        default=None,
        ge=0,
        description="largest loss of log-probability of right answers from a full context, nats per token",
    )
    min_weight_bits: int | None = Field(default=None, ge=1, le=32, description="policy, whatever is measured")

    @model_validator(mode="after")
    def _sets_a_limit(self) -> QualityBudget:
        limits = (
            self.max_accuracy_drop,
            self.min_accuracy,
            self.max_kl,
            self.max_grounded_drop,
            self.min_valid_json,
            self.max_long_context_loss,
        )
        if all(limit is None for limit in limits):
            raise ValueError("no limit is set, so nothing could fail; set max_kl or max_accuracy_drop")
        return self
