"""Keys, adapters and providers: who may ask, and what beside the base model may be asked."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gateway.config.section import Secret, Section, Variable

MOST_PRIORITY = 100
PRIORITY = Field(
    default=0,
    ge=-MOST_PRIORITY,
    le=MOST_PRIORITY,
    description="vLLM's: higher comes later; a key's and a role's are added up. Other than 0 it needs "
    "engines that were started with --scheduling-policy priority",
)


class ApiKey(Section):
    """An API key: whose it is, and what it may do. Only its hash is kept here."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    sha256: Annotated[str, Secret.ALL] = Field(
        pattern=r"^[0-9a-f]{64}$", description="of the key; `tiercel keys new` makes one and prints it"
    )
    tenant: str = Field(
        default="", description="who shares what is kept and cached for it; empty: it alone does"
    )
    roles: tuple[str, ...] = Field(default=(), description="roles it may use; empty: all")
    models: tuple[str, ...] = Field(
        default=(),
        description="models it may use; empty: all. A base model's name stands for its variants too, and "
        "for the roles that it may serve",
    )
    role: str | None = Field(default=None, description="the role of all its requests")
    default_role: str | None = Field(default=None, description="the role of requests that name none")
    lowest: str | None = Field(default=None, description="the least precise variant it may ask for")
    priority: int = PRIORITY
    admin: bool = False


class Adapter(Section):
    """A LoRA adapter that engines know by this name (vLLM's ``--lora-modules``)."""

    variants: tuple[str, ...] = Field(
        default=(), description="whose engines have it; empty: all that are served"
    )


class Provider(Section):
    """A model that does not run on a pool of ours; LiteLLM reaches it."""

    model: str = Field(description="the id that clients ask for")
    litellm_model: str = Field(description="LiteLLM's name, such as openai/gpt-4o or ollama/llama3")
    api_base: Annotated[str | None, Secret.URL] = None
    api_key_env: Variable | None = Field(default=None, description="environment variable that holds the key")
