"""The whole file, and how its parts refer to each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PrivateAttr, model_validator

from gateway.config.access import Adapter, ApiKey, Provider
from gateway.config.engine import Engine
from gateway.config.gateway import GatewaySettings
from gateway.config.model import Model
from gateway.config.quality import Quality
from gateway.config.responses import ResponsesSettings, check_url
from gateway.config.roles import RoleSettings
from gateway.config.section import Secret, Section, shown_url
from gateway.config.watch import WatchSettings


class Config(Section):
    """The whole file."""

    model: Model
    variants_dir: Path
    reference: str = "bf16"
    serve: tuple[str, ...] = Field(min_length=1, description="variants that have a pool")
    roles: dict[str, RoleSettings] = Field(min_length=1)
    default_role: str
    calibration: Path | None = Field(default=None, description="JSON Lines of conversations")
    pools: Annotated[dict[str, tuple[str, ...]], Secret.URL] = Field(
        default_factory=dict, description="replica base URLs of pools that are not started here"
    )
    providers: tuple[Provider, ...] = ()
    adapters: dict[str, Adapter] = Field(
        default_factory=dict, description="LoRA adapters, by the model id that clients and engines use"
    )
    keys: tuple[ApiKey, ...] = ()
    run_dir: Path = Path("var/run")
    gateway: GatewaySettings = GatewaySettings()
    engine: Engine = Engine()
    quality: Quality = Quality()
    watch: WatchSettings = WatchSettings()
    responses: ResponsesSettings = ResponsesSettings()
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
                f"default_role: {self.default_role!r} is not a role; known: {names_of(self.roles)}"
            )
        for variant in self.pools:
            if variant not in self.serve:
                raise ValueError(f"pools.{variant}: not a served variant; known: {names_of(self.serve)}")
        for variant, urls in self.pools.items():
            for url in urls:
                if not url.removeprefix("dns+").startswith(("http://", "https://")):
                    raise ValueError(
                        f"pools.{variant}: {shown_url(url)!r} is no URL of an engine; give http://HOST:PORT, "
                        "or dns+http://NAME:PORT for every address of a name"
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
                    f"known: {names_of(self.serve)}"
                )
        self._check_keys()
        if (judge := self.watch.judge) is not None:
            models = {self.model.name, *(f"{self.model.name}:{variant}" for variant in self.serve)}
            models |= {provider.model for provider in self.providers}
            if judge.model not in models:
                raise ValueError(
                    f"watch.judge.model: {judge.model!r} does not exist; known: {names_of(models)}"
                )
        if self.watch.store is not None:
            check_url("watch.store", self.watch.store)
        self._check_model_names()
        return self

    def _check_model_names(self) -> None:
        """A client names a model, a role, an adapter or a provider's model, and each name is one thing."""
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
                        f"known: {names_of(self.serve)}"
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
        models = {self.model.name, *self.roles, *(f"{self.model.name}:{variant}" for variant in self.serve)}
        models |= {*self.adapters, *(provider.model for provider in self.providers)}
        for key in self.keys:
            for role in (*key.roles, *filter(None, (key.role, key.default_role))):
                if role not in self.roles:
                    raise ValueError(
                        f"keys.{key.name}: {role!r} is not a role; known: {names_of(self.roles)}"
                    )
                if key.roles and role not in key.roles:
                    raise ValueError(f"keys.{key.name}: its role {role!r} is not among its roles; add it")
            for model in key.models:
                if model not in models:
                    raise ValueError(
                        f"keys.{key.name}.models: {model!r} does not exist; known: {names_of(models)}"
                    )
            if key.lowest is not None and key.lowest not in self.serve:
                raise ValueError(
                    f"keys.{key.name}.lowest: {key.lowest!r} is not a served variant; "
                    f"known: {names_of(self.serve)}"
                )

    def replicas(self, variant: str) -> tuple[str, ...]:
        """Base URLs (no trailing slash) of a variant's pool: the given ones, else the local engine."""
        given = self.pools.get(variant)
        if given:
            return tuple(url.rstrip("/") for url in given)
        port = self.engine.base_port + self.serve.index(variant)
        return (f"http://{self.engine.host}:{port}",)


def names_of(names: Any) -> str:
    return ", ".join(sorted(names))
