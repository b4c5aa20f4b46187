"""The one YAML file that everything is configured by, validated into frozen models: a file per section.

Relative paths are relative to the file's own directory. An unknown key, a wrong type or a name that
refers to nothing is a ConfigError whose text gives the key, the value and the fix.
"""

from gateway.config.access import Adapter, ApiKey, Provider
from gateway.config.conversations import Conversations
from gateway.config.engine import Engine, EngineChanges
from gateway.config.file import Config
from gateway.config.fixed import refuse_fixed
from gateway.config.gateway import POLICIES, Cost, GatewaySettings
from gateway.config.kept import KeptSettings, Recording
from gateway.config.load import load_config, parse_config
from gateway.config.model import Model, ModelConfig, parts_of, slug, variant_id
from gateway.config.quality import Quality
from gateway.config.responses import ResponsesSettings
from gateway.config.roles import Canary, RoleSettings, Target, WhenFull
from gateway.config.section import HIDDEN, ConfigError, is_loopback, shown_url
from gateway.config.shown import shown, with_secrets
from gateway.config.signals import Signal, Signals
from gateway.config.watch import WATCHED, Batch, Judge, WatchSettings

__all__ = [
    "HIDDEN",
    "POLICIES",
    "WATCHED",
    "Adapter",
    "ApiKey",
    "Batch",
    "Canary",
    "Config",
    "ConfigError",
    "Conversations",
    "Cost",
    "Engine",
    "EngineChanges",
    "GatewaySettings",
    "Judge",
    "KeptSettings",
    "Model",
    "ModelConfig",
    "Provider",
    "Quality",
    "Recording",
    "ResponsesSettings",
    "RoleSettings",
    "Signal",
    "Signals",
    "Target",
    "WatchSettings",
    "WhenFull",
    "is_loopback",
    "load_config",
    "parse_config",
    "parts_of",
    "refuse_fixed",
    "shown",
    "shown_url",
    "slug",
    "variant_id",
    "with_secrets",
]
