"""Quality signals on live answers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from gateway.config.section import Section


class Quality(Section):
    """Quality signals on live answers."""

    logprobs: bool = Field(default=True, description="ask engines for log-probabilities")
    sample_rate: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="share of answers that are listened to; the others pass as bytes. Log-probabilities of "
        "all cost an engine an eighth of its rate (measured on a CPU), of a quarter 3 %",
    )
    top_logprobs: int = Field(default=5, ge=0, le=20, description="tokens that entropy is summed over")
    detector: Literal["rules", "lexical", "classifier"] = Field(
        default="rules", description="who looks for what an answer makes up, in roles that are grounded"
    )
    classifier: Path | None = Field(
        default=None,
        description="a model for sequence or token classification, for the detector of that name",
    )

    @model_validator(mode="after")
    def _has_a_classifier(self) -> Quality:
        if self.detector == "classifier" and self.classifier is None:
            raise ValueError("detector: 'classifier' needs classifier, the directory of its model; give it")
        return self
