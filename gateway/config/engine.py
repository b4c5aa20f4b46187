"""Local engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from gateway.config.section import Secret, Section


class Engine(Section):
    """How local vLLM engines are started."""

    host: str = "127.0.0.1"
    base_port: int = Field(
        default=8101, ge=1024, le=65000, description="first engine's port; the next add one"
    )
    max_model_len: int = Field(default=1024, ge=64)
    kv_cache_gib: int = Field(default=1, ge=1, description="KV-cache space per engine on a CPU, GiB")
    max_num_seqs: int = Field(default=64, ge=1)
    start_timeout_s: float = Field(default=300.0, gt=0)
    stop_timeout_s: float = Field(default=20.0, gt=0)
    python: Path | None = Field(
        default=None, description="the engine environment's interpreter; default .venv-engine/bin/python"
    )
    extra_args: Annotated[tuple[str, ...], Secret.OPTIONS] = ()
    env: Annotated[dict[str, str], Secret.ALL] = Field(default_factory=dict)
