"""From YAML to a configuration, or to a sentence that says what is wrong with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from gateway.config.file import Config, names_of
from gateway.config.section import ConfigError, Section, secret_of
from gateway.config.yaml_text import YamlError, read_yaml


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
        raw = read_yaml(text)
    except YamlError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from None
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
        fix = f"did you mean {close[0]!r}?" if close else f"known keys: {names_of(known)}"
        return f"{key}: unknown key; {fix}"
    if item["type"] == "missing":
        return f"{key}: is required; add it"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return message if not key else f"{key}: {message}"
    if _is_secret(item["loc"]):
        return f"{key}: {message}; what was given is not shown"
    return f"{key}: {message}, got {item['input']!r}"


def _is_secret(location: tuple[int | str, ...]) -> bool:
    """Whether a place of the file has a secret, or what has been put there by mistake may be one."""
    here: Any = Config
    for part in location:
        if not (isinstance(here, type) and issubclass(here, BaseModel)):
            here = next(iter(_sections_in(here)), here)
        if isinstance(here, type) and issubclass(here, Section):
            if secret_of(here, str(part)) is not None:
                return True
            field = here.model_fields.get(str(part))
            here = field.annotation if field is not None else here
    # A key that was written where a section belongs.
    sections = [here] if isinstance(here, type) and issubclass(here, BaseModel) else _sections_in(here)
    return any(secret_of(section, field) for section in sections for field in section.model_fields)


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    for one in getattr(annotation, "__args__", ()):
        if isinstance(one, type) and issubclass(one, BaseModel):
            yield one


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    """The keys that are allowed at a place of the file."""
    here: Any = Config
    for part in location:
        if isinstance(here, type) and issubclass(here, BaseModel) and part in here.model_fields:
            here = here.model_fields[str(part)].annotation
            here = next(_sections_in(here), here)
    if isinstance(here, type) and issubclass(here, BaseModel):
        return list(here.model_fields)
    return []


def _absolute(config: Config, base: Path) -> Config:
    """The same configuration with every path absolute."""

    def at(path: Path | None) -> Path | None:
        return None if path is None else base / path

    roles = {
        name: role.model_copy(
            update={field: at(getattr(role, field)) for field in ("tasks", "long_context", "training")}
        )
        for name, role in config.roles.items()
    }
    python = config.engine.python or Path(".venv-engine/bin/python")
    absolute = config.model_copy(
        update={
            "models": {
                name: model.model_copy(update={"path": at(model.path), "calibration": at(model.calibration)})
                for name, model in config.models.items()
            },
            "variants_dir": at(config.variants_dir),
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
