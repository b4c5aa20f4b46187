"""The one YAML file that everything is configured by, validated into frozen models.

Relative paths are relative to the file's own directory. An unknown key, a wrong type or a name that
refers to nothing is a ConfigError whose text gives the key, the value and the fix.
"""

from __future__ import annotations

import difflib
from enum import StrEnum
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from quantize.gate import QualityBudget

POLICIES = ("round_robin", "least_in_flight", "least_load", "session_affinity", "prefix_aware")


WATCHED = ("shadow", "regenerated", "signals", "rules", "grounded", "judge")
"""Checks by which the watch acts."""


class ConfigError(ValueError):
    """The configuration cannot be used. The text names the file, the key, the value and the fix."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(_Section):
    """The base checkpoint: a local Hugging Face directory, and the name that clients use."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")
    path: Path


class WhenFull(StrEnum):
    """What becomes of a request when every replica of its variant is full."""

    RAISE = "raise"
    """A more precise variant takes it."""
    QUEUE = "queue"
    """It waits for a replica of this variant, up to ``wait_s``."""
    REFUSE = "refuse"


class Canary(_Section):
    """A share of a role's sessions that another variant serves."""

    variant: str
    percent: float = Field(ge=0, le=100)


class Role(_Section):
    """What an agent does, and the quality it needs."""

    budget: QualityBudget = QualityBudget()
    agents: tuple[str, ...] = Field(default=(), description="agent names that mean this role")
    grounded: bool = Field(default=False, description="check answers against the conversation's context")
    tasks: Path | None = Field(default=None, description="JSON Lines of held-out items for the gate")
    long_context: Path | None = Field(
        default=None, description="the same with prompts that fill the context, judged apart from tasks"
    )

    when_full: WhenFull = WhenFull.RAISE
    wait_s: float = Field(
        default=0.0, ge=0, description="how long a request may wait for a replica that starts or is full"
    )
    hedge: bool = Field(
        default=False, description="ask a second replica when the first is slower than 95 % of answers"
    )
    canary: Canary | None = None
    escalate: bool = Field(
        default=False,
        description="an answer that is not streamed and fails a check is asked of the next higher precision",
    )
    confidence: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="with escalate: also when the tokens' geometric mean probability is below this",
    )
    rates: dict[str, tuple[float, float]] = Field(
        default_factory=dict,
        description="check of the watch to the share of bad answers that is tolerated, and that alarms",
    )

    @field_validator("rates")
    @classmethod
    def _are_rates(cls, rates: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        for check, (tolerated, alarming) in rates.items():
            if check not in WATCHED:
                raise ValueError(f"{check!r} is not a check; known: {', '.join(WATCHED)}")
            if not 0 < tolerated < alarming < 1:
                raise ValueError(
                    f"{check}: [{tolerated}, {alarming}] must be two shares, the lower one first"
                )
        return rates

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


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Cost(StrEnum):
    """What makes a variant cheap."""

    MEMORY = "memory"
    MEMORY_TIME = "memory_time"


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
    total_timeout_s: float = Field(default=3600.0, gt=0, description="longest time for one answer")
    header_timeout_s: float = Field(default=10.0, gt=0, description="for the head of a request to come")
    body_timeout_s: float = Field(default=30.0, gt=0, description="longest silence within a request's body")
    keep_alive_s: float = Field(default=75.0, gt=0, description="an idle client connection is closed then")
    policy: str = Field(default="prefix_aware", description="how a replica is chosen within a pool")
    cost: Cost = Field(
        default=Cost.MEMORY,
        description="by what the cheapest variant is chosen: memory (bytes with a busy KV cache), or "
        "memory_time (those bytes times the seconds that its engine took for a token, by its card)",
    )
    max_in_flight: int | None = Field(default=None, ge=1, description="requests at a replica at a time")
    workers: int = Field(default=1, ge=1, le=64, description="processes that share the port")
    tls_certificate: Path | None = Field(default=None, description="PEM file; with tls_key: HTTPS")
    tls_key: Path | None = None
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

    @model_validator(mode="after")
    def _both_or_none(self) -> Gateway:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together; give both or none")
        return self

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return is_loopback(self.host)


class Key(_Section):
    """An API key: whose it is, and what it may do. Only its hash is kept here."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    sha256: str = Field(
        pattern=r"^[0-9a-f]{64}$", description="of the key; `tiercel keys new` makes one and prints it"
    )
    tenant: str = Field(default="", description="whose prefix cache is kept apart; empty: everybody's")
    roles: tuple[str, ...] = Field(default=(), description="roles it may use; empty: all")
    models: tuple[str, ...] = Field(default=(), description="models it may use; empty: all")
    role: str | None = Field(default=None, description="the role of all its requests")
    default_role: str | None = Field(default=None, description="the role of requests that name none")
    lowest: str | None = Field(default=None, description="the least precise variant it may ask for")
    admin: bool = False


class Adapter(_Section):
    """A LoRA adapter that engines know by this name (vLLM's ``--lora-modules``)."""

    variants: tuple[str, ...] = Field(
        default=(), description="whose engines have it; empty: all that are served"
    )


class Provider(_Section):
    """A model that does not run on a pool of ours; LiteLLM reaches it."""

    model: str = Field(description="the id that clients ask for")
    litellm_model: str = Field(description="LiteLLM's name, such as openai/gpt-4o or ollama/llama3")
    api_base: str | None = None
    api_key_env: str | None = Field(default=None, description="environment variable that holds the key")


class Quality(_Section):
    """Quality signals on live answers."""

    logprobs: bool = Field(default=True, description="ask engines for log-probabilities")
    sample_rate: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="share of answers that are listened to; the others pass as bytes. Log-probabilities of "
        "all cost an engine an eighth of its rate (measured on a CPU), of a quarter 3 %",
    )
    top_logprobs: int = Field(default=5, ge=0, le=20, description="tokens that entropy is summed over")
    detector: Literal["rules", "lexical", "classifier"] = Field(
        default="rules", description="who looks for what an answer makes up, in roles that are grounded"
    )
    classifier: Path | None = Field(
        default=None,
        description="a model for sequence or token classification, for the detector of that name",
    )

    @model_validator(mode="after")
    def _has_a_classifier(self) -> Quality:
        if self.detector == "classifier" and self.classifier is None:
            raise ValueError("detector: 'classifier' needs classifier, the directory of its model; give it")
        return self


class Judge(_Section):
    """Who judges whether an answer is grounded, beside the rules that need no model."""

    model: str = Field(description="the model (its reference), model:variant, or a provider's model")
    rate: float = Field(default=0.02, ge=0, le=1, description="share of answers of grounded roles")
    max_tokens: int = Field(default=512, ge=16)
    timeout_s: float = Field(default=60.0, gt=0)


class Watch(_Section):
    """Quantized answers compared with the reference's while they are served, and what follows from it."""

    enabled: bool = True
    store: str | None = Field(
        default=None, description="SQLAlchemy URL of what all gateways share; default: SQLite in run_dir"
    )
    store_env: str | None = Field(
        default=None, description="environment variable that holds that URL, where it has a password"
    )
    rate: float = Field(
        default=0.1, ge=0, le=1, description="share of quantized answers that the reference is asked about"
    )
    in_flight: int = Field(default=2, ge=1, description="requests of the watch under way at a time")
    queue: int = Field(default=64, ge=1, description="answers that wait for it; the oldest is given up first")
    busy_at: int = Field(
        default=32, ge=1, description="requests at a replica from which on the watch leaves it alone"
    )
    priority: int = Field(
        default=1000, ge=0, description="vLLM's: higher comes later; users' requests have 0"
    )
    timeout_s: float = Field(default=60.0, gt=0)
    answers_per_false_alarm: float = Field(
        default=1e6, ge=100, description="looked at, on average, until a healthy variant alarms"
    )
    agree: int = Field(default=2, ge=1, description="checks that must agree before a variant is demoted")
    demotions_per_hour: int = Field(default=6, ge=0)
    probation_after_s: float = Field(
        default=300.0, gt=0, description="from a demotion to its first probation; doubled after each failure"
    )
    probation_rate: float = Field(
        default=0.1, gt=0, le=1, description="share of the role's requests that it gets copies of"
    )
    escalated_share: float = Field(
        default=0.2, ge=0, le=1, description="of a role's answers, that may be asked again at most"
    )
    webhook: str | None = Field(default=None, description="URL that every event is posted to as JSON")
    judge: Judge | None = None

    @model_validator(mode="after")
    def _one_store(self) -> Watch:
        if self.store is not None and self.store_env is not None:
            raise ValueError("store and store_env both say where the store is; give one")
        return self


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
    adapters: dict[str, Adapter] = Field(
        default_factory=dict, description="LoRA adapters, by the model id that clients and engines use"
    )
    keys: tuple[Key, ...] = ()
    run_dir: Path = Path("var/run")
    gateway: Gateway = Gateway()
    engine: Engine = Engine()
    quality: Quality = Quality()
    watch: Watch = Watch()
    _directory: Path = PrivateAttr(default_factory=Path)

    @property
    def directory(self) -> Path:
        """Where the file lies that this was read from."""
        return self._directory

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
        for variant, urls in self.pools.items():
            for url in urls:
                if not url.removeprefix("dns+").startswith(("http://", "https://")):
                    raise ValueError(
                        f"pools.{variant}: {url!r} is no URL of an engine; give http://HOST:PORT, or "
                        "dns+http://NAME:PORT for every address of a name"
                    )
        agents: dict[str, str] = {}
        for name, role in self.roles.items():
            for agent in role.agents:
                if agents.setdefault(agent, name) != name:
                    raise ValueError(f"roles.{name}.agents: {agent!r} already belongs to {agents[agent]}")
        for name, role in self.roles.items():
            if role.canary and role.canary.variant not in self.serve:
                raise ValueError(
                    f"roles.{name}.canary.variant: {role.canary.variant!r} is not a served variant; "
                    f"known: {_known(self.serve)}"
                )
        self._check_keys()
        if (judge := self.watch.judge) is not None:
            models = {self.model.name, *(f"{self.model.name}:{variant}" for variant in self.serve)}
            models |= {provider.model for provider in self.providers}
            if judge.model not in models:
                raise ValueError(
                    f"watch.judge.model: {judge.model!r} does not exist; known: {_known(models)}"
                )
        if self.watch.store is not None:
            _check_url(self.watch.store)
        if self.model.name in self.roles:
            raise ValueError(f"roles.{self.model.name}: is also the model's name; rename one")
        taken = {self.model.name, *self.roles, *(f"{self.model.name}:{name}" for name in self.serve)}
        for name, adapter in self.adapters.items():
            if name in taken:
                raise ValueError(f"adapters.{name}: is already a model or role; rename it")
            taken.add(name)
            for variant in adapter.variants:
                if variant not in self.serve:
                    raise ValueError(
                        f"adapters.{name}.variants: {variant!r} is not a served variant; "
                        f"known: {_known(self.serve)}"
                    )
            if adapter.variants and self.reference not in adapter.variants:
                raise ValueError(
                    f"adapters.{name}.variants: must contain the reference {self.reference!r}, to which "
                    "requests go up; add it"
                )
        for provider in self.providers:
            if provider.model in taken:
                raise ValueError(f"providers: {provider.model!r} is already a model or role; rename it")
            taken.add(provider.model)
        return self

    def _check_keys(self) -> None:
        if not self.keys and not self.gateway.loopback:
            raise ValueError(
                f"gateway.host: {self.gateway.host!r} can be reached from other machines and there are no "
                "keys; add keys (`tiercel keys new` makes one) or listen on 127.0.0.1"
            )
        names = [key.name for key in self.keys]
        hashes = [key.sha256 for key in self.keys]
        if len(set(names)) < len(names) or len(set(hashes)) < len(hashes):
            raise ValueError("keys: a name or a hash is listed twice; list each once")
        for key in self.keys:
            for role in (*key.roles, *filter(None, (key.role, key.default_role))):
                if role not in self.roles:
                    raise ValueError(f"keys.{key.name}: {role!r} is not a role; known: {_known(self.roles)}")
                if key.roles and role not in key.roles:
                    raise ValueError(f"keys.{key.name}: its role {role!r} is not among its roles; add it")
            if key.lowest is not None and key.lowest not in self.serve:
                raise ValueError(
                    f"keys.{key.name}.lowest: {key.lowest!r} is not a served variant; "
                    f"known: {_known(self.serve)}"
                )

    def replicas(self, variant: str) -> tuple[str, ...]:
        """Base URLs (no trailing slash) of a variant's pool: the given ones, else the local engine."""
        given = self.pools.get(variant)
        if given:
            return tuple(url.rstrip("/") for url in given)
        port = self.engine.base_port + self.serve.index(variant)
        return (f"http://{self.engine.host}:{port}",)


def _check_url(url: str) -> None:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        make_url(url)
    except ArgumentError:
        raise ValueError(
            "watch.store: is no database URL; give one such as postgresql+psycopg://USER:PASSWORD@HOST/NAME"
        ) from None


def _known(names: Any) -> str:
    return ", ".join(sorted(names))


def load_config(path: Path) -> Config:
    """Read and validate the YAML at ``path``. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give the configuration with --config FILE") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; give a readable YAML file") from None
    return parse_config(text, str(path), path.resolve().parent)


def parse_config(text: str, source: str, directory: Path) -> Config:
    """Validate YAML. ``source`` is what errors call it; relative paths are relative to ``directory``.
    Raises ConfigError."""
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{source} must be a mapping of settings, got {type(raw).__name__}")
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(_explain(item) for item in error.errors())) from None
    return _absolute(config, directory)


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
    absolute = config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": at(config.model.path)}),
            "variants_dir": at(config.variants_dir),
            "calibration": at(config.calibration),
            "quality": config.quality.model_copy(update={"classifier": at(config.quality.classifier)}),
            "run_dir": at(config.run_dir),
            "engine": config.engine.model_copy(update={"python": at(python)}),
            "roles": roles,
            "gateway": config.gateway.model_copy(
                update={
                    "tls_certificate": at(config.gateway.tls_certificate),
                    "tls_key": at(config.gateway.tls_key),
                }
            ),
        }
    )
    absolute._directory = base
    return absolute
