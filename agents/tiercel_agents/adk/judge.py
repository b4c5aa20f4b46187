"""The gateway as judge for ADK's own evaluation: models named ``tiercel/…``.

Importing this module registers the name. ``hallucinations_v1`` and ``final_response_match_v2`` then take
``judge_model="tiercel/assistant:bf16"``, or any other id that the gateway serves: a role, ``model:variant``,
a provider's model. Judges belong on the reference: quantization harms judging.

The address is in the environment: ``TIERCEL_URL`` (default ``http://127.0.0.1:8080``) and ``TIERCEL_KEY``.
"""

from __future__ import annotations

import os
from typing import Any

from google.adk.models.lite_llm import LiteLlm
from google.adk.models.llm_request import LlmRequest
from google.adk.models.registry import LLMRegistry

from tiercel_agents.headers import AGENT_HEADER

PREFIX = "tiercel/"
AGENT = "judge"
"""What it calls itself to the gateway: list it under a role, or it gets the default one."""


class TiercelLlm(LiteLlm):  # type: ignore[misc]  # ADK is untyped here
    """A model of the gateway by its name there."""

    def __init__(self, model: str, **more: Any) -> None:
        url = os.environ.get("TIERCEL_URL", "http://127.0.0.1:8080").rstrip("/")
        super().__init__(
            model=_at_gateway(model),
            api_base=url + "/v1",
            api_key=os.environ.get("TIERCEL_KEY", "unused"),
            extra_headers={AGENT_HEADER: AGENT},
            **more,
        )

    async def generate_content_async(self, llm_request: LlmRequest, stream: bool = False) -> Any:
        """Answers of the gateway; a request that names this model by its registered name means the same."""
        if llm_request.model:
            llm_request = llm_request.model_copy(update={"model": _at_gateway(llm_request.model)})
        async for answer in super().generate_content_async(llm_request, stream):
            yield answer

    @classmethod
    def supported_models(cls) -> list[str]:
        """The names that ADK's registry resolves to this class."""
        return [PREFIX + ".*"]


def _at_gateway(model: str) -> str:
    """LiteLLM's name for it."""
    return "openai/" + model.removeprefix(PREFIX) if model.startswith(PREFIX) else model


LLMRegistry.register(TiercelLlm)
