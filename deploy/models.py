"""One model of the configuration: which one a person means, its checkpoint, and its variants on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from deploy.hub import ensure
from gateway.config import Config, ConfigError, ModelConfig, parts_of
from quantize.core.checkpoint import Checkpoint, open_checkpoint
from quantize.registry import Registry

Say = Callable[[str], None]


def registry_of(model: ModelConfig, say: Say = lambda _text: None) -> Registry:
    """The model's variants directory."""
    return Registry(model.variants_dir, model.name, model.reference, say)


def checkpoint_of(model: ModelConfig, say: Say = lambda _text: None) -> Checkpoint:
    """The model's checkpoint, fetched before if it is a hub's. Raises CheckpointError."""
    return open_checkpoint(ensure(model, say))


def first_models(model: ModelConfig) -> dict[str, str]:
    """Role that the model may serve to the model whose reference all others are measured against there."""
    return {name: (role.models or (model.name,))[0] for name, role in model.roles.items()}


def one_model(config: Config, name: str | None = None) -> ModelConfig:
    """The model that is named, or the only one there is. Raises ConfigError."""
    if name is None:
        if len(config.models) > 1:
            raise ConfigError(f"--model: there are several models; name one of: {_known(config)}")
        name = config.default_model
    if name not in config.models:
        raise ConfigError(f"--model: {name!r} is not a model; known: {_known(config)}")
    return config.of(name)


def some_models(config: Config, name: str | None = None) -> tuple[ModelConfig, ...]:
    """The model that is named, or all of them. Raises ConfigError."""
    return config.each() if name is None else (one_model(config, name),)


def variant_of(config: Config, text: str, model: str | None = None) -> tuple[ModelConfig, str]:
    """The model, and the variant's name within it, of ``model:variant``, or of the name of a variant that one
    model alone has. ``model`` is the one that was named beside it. Raises ConfigError."""
    name, variant = parts_of(text)
    if name:
        if model not in (None, name):
            raise ConfigError(f"--model: {model!r} is not the model of {text!r}; leave it out")
        if name not in config.models:
            raise ConfigError(f"{text}: {name!r} is not a model; known: {_known(config)}")
        return config.of(name), variant
    if model is not None or len(config.models) == 1:
        return one_model(config, model), text
    found = [one for one in config.each() if text in {*one.serve, *registry_of(one).variants()}]
    if len(found) == 1:
        return found[0], text
    if found:
        known = ", ".join(one.id(text) for one in found)
        raise ConfigError(f"{text}: several models have such a variant; write one of: {known}")
    raise ConfigError(f"{text}: no model has such a variant; write MODEL:{text}, of: {_known(config)}")


def variants_to_make(config: Config, names: Sequence[str], model: str | None) -> dict[str, list[str]]:
    """Names of variants by model: ``model:variant`` is one model's, a variant alone one of each model, or of
    ``model`` where it is given. Without names: of each such model none in particular. Raises ConfigError."""
    found: dict[str, list[str]] = {} if names else {one.name: [] for one in some_models(config, model)}
    for text in names:
        named, variant = parts_of(text)
        models = (variant_of(config, text, model)[0],) if named else some_models(config, model)
        for one in models:
            found.setdefault(one.name, []).append(variant)
    return found


def _known(config: Config) -> str:
    return ", ".join(config.models)
