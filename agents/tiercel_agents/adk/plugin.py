"""The ADK plugin that tells the gateway which agent of which session is asking.

The gateway chooses the precision of an answer by the role of the agent that asks. ADK does not put
the agent's name on the wire, so this plugin adds it, as HTTP headers, to every model call:

========================  ============================================================
``x-agent-name``          the ADK agent's name; the gateway maps it to a role
``x-session-id``          the ADK session's id; keeps a conversation on a warm replica
``x-invocation-id``       the ADK invocation's id; joins logs and traces
``baggage``               ``gen_ai.agent.name=<agent>``, for whatever reads W3C baggage
========================  ============================================================

Use it with any model class that forwards ``http_options.headers``, which LiteLlm does::

    app = App(name="shop", root_agent=team, plugins=[GatewayPlugin()])

The headers go to whatever endpoint an agent's model talks to. A header that the application sets
itself is left as it is. A call about which something is unknown goes out without that header: the
plugin never fails a run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from google.adk.plugins.base_plugin import BasePlugin
from google.genai import types

from tiercel_agents.headers import BAGGAGE_AGENT, BAGGAGE_HEADER, identity

logger = logging.getLogger("tiercel.agents")


class GatewayPlugin(BasePlugin):  # type: ignore[misc]  # ADK is untyped here
    """Adds the caller's identity to every model call of an ADK app."""

    def __init__(self, name: str = "tiercel_gateway") -> None:
        super().__init__(name=name)

    async def before_model_callback(self, *, callback_context: Any, llm_request: Any) -> None:
        """Called by ADK before each model call; changes only ``http_options.headers``."""
        try:
            _add_headers(llm_request, identity_headers(callback_context))
        except Exception:
            logger.warning("model call goes out without its agent's identity", exc_info=True)


def identity_headers(context: Any) -> dict[str, str]:
    """The headers for one call; those whose value ``context`` does not know are absent."""
    return identity(
        agent=_known(context, "agent_name"),
        session=_known(getattr(context, "session", None), "id"),
        invocation=_known(context, "invocation_id"),
    )


def _known(holder: Any, name: str) -> str:
    value = getattr(holder, name, None)
    return value if isinstance(value, str) else ""


def _add_headers(llm_request: Any, headers: Mapping[str, str]) -> None:
    # A copy: the options may be shared with every other call of the agent's configuration.
    options = llm_request.config.http_options or types.HttpOptions()
    merged = dict(options.headers or {})
    present = {name.lower(): name for name in merged}
    for name, value in headers.items():
        if name not in present:
            merged[name] = value
        elif name == BAGGAGE_HEADER and BAGGAGE_AGENT not in merged[present[name]]:
            merged[present[name]] += f",{value}"
    llm_request.config.http_options = options.model_copy(update={"headers": merged})
