"""What a reload cannot change, since it is taken once, at the start."""

from __future__ import annotations

from gateway.config.file import Config
from gateway.config.section import ConfigError

_FIXED = {
    "": ("run_dir",),
    "gateway": ("host", "port", "workers", "tls_certificate", "tls_key", "engine_key_env"),
    "watch": ("enabled", "store", "store_env", "in_flight"),
    "responses": ("enabled", "store", "store_env"),
    "kept": ("store", "store_env", "key_env"),
}
"""By section."""


def refuse_fixed(config: Config, running: Config) -> None:
    """Raises ConfigError for what cannot change while the gateway runs."""
    for section, fields in _FIXED.items():
        new, old = (getattr(one, section) if section else one for one in (config, running))
        if new is None or old is None:
            continue  # a section that may be missing, and begins or ends
        for field in fields:
            if getattr(new, field) != getattr(old, field):
                name = f"{section}.{field}" if section else field
                raise ConfigError(f"{name}: cannot change while the gateway runs; start it anew")
