"""The one YAML file that everything is configured by, validated into frozen models.

Relative paths are relative to the file's own directory. An unknown key, a wrong type or a name that
refers to nothing is a ConfigError whose text gives the key, the value and the fix.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from quantize.gate import QualityBudget


class ConfigError(ValueError):
    """The configuration cannot be used. The text names the file, the key, the value and the fix."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(_Section):
    """The base checkpoint: a local Hugging Face directory, and the name that clients use."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")
    path: Path


class Role(_Section):
    """What an agent does, and the quality it needs."""

    budget: QualityBudget = QualityBudget()
    agents: tuple[str, ...] = Field(default=(), description="agent names that mean this role")
    grounded: bool = Field(default=False, description="check answers against the conversation's context")
    tasks: Path | None = Field(default=None, description="JSON Lines of held-out items for the gate")
    long_context: Path | None = Field(
        default=None, description="the same with prompts that fill the context, judged apart from tasks"
    )

    @model_validator(mode="after")
    def _has_tasks_too(self) -> Role:
        if self.long_context is not None and self.tasks is None:
            raise ValueError(f"long_context: {str(self.long_context)!r} needs tasks as well; give tasks")
        return self


class Engine(_Section):
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
    extra_args: tuple[str, ...] = ()
    env: dict[str, str] = Field(default_factory=dict)


class Gateway(_Section):
    """Where the gateway listens, and its limits."""

    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=1, le=65535)
    max_body_bytes: int = Field(default=8 << 20, ge=1024)
    connect_timeout_s: float = Field(default=2.0, gt=0)
    first_byte_timeout_s: float = Field(
        default=120.0, gt=0, description="for an answer that is not streamed this is the whole answer"
    )
    idle_timeout_s: float = Field(default=60.0, gt=0, description="longest silence within a stream")
    scrape_interval_s: float = Field(default=2.0, gt=0, description="how often engine metrics are read")
    health_interval_s: float = Field(default=1.0, gt=0, description="how often replicas are probed")
    shutdown_timeout_s: float = Field(
        default=20.0, gt=0, description="longest wait for running requests when the gateway stops"
    )

    @field_validator("host")
    @classmethod
    def _loopback_only(cls, host: str) -> str:
        if host not in ("127.0.0.1", "::1", "localhost"):
            raise ValueError(
                f"{host!r} is reachable from other machines and this version has no API keys; "
                "use 127.0.0.1 behind a proxy that authenticates"
            )
        return host


class Provider(_Section):
    """A model that does not run on a pool of ours; LiteLLM reaches it."""

    model: str = Field(description="the id that clients ask for")
    litellm_model: str = Field(description="LiteLLM's name, such as openai/gpt-4o or ollama/llama3")
    api_base: str | None = None
    api_key_env: str | None = Field(default=None, description="environment variable that holds the key")


class Quality(_Section):
    """Quality signals on live answers."""

    logprobs: bool = Field(default=True, description="ask engines for log-probabilities")
    top_logprobs: int = Field(default=5, ge=0, le=20, description="tokens that entropy is summed over")


class Config(_Section):
    """The whole file."""

    model: Model
    variants_dir: Path
    reference: str = "bf16"
    serve: tuple[str, ...] = Field(min_length=1, description="variants that have a pool")
    roles: dict[str, Role] = Field(min_length=1)
    default_role: str
    calibration: Path | None = Field(default=None, description="JSON Lines of conversations")
    pools: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="replica base URLs of pools that are not started here"
    )
    providers: tuple[Provider, ...] = ()
    run_dir: Path = Path("var/run")
    gateway: Gateway = Gateway()
    engine: Engine = Engine()
    quality: Quality = Quality()

    @model_validator(mode="after")
    def _names_refer_to_something(self) -> Config:
        if self.reference not in self.serve:
            raise ValueError(f"serve: must contain the reference {self.reference!r}; add it")
        if len(set(self.serve)) != len(self.serve):
            raise ValueError("serve: a variant is listed twice; list each once")
        if self.default_role not in self.roles:
            raise ValueError(
                f"default_role: {self.default_role!r} is not a role; known: {_known(self.roles)}"
            )
        for variant in self.pools:
            if variant not in self.serve:
                raise ValueError(f"pools.{variant}: not a served variant; known: {_known(self.serve)}")
        agents: dict[str, str] = {}
        for name, role in self.roles.items():
            for agent in role.agents:
                if agents.setdefault(agent, name) != name:
                    raise ValueError(f"roles.{name}.agents: {agent!r} already belongs to {agents[agent]}")
        if self.model.name in self.roles:
            raise ValueError(f"roles.{self.model.name}: is also the model's name; rename one")
        taken = {self.model.name, *self.roles, *(f"{self.model.name}:{name}" for name in self.serve)}
        for provider in self.providers:
            if provider.model in taken:
                raise ValueError(f"providers: {provider.model!r} is already a model or role; rename it")
            taken.add(provider.model)
        return self

    def replicas(self, variant: str) -> tuple[str, ...]:
        """Base URLs (no trailing slash) of a variant's pool: the given ones, else the local engine."""
        given = self.pools.get(variant)
        if given:
            return tuple(url.rstrip("/") for url in given)
        port = self.engine.base_port + self.serve.index(variant)
        return (f"http://{self.engine.host}:{port}",)

    def role_of_agent(self, agent: str) -> str | None:
        """The role that an agent's name stands for: a role's own name, or one of its ``agents``."""
        if agent in self.roles:
            return agent
        return next((name for name, role in self.roles.items() if agent in role.agents), None)


def _known(names: Any) -> str:
    return ", ".join(sorted(names))


def load_config(path: Path) -> Config:
    """Read and validate the YAML at ``path``. Raises ConfigError."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give the configuration with --config FILE") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must be a mapping of settings, got {type(raw).__name__}")
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: " + "; ".join(_explain(item) for item in error.errors())) from None
    return _absolute(config, path.resolve().parent)


def _explain(item: Any) -> str:
    """One pydantic error as a sentence: key, value, fix."""
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = _keys_at(item["loc"][:-1])
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        fix = f"did you mean {close[0]!r}?" if close else f"known keys: {_known(known)}"
        return f"{key}: unknown key; {fix}"
    if item["type"] == "missing":
        return f"{key}: is required; add it"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return message if not key else f"{key}: {message}"
    return f"{key}: {message}, got {item['input']!r}"


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    """The keys that are allowed at a place of the file."""
    here: Any = Config
    for part in location:
        if isinstance(here, type) and issubclass(here, BaseModel) and part in here.model_fields:
            here = here.model_fields[str(part)].annotation
            here = next(
                (
                    a
                    for a in getattr(here, "__args__", ())
                    if isinstance(a, type) and issubclass(a, BaseModel)
                ),
                here,
            )
    if isinstance(here, type) and issubclass(here, BaseModel):
        return list(here.model_fields)
    return []


def _absolute(config: Config, base: Path) -> Config:
    """The same configuration with every path absolute."""

    def at(path: Path | None) -> Path | None:
        return None if path is None else base / path

    roles = {
        name: role.model_copy(update={"tasks": at(role.tasks), "long_context": at(role.long_context)})
        for name, role in config.roles.items()
    }
    python = config.engine.python or Path(".venv-engine/bin/python")
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": at(config.model.path)}),
            "variants_dir": at(config.variants_dir),
            "calibration": at(config.calibration),
            "run_dir": at(config.run_dir),
            "engine": config.engine.model_copy(update={"python": at(python)}),
            "roles": roles,
        }
    )
