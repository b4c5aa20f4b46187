"""Local engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from gateway.config.section import Secret, Section

GIB = 1 << 30
MOST_KV_GIB = 4
"""KV cache that an engine gets by itself at most; a longer context than it holds must be asked for."""
SPARE_TOKENS = 256
"""Of a KV cache, that no prompt gets: vLLM keeps one block to itself and gives a prompt whole blocks, of 128
tokens on a CPU and fewer on GPUs."""


def tokens_held(cache_bytes: int, token_bytes: int) -> int:
    """The longest prompt that a KV cache holds, in steps of 64 tokens; 0 or less where it is none."""
    return (cache_bytes // max(1, token_bytes) - SPARE_TOKENS) // 64 * 64


def cache_for(tokens: int, token_bytes: int) -> int:
    """Bytes of the KV cache that holds a prompt of so many tokens, a whole number of GiB."""
    return max(1, -(-(tokens + SPARE_TOKENS) * token_bytes // GIB)) * GIB


_GIVEN = {
    "--port": "engine.base_port",
    "--host": "engine.host",
    "--model": "path or hub of the model",
    "--served-model-name": "the model's name in models",
}
"""Options of an engine that follow from settings, and from which."""


def _refuse_given(arguments: tuple[str, ...]) -> tuple[str, ...]:
    for option in (argument.partition("=")[0] for argument in arguments):
        if option in _GIVEN:
            raise ValueError(f"{option} is set by Tiercel; set {_GIVEN[option]} instead")
    return arguments


Arguments = Annotated[tuple[str, ...], Secret.OPTIONS, AfterValidator(_refuse_given)]


class Engine(Section):
    """How local vLLM engines are started."""

    host: str = "127.0.0.1"
    base_port: int = Field(
        default=8101, ge=1024, le=65000, description="first engine's port; the next add one"
    )
    max_model_len: int | None = Field(
        default=None,
        ge=64,
        description="tokens of prompt and answer together; default: the model's, as far as the KV cache "
        "holds them",
    )
    kv_cache_gib: int | None = Field(
        default=None,
        ge=1,
        description="KV-cache space per engine, GiB; default: what one longest prompt needs, 1 to "
        f"{MOST_KV_GIB}, or more where max_model_len asks for it",
    )
    max_num_seqs: int = Field(default=64, ge=1)
    start_timeout_s: float | None = Field(
        default=None, gt=0, description="default: 300 s, and a second for every 50 MB of weights"
    )
    stop_timeout_s: float = Field(
        default=20.0, gt=0, description="for an engine that is stopped to finish what it has begun"
    )
    python: Path | None = Field(
        default=None, description="the engine environment's interpreter; default .venv-engine/bin/python"
    )
    extra_args: Arguments = ()
    env: Annotated[dict[str, str], Secret.ALL] = Field(default_factory=dict)

    def context(self, longest: int, kv_bytes_per_token: int) -> int:
        """Tokens that an engine takes of a model that knows ``longest``: all, or what its cache holds."""
        if self.max_model_len is not None:
            return min(self.max_model_len, longest)
        room = (self.kv_cache_gib or MOST_KV_GIB) * GIB
        return min(longest, max(64, tokens_held(room, kv_bytes_per_token)))

    def kv_bytes(self, longest: int, kv_bytes_per_token: int) -> int:
        """Bytes of the KV cache of one engine, a whole number of GiB that holds one longest prompt."""
        if self.kv_cache_gib is not None:
            return self.kv_cache_gib * GIB
        return cache_for(self.context(longest, kv_bytes_per_token), kv_bytes_per_token)

    def changed(self, changes: EngineChanges) -> Engine:
        """With a model's own settings: its arguments come after the shared ones, its environment on top."""
        given = {name: value for name, value in dict(changes).items() if value is not None}
        given["extra_args"] = (*self.extra_args, *changes.extra_args)
        given["env"] = {**self.env, **changes.env}
        return self.model_copy(update=given)

    def patience_s(self, weight_bytes: int) -> float:
        """Seconds that an engine may take to load so many bytes and be ready."""
        return self.start_timeout_s or 300.0 + weight_bytes / 50e6


class EngineChanges(Section):
    """What of :class:`Engine` one model has otherwise; what is not given is as it is for all."""

    max_model_len: int | None = Field(default=None, ge=64)
    kv_cache_gib: int | None = Field(default=None, ge=1)
    max_num_seqs: int | None = Field(default=None, ge=1)
    start_timeout_s: float | None = Field(default=None, gt=0)
    extra_args: Arguments = Field(default=(), description="after the shared ones")
    env: Annotated[dict[str, str], Secret.ALL] = Field(default_factory=dict, description="on top")
