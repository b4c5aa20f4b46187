"""One model of the configuration: its variants on disk, and which one a person means."""

from __future__ import annotations

from collections.abc import Callable

from gateway.config import Config, ConfigError, ModelConfig
from quantize.registry import Registry

Say = Callable[[str], None]


def registry_of(model: ModelConfig, say: Say = lambda _text: None) -> Registry:
    """The model's variants directory."""
    return Registry(model.variants_dir, model.name, model.reference, say)


def one_model(config: Config, name: str | None = None) -> ModelConfig:
    """The model that is named, or the only one there is. Raises ConfigError."""
    known = ", ".join(config.models)
    if name is None:
        if len(config.models) > 1:
            raise ConfigError(f"--model: there are several models; name one of {known}")
        name = config.default_model
    if name not in config.models:
        raise ConfigError(f"--model: {name!r} is not a model; known: {known}")
    return config.of(name)
