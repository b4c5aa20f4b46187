"""What the reference is asked where a role has no tasks, or a model no calibration."""

from __future__ import annotations

from pydantic import Field

from gateway.config.section import Section


class Conversations(Section):
    """The conversations that ship with the product: some calibrate, others judge."""

    count: int | None = Field(
        default=None,
        ge=2,
        description="how many the reference answers, half to calibrate, half to judge; "
        "default: all on GPUs, 192 to calibrate and 96 to judge on a CPU",
    )
    max_tokens: int | None = Field(
        default=None, ge=1, description="of an answer; default: 256 on GPUs, 64 on a CPU"
    )
