"""What every section of the file is made of, and how errors in it are told."""

from __future__ import annotations

from ipaddress import ip_address

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """The configuration cannot be used. The text names the file, the key, the value and the fix."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
