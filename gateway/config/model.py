"""The models of the fleet: base checkpoints, their variants, and how their engines run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from gateway.config.conversations import Conversations
from gateway.config.engine import Engine, EngineChanges
from gateway.config.roles import RoleSettings
from gateway.config.section import Section

MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._/-]*$"
LONGEST_NAME = 128
ModelName = Annotated[str, Field(pattern=MODEL_NAME, max_length=LONGEST_NAME)]
"""What clients call a model, and its files. It may be a hub id, and never has the colon that parts it from a
variant."""
_HUB_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$"


class Model(Section):
    """A base checkpoint, by a local Hugging Face directory or a hub id, and the variants of it that serve."""

    path: Path | None = Field(default=None, description="a Hugging Face directory")
    hub: str | None = Field(
        default=None, pattern=_HUB_ID, description="a hub id; its files are kept in variants_dir"
    )
    revision: str | None = Field(
        default=None, description="of the hub's repository; default: its main branch"
    )
    reference: str = Field(default="bf16", description="the variant that the others are compared with")
    serve: tuple[str, ...] = Field(min_length=1, description="variants that have a pool")
    calibration: Path | None = Field(
        default=None,
        description="JSON Lines of conversations; those that end with a question the reference answers",
    )
    engine: EngineChanges = Field(
        default=EngineChanges(), description="what of the section engine is otherwise for this model"
    )

    @model_validator(mode="after")
    def _lies_somewhere(self) -> Model:
        if (self.path is None) == (self.hub is None):
            raise ValueError("path and hub both say where the checkpoint is; give one of them")
        if self.revision is not None and self.hub is None:
            raise ValueError("revision: is of a hub's repository; give hub, or leave it out")
        if len(set(self.serve)) != len(self.serve):
            raise ValueError("serve: a variant is listed twice; list each once")
        return self


@dataclass(frozen=True)
class ModelConfig:
    """One model with everything of the configuration that concerns it. Variants are named without it here."""

    name: str
    path: Path
    """A Hugging Face directory; of a hub's model where its files are kept, whether they are there or not."""
    hub: str | None
    revision: str | None
    variants_dir: Path
    """Of this model alone."""
    reference: str
    serve: tuple[str, ...]
    calibration: Path | None
    engine: Engine
    """With what the model changes."""
    roles: Mapping[str, RoleSettings]
    """Those that it may serve."""
    pools: Mapping[str, tuple[str, ...]]
    """Variant to base URLs, of pools that are not started here."""
    ports: Mapping[str, int]
    """Variant to its local engine's port."""
    run_dir: Path
    conversations: Conversations

    def id(self, variant: str) -> str:
        """The variant's name in the fleet."""
        return variant_id(self.name, variant)

    def log(self, variant: str) -> Path:
        """Where its engine writes."""
        return self.run_dir / "logs" / f"engine-{slug(self.name)}-{variant}.log"


def variant_id(model: str, variant: str) -> str:
    """What a variant is called in the whole fleet, by clients too: ``model:variant``."""
    return f"{model}:{variant}"


def parts_of(identity: str) -> tuple[str, str]:
    """Model and variant of a ``model:variant``; of a name without a colon the model is empty."""
    model, _, variant = identity.rpartition(":")
    return model, variant


def slug(model: str) -> str:
    """A model's name as a file's: hub ids have a slash."""
    return re.sub("/", "--", model)
