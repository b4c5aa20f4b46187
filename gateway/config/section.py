"""What every section of the file is made of, how errors in it are told, and what of it is secret."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from ipaddress import ip_address
from typing import Annotated, Any
from urllib.parse import urlsplit, urlunsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

from quantize.gate.flags import refuse_flags

HIDDEN = "…"
"""What is shown in a secret's place."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_OPTION = re.compile(
    r"(--?[\w-]*(?:api[-_]?key|[-_]key|token|secret|password|credentials?))(=.+)?", re.IGNORECASE | re.DOTALL
)


class ConfigError(ValueError):
    """The configuration cannot be used. The text names the file, the key, the value and the fix."""


def _variable(name: str) -> str:
    """What is no name may be the secret itself, and is not shown."""
    if not _VARIABLE.fullmatch(name):
        raise ValueError(
            "is no name of an environment variable; give its name (letters, digits, _), not what it holds"
        )
    return name


Variable = Annotated[str, AfterValidator(_variable)]
"""The name of an environment variable that holds a secret."""


class Secret(Enum):
    """What of a setting is a secret: part of the type of a field, ``Annotated[str, Secret.ALL]``."""

    ALL = "all"
    """The whole value, or every value of a mapping."""
    URL = "url"
    """A URL's password and query."""
    LINK = "link"
    """All of a URL but its host: whoever has it may post there."""
    OPTIONS = "options"
    """What follows options such as ``--api-key`` in a list of arguments."""

    def hide(self, value: Any) -> Any:
        """The value as it may be shown; mappings and lists of values keep their form."""
        if value is None:
            return None
        if isinstance(value, Mapping):
            return {name: self.hide(one) for name, one in value.items()}
        if self is Secret.OPTIONS:
            return _without_secrets(value)
        if isinstance(value, str):
            return _SHOWN[self](value)
        return type(value)(self.hide(one) for one in value)


def _url(url: str) -> str:
    """Without its password and its query's values."""
    try:
        parts = urlsplit(url)
        place = parts.netloc
        if "@" in place:
            user, _, host = place.rpartition("@")
            name, colon, _ = user.partition(":")
            place = f"{name}:{HIDDEN}@{host}" if colon else f"{HIDDEN}@{host}"
        query = "&".join(
            f"{name}={HIDDEN}" if equals else HIDDEN
            for name, equals, _ in (one.partition("=") for one in parts.query.split("&") if one)
        )
        fragment = HIDDEN if parts.fragment else ""
        masked = urlunsplit(parts._replace(netloc=place, query=query, fragment=fragment))
        return masked if HIDDEN in masked else url
    except ValueError:
        return HIDDEN


def _link(url: str) -> str:
    try:
        parts = urlsplit(url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}/{HIDDEN}" if parts.netloc else HIDDEN
    except ValueError:
        return HIDDEN


_SHOWN: dict[Secret, Callable[[str], str]] = {
    Secret.ALL: lambda value: HIDDEN,
    Secret.URL: _url,
    Secret.LINK: _link,
}


def _without_secrets(arguments: Iterable[str]) -> Any:
    shown: list[str] = []
    hiding = False
    for argument in arguments:
        found = _SECRET_OPTION.fullmatch(argument)
        if found and found[2]:
            shown.append(f"{found[1]}={HIDDEN}")
        else:
            shown.append(HIDDEN if hiding and not argument.startswith("-") else argument)
        if argument.startswith("-"):  # an option may take several values
            hiding = found is not None and not found[2]
    return type(arguments)(shown)  # type: ignore[call-arg]


def shown_url(url: str) -> str:
    """A URL as it may be shown and logged: without its password."""
    return _url(url)


class Section(BaseModel):
    """Secrets are masked in its repr."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, given: Any) -> Any:
        return refuse_flags(cls, given)

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            secret = secret_of(type(self), name) if name else None
            yield name, value if secret is None else secret.hide(value)


def secret_of(section: type[BaseModel], field: str) -> Secret | None:
    """What of a section's field is a secret."""
    known = section.model_fields.get(field)
    return next((one for one in known.metadata if isinstance(one, Secret)), None) if known else None


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
