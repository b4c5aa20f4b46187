"""The whole file, and how its parts refer to each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field, PrivateAttr, model_validator

from gateway.config.access import Adapter, ApiKey, Provider
from gateway.config.conversations import Conversations
from gateway.config.engine import Engine
from gateway.config.gateway import GatewaySettings
from gateway.config.kept import CONSENT, KeptSettings
from gateway.config.model import Model, ModelConfig, ModelName, parts_of, slug, variant_id
from gateway.config.quality import Quality
from gateway.config.responses import ResponsesSettings, check_url
from gateway.config.roles import RoleSettings
from gateway.config.section import Secret, Section, shown_url
from gateway.config.signals import Signals
from gateway.config.watch import WatchSettings

_HERE = ("127.0.0.1", "0.0.0.0", "::1", "::")
_ONE_MODEL = ("model", "serve", "reference", "calibration")
"""Keys of the time when a file had one model; they are a model's own now."""


class Config(Section):
    """The whole file. A variant is named ``model:variant`` in it, or by the variant alone where one model
    alone serves one of that name; here it is always the whole name."""

    models: dict[ModelName, Model] = Field(
        min_length=1, description="by the name that clients use; the first serves who names none"
    )
    variants_dir: Path = Field(description="where variants are kept, those of each model apart")
    roles: dict[str, RoleSettings] = Field(min_length=1)
    default_role: str
    pools: Annotated[dict[str, tuple[str, ...]], Secret.URL] = Field(
        default_factory=dict, description="variant to base URLs of replicas that are not started here"
    )
    providers: tuple[Provider, ...] = ()
    adapters: dict[str, Adapter] = Field(
        default_factory=dict, description="LoRA adapters, by the model id that clients and engines use"
    )
    keys: tuple[ApiKey, ...] = ()
    signals: Signals = Field(
        default=Signals(),
        description="which role is meant by what clients say of their agents by themselves",
    )
    run_dir: Path = Path("var/run")
    gateway: GatewaySettings = GatewaySettings()
    engine: Engine = Field(default=Engine(), description="of all models, as far as they change nothing")
    conversations: Conversations = Conversations()
    quality: Quality = Quality()
    watch: WatchSettings = WatchSettings()
    responses: ResponsesSettings = ResponsesSettings()
    kept: KeptSettings | None = Field(
        default=None, description="consent to keep conversations, redacted and encrypted, and where"
    )
    _directory: Path = PrivateAttr(default_factory=Path)

    @property
    def directory(self) -> Path:
        """Where the file lies that this was read from."""
        return self._directory

    @property
    def served(self) -> tuple[str, ...]:
        """Every variant that has a pool, as ``model:variant``."""
        return tuple(variant_id(name, one) for name, model in self.models.items() for one in model.serve)

    @property
    def default_model(self) -> str:
        """Of who names none, and of roles that name none."""
        return next(iter(self.models))

    @property
    def references(self) -> dict[str, str]:
        """Model to its reference as ``model:variant``, served or not."""
        return {name: variant_id(name, model.reference) for name, model in self.models.items()}

    def models_of(self, role: str) -> tuple[str, ...]:
        """Models that may serve a role, the one first that the others are measured against."""
        return self.roles[role].models or (self.default_model,)

    def of(self, name: str) -> ModelConfig:
        """A model, with everything that concerns it. Raises KeyError."""
        model = self.models[name]
        variants_dir = self.variants_dir / slug(name)
        first = self.served.index(variant_id(name, model.serve[0]))
        return ModelConfig(
            name=name,
            path=model.path or variants_dir / ".hub",
            hub=model.hub,
            revision=model.revision,
            variants_dir=variants_dir,
            reference=model.reference,
            serve=model.serve,
            calibration=model.calibration,
            engine=self.engine.changed(model.engine),
            roles={role: one for role, one in self.roles.items() if name in self.models_of(role)},
            pools={one: urls for one in model.serve if (urls := self.pools.get(variant_id(name, one)))},
            ports={one: self.engine.base_port + first + n for n, one in enumerate(model.serve)},
            run_dir=self.run_dir,
            conversations=self.conversations,
        )

    def each(self) -> tuple[ModelConfig, ...]:
        """All models."""
        return tuple(map(self.of, self.models))

    def replicas(self, variant: str) -> tuple[str, ...]:
        """Base URLs (no trailing slash) of a pool, by ``model:variant``: the given ones, else the local
        engine."""
        given = self.pools.get(variant)
        if given:
            return tuple(url.rstrip("/") for url in given)
        return (f"http://{self.engine.host}:{self.engine.base_port + self.served.index(variant)}",)

    @model_validator(mode="before")
    @classmethod
    def _has_several_models(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and (old := [key for key in _ONE_MODEL if key in raw]):
            model = raw.get("model")
            own = model if isinstance(model, dict) else {"path": model} if isinstance(model, str) else {}
            inner = {"path": own.get("path", "…"), **{key: raw[key] for key in old if key != "model"}}
            text = ", ".join(f"{key}: {_yaml(value)}" for key, value in inner.items())
            raise ValueError(
                f"{old[0]}: a fleet has several models now, and this belongs to one of them; write "
                f"models: {{ {own.get('name', 'NAME')}: {{ {text} }} }}"
            )
        return raw

    @model_validator(mode="after")
    def _names_refer_to_something(self) -> Config:
        if self.default_role not in self.roles:
            raise ValueError(
                f"default_role: {self.default_role!r} is not a role; known: {names_of(self.roles)}"
            )
        for name, model in self.models.items():
            if self.watch.reference == "live" and self.watch.enabled and model.reference not in model.serve:
                raise ValueError(
                    f"models.{name}.serve: must contain the reference {model.reference!r}, which the watch "
                    "asks; add it, or set watch.reference to batch or none"
                )
        slugs: dict[str, str] = {}
        for name in self.models:
            if (other := slugs.setdefault(slug(name), name)) != name:
                raise ValueError(f"models.{name}: its files would be those of {other}; rename one")
        self._name_variants_in_full()
        for variant, urls in self.pools.items():
            for url in urls:
                if not url.removeprefix("dns+").startswith(("http://", "https://")):
                    raise ValueError(
                        f"pools.{variant}: {shown_url(url)!r} is no URL of an engine; give http://HOST:PORT, "
                        "or dns+http://NAME:PORT for every address of a name"
                    )
                try:
                    _address(url)
                except ValueError as error:  # brackets without an IPv6 address, a port beyond 65535
                    raise ValueError(
                        f"pools.{variant}: {shown_url(url)!r} is no URL ({error}); give http://HOST:PORT"
                    ) from None
        self._check_addresses()
        self._check_roles()
        self._check_keys()
        if (judge := self.watch.judge) is not None:
            models = {*self.models, *self.served, *(provider.model for provider in self.providers)}
            if judge.model not in models:
                raise ValueError(
                    f"watch.judge.model: {judge.model!r} does not exist; known: {names_of(models)}"
                )
            if judge.model in self.models and self.watch.reference != "live":
                raise ValueError(
                    f"watch.judge.model: {judge.model!r} stands for its reference, which is left alone with "
                    f"watch.reference: {self.watch.reference}; name a served variant or a provider's model"
                )
        if self.watch.store is not None:
            check_url("watch.store", self.watch.store)
        self._check_consent()
        self._check_model_names()
        return self

    def _check_consent(self) -> None:
        if self.kept is not None:
            if self.kept.store is not None:
                check_url("kept.store", self.kept.store)
            return
        if self.watch.enabled and self.watch.reference == "batch":
            raise ValueError(f"watch.reference: batch: {CONSENT}; else set watch.reference to none")
        for name, role in self.roles.items():
            if role.record is not None:
                raise ValueError(f"roles.{name}.record: {CONSENT}; else take record out")

    def _name_variants_in_full(self) -> None:
        """Wherever the file names a variant, by the variant alone too, put ``model:variant``."""
        pools = {self._full(f"pools.{name}", name): urls for name, urls in self.pools.items()}
        if len(pools) < len(self.pools):
            raise ValueError("pools: a variant is listed twice; list each once")
        roles = {}
        for name, role in self.roles.items():
            if (canary := role.canary) is not None:
                full = self._full(f"roles.{name}.canary.variant", canary.variant)
                role = role.model_copy(update={"canary": canary.model_copy(update={"variant": full})})
            roles[name] = role
        adapters = {
            name: one.model_copy(
                update={"variants": tuple(self._full(f"adapters.{name}.variants", v) for v in one.variants)}
            )
            for name, one in self.adapters.items()
        }
        keys = tuple(
            key.model_copy(update={"lowest": self._full(f"keys.{key.name}.lowest", key.lowest)})
            if key.lowest is not None
            else key
            for key in self.keys
        )
        for field, value in (("pools", pools), ("roles", roles), ("adapters", adapters), ("keys", keys)):
            object.__setattr__(self, field, value)  # frozen for everybody else

    def _full(self, where: str, variant: str) -> str:
        """A served variant's whole name. Raises ValueError."""
        if variant in self.served:
            return variant
        found = [one for one in self.served if parts_of(one)[1] == variant]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"{where}: several models serve {variant!r}; write one of: {names_of(found)}")
        raise ValueError(f"{where}: {variant!r} is not a served variant; known: {names_of(self.served)}")

    def _check_addresses(self) -> None:
        """An engine serves one variant: at another one's address it would answer under that one's name."""
        own = _place(self.gateway.host, self.gateway.port)
        taken: dict[tuple[str, int | None], str] = {}
        for variant in self.served:
            for url in self.replicas(variant):
                at = _address(url)
                where = f"pools.{variant}: {shown_url(url)} is"
                if variant not in self.pools:
                    first = self.engine.base_port
                    where = f"engine.base_port: {first} gives {variant} the port {at[1]}, which is"
                if at == own:
                    raise ValueError(f"{where} the gateway's own; change that or gateway.port")
                if (other := taken.setdefault(at, variant)) != variant:
                    raise ValueError(
                        f"{where} in the pool of {other} as well; an engine serves one variant, so give each "
                        "its own"
                    )
            if len(set(map(_address, urls := self.replicas(variant)))) < len(urls):
                raise ValueError(f"pools.{variant}: an engine is listed twice; list each once")

    def _check_roles(self) -> None:
        agents: dict[str, str] = {}
        for name, role in self.roles.items():
            for model in role.models:
                if model not in self.models:
                    raise ValueError(
                        f"roles.{name}.models: {model!r} is not a model; known: {names_of(self.models)}"
                    )
            for agent in role.agents:
                if agents.setdefault(agent, name) != name:
                    raise ValueError(f"roles.{name}.agents: {agent!r} already belongs to {agents[agent]}")
            if role.canary and parts_of(role.canary.variant)[0] not in self.models_of(name):
                raise ValueError(
                    f"roles.{name}.canary.variant: {role.canary.variant!r} is of a model that may not serve "
                    "the role; add it to the role's models"
                )
        for row in self.signals.roles:
            if row.role is not None and row.role not in self.roles:
                raise ValueError(
                    f"signals.roles: {row.header}: {row.role!r} is not a role; known: {names_of(self.roles)}"
                )

    def _check_model_names(self) -> None:
        """A client names a model, a role, an adapter or a provider's model, and each name is one thing."""
        taken = {*self.models, *self.served}
        for name in self.roles:
            if name in taken:
                raise ValueError(f"roles.{name}: is also a model's name; rename one")
            taken.add(name)
        for name, adapter in self.adapters.items():
            if name in taken:
                raise ValueError(f"adapters.{name}: is already a model or role; rename it")
            taken.add(name)
            of = {parts_of(variant)[0] for variant in adapter.variants or self.served}
            if len(of) > 1:
                raise ValueError(
                    f"adapters.{name}.variants: an adapter is of one model, and these are of {names_of(of)}; "
                    "list those of one"
                )
            reference = self.references[of.pop()]
            if adapter.variants and reference in self.served and reference not in adapter.variants:
                raise ValueError(
                    f"adapters.{name}.variants: must contain the reference {reference!r}, to which "
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
        models = {*self.models, *self.roles, *self.served}
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


def _address(url: str) -> tuple[str, int | None]:
    """Host and port of a URL; this machine has one name. What is looked up is no address."""
    parts = urlsplit(url.removeprefix("dns+"))
    host = parts.hostname or ""
    if url.startswith("dns+"):
        host = f"dns+{host}"
    return _place(host, parts.port or {"http": 80, "https": 443}.get(parts.scheme))


def _place(host: str, port: int | None) -> tuple[str, int | None]:
    return "localhost" if host in _HERE else host, port


def names_of(names: Any) -> str:
    return ", ".join(sorted(names))


def _yaml(value: Any) -> str:
    return "[" + ", ".join(map(str, value)) + "]" if isinstance(value, list | tuple) else str(value)
