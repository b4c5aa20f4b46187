"""A configuration as it may be shown, and as it was meant when what was shown is sent back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from gateway.config.file import Config
from gateway.config.section import HIDDEN, ConfigError, Section, secret_of
from gateway.config.yaml_text import YamlError, read_yaml

_Place = tuple[str, ...]
"""The way to a value: keys, and of lists the names of their members, or positions."""


def shown(config: Config) -> dict[str, Any]:
    """As JSON, with ``HIDDEN`` in the place of secrets."""
    found: dict[str, Any] = _shown(config, config.model_dump(mode="json"))
    return found


def with_secrets(text: str, config: Config) -> str:
    """YAML in which what was hidden is again what ``config`` has in that place: members of lists are known by
    their name or model, addresses by what was shown of them. Raises ConfigError for what it cannot know."""
    try:
        raw = read_yaml(text) if HIDDEN in text or ascii(HIDDEN)[1:-1] in text else None
    except YamlError:
        return text  # whoever reads it next says what is wrong with it
    if not isinstance(raw, dict):
        return text
    known = {place: (masked, value) for place, masked, value in _secrets(config)}
    return yaml.safe_dump(_restored(raw, (), known), allow_unicode=True)


def _shown(value: Any, dumped: Any) -> Any:
    if isinstance(value, Section):
        found = {}
        for name in type(value).model_fields:
            secret, one = secret_of(type(value), name), getattr(value, name)
            found[name] = _shown(one, dumped[name]) if secret is None else _json(secret.hide(one))
        return found
    if isinstance(value, Mapping):
        return {name: _shown(one, dumped[name]) for name, one in value.items()}
    if isinstance(value, tuple):
        return [_shown(one, other) for one, other in zip(value, dumped, strict=True)]
    return dumped


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _json(one) for name, one in value.items()}
    return [_json(one) for one in value] if isinstance(value, tuple) else value


def _secrets(value: Any, place: _Place = ()) -> Iterator[tuple[_Place, str, str]]:
    """Every place with a secret, what is shown there, and what is there."""
    if isinstance(value, Section):
        for name in type(value).model_fields:
            secret, one = secret_of(type(value), name), getattr(value, name)
            if secret is None:
                yield from _secrets(one, (*place, name))
            else:
                yield from _masked(secret.hide(one), one, (*place, name))
    elif isinstance(value, Mapping):
        for name, one in value.items():
            yield from _secrets(one, (*place, name))
    elif isinstance(value, tuple):
        for index, one in enumerate(value):
            yield from _secrets(one, (*place, _member(one, index)))


def _masked(masked: Any, value: Any, place: _Place) -> Iterator[tuple[_Place, str, str]]:
    if isinstance(value, Mapping):
        for name, one in value.items():
            yield from _masked(masked[name], one, (*place, name))
    elif isinstance(value, tuple):
        for index, one in enumerate(value):
            yield from _masked(masked[index], one, (*place, str(index)))
    elif value != masked:
        yield place, masked, value


def _member(one: Any, index: int) -> str:
    """What a member of a list is known by."""
    for name in ("name", "model"):
        known = one.get(name) if isinstance(one, Mapping) else getattr(one, name, None)
        if isinstance(known, str):
            return f"{name}={known}"
    return str(index)


def _restored(raw: Any, place: _Place, known: Mapping[_Place, tuple[str, str]]) -> Any:
    if isinstance(raw, dict):
        return {name: _restored(one, (*place, str(name)), known) for name, one in raw.items()}
    if isinstance(raw, list):
        return [_restored(one, (*place, _member(one, index)), known) for index, one in enumerate(raw)]
    if not isinstance(raw, str) or HIDDEN not in raw:
        return raw
    masked, value = known.get(place, ("", ""))
    if masked == raw:
        return value
    # A member of a list may have moved: what was shown of it says which one it is, if it says so of one only.
    same = {value for other, (masked, value) in known.items() if other[:-1] == place[:-1] and masked == raw}
    if len(same) == 1 and place[-1].isdigit():
        return same.pop()
    if any(other[:-1] == place[:-1] for other in known) or place in known:
        raise ConfigError(f"{'.'.join(place)}: {raw!r} hides a secret that is not known here; give it")
    return raw
