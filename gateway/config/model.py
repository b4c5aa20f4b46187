"""The base checkpoint."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from gateway.config.section import Section


class Model(Section):
    """The base checkpoint: a local Hugging Face directory, and the name that clients use."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")
    path: Path
