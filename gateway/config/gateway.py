"""Where the gateway listens, and its limits."""

from __future__ import annotations

import os
import re
from enum import StrEnum
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from gateway.config.section import ConfigError, Section, Variable, is_loopback

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9._\-\[\]:]+")
POLICIES = ("round_robin", "least_in_flight", "least_load", "session_affinity", "prefix_aware")


class Cost(StrEnum):
    """What makes a variant cheap."""

    MEMORY = "memory"
    MEMORY_TIME = "memory_time"


class GatewaySettings(Section):
    """Where the gateway listens, and its limits."""

    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=1, le=65535)
    max_body_bytes: int = Field(default=32 << 20, ge=1024, description="of one request")
    max_connections: int = Field(default=10_000, ge=1, description="of clients, at a time and per worker")
    max_buffered_bytes: int = Field(
        default=512 << 20,
        ge=1024,
        description="of requests that are being read, wait or are being answered, at a time and per worker",
    )
    max_buffered_bytes_per_tenant: int = Field(
        default=128 << 20, ge=1024, description="of these, one tenant's"
    )
    connect_timeout_s: float = Field(default=2.0, gt=0)
    engine_key_env: Variable | None = Field(
        default=None,
        description="environment variable with the key that the engines ask for (vLLM's --api-key)",
    )
    first_byte_timeout_s: float = Field(
        default=120.0, gt=0, description="longest time until the first part of a stream"
    )
    answer_timeout_s: float = Field(
        default=600.0, gt=0, description="longest time for an answer that is not streamed"
    )
    idle_timeout_s: float = Field(default=60.0, gt=0, description="longest silence within a stream")
    total_timeout_s: float = Field(default=3600.0, gt=0, description="longest time for one answer")
    header_timeout_s: float = Field(default=10.0, gt=0, description="for the head of a request to come")
    body_timeout_s: float = Field(default=30.0, gt=0, description="longest silence within a request's body")
    min_body_bytes_per_s: int = Field(
        default=4096,
        ge=0,
        description="a request's body that comes slower all in all is refused, after body_timeout_s",
    )
    keep_alive_s: float = Field(default=75.0, gt=0, description="an idle client connection is closed then")
    policy: str = Field(default="prefix_aware", description="how a replica is chosen within a pool")
    cost: Cost = Field(
        default=Cost.MEMORY,
        description="by what the cheapest variant is chosen: memory (bytes with a busy KV cache), or "
        "memory_time (those bytes times the seconds that its engine took for a token, by its card)",
    )
    max_pattern_size: int = Field(
        default=2000,
        ge=1,
        description="letters and classes of a pattern in a request's schemas, counted repetitions written "
        "out; of all of a request together four times as many. Engines take seconds and more for larger ones",
    )
    max_schema_count: int = Field(
        default=50_000,
        ge=1,
        description="minItems and maxItems in a request's schemas together, and the least common multiple of "
        "their multipleOf: an engine may take minutes for larger ones, or its memory",
    )
    max_in_flight: int | None = Field(default=None, ge=1, description="requests at a replica at a time")
    hedge_share: float = Field(
        default=0.05, ge=0, le=1, description="of the requests of roles that are hedged, that are at most"
    )
    workers: int = Field(default=1, ge=1, le=64, description="processes that share the port")
    tls_certificate: Path | None = Field(default=None, description="PEM file; with tls_key: HTTPS")
    tls_key: Path | None = None
    cors_origins: tuple[str, ...] = Field(
        default=(),
        description="origins whose web pages may ask, such as https://app.example.com, or * for all; "
        "empty: none",
    )
    access_log: bool = Field(default=True, description="a line per request; errors are logged anyway")
    scrape_interval_s: float = Field(default=2.0, gt=0, description="how often engine metrics are read")
    health_interval_s: float = Field(default=1.0, gt=0, description="how often replicas are probed")
    shutdown_timeout_s: float = Field(
        default=20.0, gt=0, description="longest wait for running requests when the gateway stops"
    )

    @field_validator("policy")
    @classmethod
    def _known_policy(cls, policy: str) -> str:
        if policy not in POLICIES:
            raise ValueError(f"{policy!r} is not a policy; use one of: {', '.join(POLICIES)}")
        return policy

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is no origin; write scheme://host or scheme://host:port, or *")
        return origins

    @model_validator(mode="after")
    def _both_or_none(self) -> GatewaySettings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together; give both or none")
        return self

    def engine_key(self) -> str | None:
        """The key that engines ask for. Raises ConfigError for a variable that has none."""
        if self.engine_key_env is None:
            return None
        key = os.environ.get(self.engine_key_env, "")
        if not key or not key.isascii() or not key.isprintable() or key != key.strip():
            raise ConfigError(
                f"gateway.engine_key_env: the environment has no key in {self.engine_key_env!r}; set it to "
                "the one that the engines were started with (--api-key), in printable ASCII"
            )
        return key

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return is_loopback(self.host)
