"""What LiteLLM is handed of a client's request: a list of what is allowed, since its keyword arguments could
otherwise redirect a request, and our key with it, or fake an answer.

Chat: every field of OpenAI's chat schema but one, and those of other providers that LiteLLM translates for
them (``thinking`` and ``top_k``). A field that the provider does not know is left out, as LiteLLM's
``drop_params`` does it: a client that speaks to several models need not know which of them has seeds.

Kept out, for example: ``metadata`` (LiteLLM takes it as its own: routing, callbacks, keys), ``api_base``,
``base_url``, ``api_key``, ``custom_llm_provider``, ``extra_headers``, ``extra_body``, ``headers``,
``mock_response``, ``mock_tool_calls``, ``fallbacks``, ``model_list``, ``timeout``, ``num_retries``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PASSED_TO_CHAT = frozenset(
    "audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens max_tokens "
    "messages modalities moderation n parallel_tool_calls prediction presence_penalty prompt_cache_key "
    "prompt_cache_options prompt_cache_retention reasoning_effort response_format safety_identifier seed "
    "service_tier stop store stream stream_options temperature thinking tool_choice tools top_k top_logprobs "
    "top_p user verbosity web_search_options".split()
)
PASSED_TO_EMBEDDINGS = frozenset(("dimensions", "encoding_format", "input", "user"))
_TOOLS = ("function", "custom")
"""Kinds of tools that a provider is offered. LiteLLM itself would act on one of kind ``mcp``."""


def passed(body: Mapping[str, Any], *, chat: bool) -> dict[str, Any]:
    """The allowed fields of ``body``. Null means absent, as in OpenAI's interface."""
    allowed = PASSED_TO_CHAT if chat else PASSED_TO_EMBEDDINGS
    return {name: value for name, value in body.items() if name in allowed and value is not None}


def unknown_tool(body: Mapping[str, Any]) -> str | None:
    """The place of a tool that is no function, if there is one."""
    tools = body.get("tools")
    for index, tool in enumerate(tools if isinstance(tools, list) else ()):
        if not isinstance(tool, dict) or tool.get("type") not in _TOOLS:
            return f"tools[{index}]"
    return None
