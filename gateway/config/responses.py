"""Responses that are kept, so that `previous_response_id` works whichever engine is asked next."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator, model_validator

from gateway.config.section import Secret, Section, Variable

STORES = ("sqlite", "postgresql")


class ResponsesSettings(Section):
    """What `/v1/responses` keeps of a conversation: its content, since its client goes on from it."""

    enabled: bool = Field(
        default=True, description="false keeps nothing, and previous_response_id is refused"
    )
    store: Annotated[str | None, Secret.URL] = Field(
        default=None,
        description="SQLAlchemy URL (SQLite or PostgreSQL) of what all gateways share. Default: this "
        "process's memory, since prompts and answers are nobody's to find on a disk; only with several "
        "workers, any of which may be asked next, a SQLite file in run_dir that its owner alone can read",
    )
    store_env: Variable | None = Field(
        default=None, description="environment variable that holds that URL, where it has a password"
    )
    by_default: bool = Field(
        default=True,
        description="whether a response is kept whose client does not say `store`, as at OpenAI",
    )
    keep_s: float = Field(
        default=86_400.0, gt=0, description="from the last use of a response until it is forgotten"
    )
    max_responses: int = Field(default=10_000, ge=1, description="of a tenant; the oldest leave")
    max_bytes: int = Field(default=256 << 20, ge=1024, description="of all tenants")
    max_tenant_bytes: int = Field(default=64 << 20, ge=1024, description="of one tenant")
    max_turns: int = Field(default=500, ge=1, description="responses in one conversation")
    max_conversation_bytes: int = Field(
        default=8 << 20, ge=1024, description="of one conversation, which an engine is sent whole"
    )
    max_background: int = Field(
        default=16, ge=0, description="`background: true` of one tenant under way at a time, in each worker"
    )

    @field_validator("store")
    @classmethod
    def _known_database(cls, url: str | None) -> str | None:
        if url is not None:
            check_url("responses.store", url, STORES)
        return url

    @model_validator(mode="after")
    def _one_store(self) -> ResponsesSettings:
        if self.store is not None and self.store_env is not None:
            raise ValueError("store and store_env both say where the store is; give one")
        return self


def check_url(setting: str, url: str, databases: tuple[str, ...] = ()) -> None:
    """Raises ValueError for what is no database's URL, or that of one that cannot be used; never shows it."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    example = "postgresql+psycopg://USER:PASSWORD@HOST/NAME"
    try:
        name = make_url(url).get_backend_name()
    except ArgumentError:
        raise ValueError(f"{setting}: is no database URL; give one such as {example}") from None
    if databases and name not in databases:
        raise ValueError(f"{setting}: {name!r} cannot be used; give one of {', '.join(databases)}: {example}")
