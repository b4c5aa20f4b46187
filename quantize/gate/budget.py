"""What a role tolerates.

Which limits hold depends on the evidence. Where a role has items with right answers, those that are set do.
Where it has none, the reference's own answers to conversations take their place: :meth:`QualityBudget.by`.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from quantize.card import Evidence
from quantize.gate.flags import refuse_flags

LEAST_REFERENCE_ACCURACY = 0.1
FIRST_CHOICES = 0.88
"""Default of ``min_first_choice_agreement`` where there are no labels."""
CHANGED_ANSWERS = 0.6
"""Default of ``max_changed_answers`` there."""
LOST_JSON = 0.25
"""Default of ``max_valid_json_drop`` there, where enough answers are asked to be JSON."""


class QualityBudget(BaseModel):
    """What a role tolerates. Every limit that is set must hold; the reference itself always may serve."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

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
    max_valid_json_drop: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="largest drop in the share of answers that match their JSON schema; without labels "
        f"{LOST_JSON} by default, where the reference can do it and enough are asked for",
    )
    min_first_choice_agreement: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="smallest share of tokens at which the likeliest is the reference's likeliest; without "
        f"labels {FIRST_CHOICES} by default, 0 switches it off",
    )
    max_changed_answers: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="largest share of answers that begin otherwise than the reference's, beyond those that "
        f"change by themselves; without labels {CHANGED_ANSWERS} by default, 1 switches it off",
    )
    max_long_context_loss: float | None = Field(
        default=None,
        ge=0,
        description="largest loss of log-probability of right answers from a full context, nats per token",
    )
    min_weight_bits: int | None = Field(default=None, ge=1, le=32, description="policy, whatever is measured")

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, given: Any) -> Any:
        return refuse_flags(cls, given)

    @model_validator(mode="after")
    def _sets_a_limit(self) -> QualityBudget:
        limits = (
            self.max_accuracy_drop,
            self.min_accuracy,
            self.max_kl,
            self.max_grounded_drop,
            self.min_valid_json,
            self.max_valid_json_drop,
            self.min_first_choice_agreement,
            self.max_changed_answers,
            self.max_long_context_loss,
        )
        if all(limit is None for limit in limits):
            raise ValueError("no limit is set, so nothing could fail; set max_kl or max_accuracy_drop")
        return self

    def by(self, evidence: Evidence) -> QualityBudget:
        """The limits that hold with that evidence.

        The reference's own answers are no right ones: ``max_accuracy_drop``, which has a default, does not
        hold, and what compares an answer with the reference's holds by default.
        """
        if evidence == "labels":
            return self
        defaults = {
            "min_first_choice_agreement": FIRST_CHOICES,
            "max_changed_answers": CHANGED_ANSWERS,
        }
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return self.model_copy(update={"max_accuracy_drop": None, **missing})
