"""What of live traffic is kept, where, how long, and by whose consent."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator, model_validator

from gateway.config.section import Secret, Section, Variable
from gateway.kept.patterns import PatternError
from gateway.kept.redact import own_pattern

CONSENT = (
    "what agents ask and are answered would be kept, redacted and encrypted; to consent add the section "
    "`kept: {}` (its settings say where, how long, and what else is redacted)"
)
"""What is said wherever something would be kept and nobody has agreed to that."""


class Recording(Section):
    """A role's consent: a sample of what it is asked becomes items (`tiercel tasks record`)."""

    most: int = Field(
        default=300, ge=1, le=100_000, description="conversations of the role; the oldest leave"
    )
    rate: float = Field(default=0.1, gt=0, le=1, description="share of its requests")


class KeptSettings(Section):
    """Where kept conversations lie. Without this section nothing is kept."""

    key_env: Variable | None = Field(
        default=None,
        description="environment variable with the key, 32 bytes in base64; default: a file in run_dir that "
        "its owner alone can read, made at first use",
    )
    store: Annotated[str | None, Secret.URL] = Field(
        default=None, description="SQLAlchemy URL of what all gateways share; default: SQLite in run_dir"
    )
    store_env: Variable | None = Field(
        default=None, description="environment variable that holds that URL, where it has a password"
    )
    days: float = Field(default=30.0, gt=0, description="until a conversation is forgotten")
    max_bytes: int = Field(default=64 << 20, ge=1024, description="of all of them; the oldest leave")
    redact: tuple[str, ...] = Field(
        default=(),
        description="RE2's patterns of what is replaced beside addresses, numbers and keys",
    )

    @field_validator("redact")
    @classmethod
    def _are_patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                own_pattern(pattern)
            except PatternError as error:
                raise ValueError(f"{pattern!r}: {error}") from None
        return patterns

    @model_validator(mode="after")
    def _one_store_and_its_key(self) -> KeptSettings:
        if self.store is not None and self.store_env is not None:
            raise ValueError("store and store_env both say where the store is; give one")
        if (self.store is not None or self.store_env is not None) and self.key_env is None:
            raise ValueError(
                "a store that several gateways share needs one key for all of them; name the environment "
                "variable that holds it in key_env"
            )
        return self
