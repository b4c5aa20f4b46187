"""The fields of a request that the gateway looks at."""

from __future__ import annotations

from typing import Any, cast

import msgspec
from msgspec import UNSET, UnsetType


class RequestFields(msgspec.Struct):
    """What the gateway reads of a request. The values are those that vLLM makes of what was sent."""

    model: str = ""
    """Empty where none was named: then the role decides."""
    stream: bool | None = None
    stream_options: dict[str, Any] | UnsetType | None = UNSET
    n: int | None = None
    metadata: Any = None
    vllm_xargs: Any = None
    prompt_cache_key: Any = None
    user: Any = None
    litellm_session_id: Any = None
    logprobs: Any = UNSET
    top_logprobs: Any = UNSET
    logprob_token_ids: Any = UNSET
    echo: Any = UNSET
    cache_salt: Any = UNSET
    priority: Any = UNSET

    @property
    def takes_logprobs(self) -> bool:
        """Whether a chat's log-probabilities can be asked for on top of what the client asked, and the engine
        still takes, refuses and answers what it did. It wants ``logprobs`` where ``top_logprobs`` is, lists
        ``logprob_token_ids`` among the likeliest tokens, and with ``echo`` gives those of the prompt too."""
        logprobs, top = self.logprobs, self.top_logprobs
        if self.logprob_token_ids is not UNSET or not (self.echo is UNSET or self.echo is False):
            return False
        if logprobs is UNSET and top is UNSET:
            return True
        if top is UNSET or top is None or (top == 0 and top is not False):
            return logprobs is UNSET or logprobs is None or isinstance(logprobs, bool)
        return logprobs is True and type(top) is int and top >= -1


class Usual(RequestFields, kw_only=True):
    """The same as clients nearly always send it: whatever does not fit is looked at again, slowly."""

    stream_options: dict[str, bool | None] | UnsetType | None = UNSET
    metadata: msgspec.Raw = cast(msgspec.Raw, None)
    vllm_xargs: msgspec.Raw = cast(msgspec.Raw, None)
    prompt_cache_key: str | None = None
    user: str | None = None
    litellm_session_id: str | None = None
    logprobs: bool | int | UnsetType | None = UNSET
    top_logprobs: int | UnsetType | None = UNSET
    logprob_token_ids: msgspec.Raw = cast(msgspec.Raw, UNSET)
    echo: bool | UnsetType | None = UNSET
    cache_salt: str | UnsetType | None = UNSET
    priority: int | UnsetType | None = UNSET
    input: msgspec.Raw | UnsetType = UNSET
    instructions: msgspec.Raw | UnsetType = UNSET
    messages: msgspec.Raw | UnsetType = UNSET
    prompt: msgspec.Raw | UnsetType = UNSET
    system: msgspec.Raw | UnsetType = UNSET
    texts: msgspec.Raw | UnsetType = UNSET
    token_ids: msgspec.Raw | UnsetType = UNSET
    tools: msgspec.Raw | UnsetType = UNSET
    response_format: msgspec.Raw | UnsetType = UNSET
    structured_outputs: msgspec.Raw | UnsetType = UNSET
    text: msgspec.Raw | UnsetType = UNSET
    output_config: msgspec.Raw | UnsetType = UNSET


KNOWN_NAMES = Usual.__struct_fields__
"""Of all fields that are ever looked at."""
_TOOLS = KNOWN_NAMES.index("tools")
PROMPT_FIELDS = KNOWN_NAMES[len(RequestFields.__struct_fields__) : _TOOLS + 1]
"""What becomes prompts, at one endpoint or another."""
GRAMMAR_FIELDS = KNOWN_NAMES[_TOOLS:]
"""What an engine may make grammars of, at one endpoint or another."""
