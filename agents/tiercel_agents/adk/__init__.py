"""Google ADK: the plugin that tells the gateway who asks. Needs the extra ``adk``."""

from tiercel_agents.adk.plugin import GatewayPlugin

__all__ = ["GatewayPlugin"]
