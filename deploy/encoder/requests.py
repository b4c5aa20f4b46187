"""What clients ask of a classifier, as far as it is served; what is not is refused with the field's name.

Fields that change nothing here (``temperature``, ``max_tokens``, ``cache_salt`` …) have to make sense all the
same where OpenAI has them; whatever nobody knows is passed over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deploy.engine_server import BadRequestError, StreamOptions
from gateway.routing.serving import CLASSIFIER_LACKS

MOST_TEXTS = 256
"""Of one request."""
_TEXT = {"type": "text"}


class ChatAsked(BaseModel):
    """A chat completion. ``prompt_logprobs`` with ``continue_final_message`` asks what the classifier thinks
    of the last message, a label."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    messages: list[dict[str, Any]] = Field(min_length=1)
    model: str | None = None
    n: int | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=0, ge=-1)
    max_tokens: int | None = Field(default=None, ge=0)
    max_completion_tokens: int | None = Field(default=None, ge=0)
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    response_format: dict[str, Any] | None = None
    return_token_ids: bool | None = False
    prompt_logprobs: int | None = Field(default=None, ge=-1)
    continue_final_message: bool | None = False

    @model_validator(mode="after")
    def _is_served(self) -> Self:
        given = {**(self.model_extra or {}), "response_format": self.response_format}
        for name in CLASSIFIER_LACKS:
            if given.get(name) and given[name] != _TEXT:
                raise BadRequestError(f"{name}: a classifier answers a label alone; leave it out", name)
        if self.n not in (None, 1):
            raise BadRequestError(f"n: {self.n}; a classifier has one answer, leave it out", "n")
        if bool(self.continue_final_message) != (self.prompt_logprobs is not None):
            field = "continue_final_message" if self.continue_final_message else "prompt_logprobs"
            text = "a label is scored where prompt_logprobs and continue_final_message are given both"
            raise BadRequestError(f"{field}: {text}", field)
        return self

    @property
    def told(self) -> int | None:
        """Likeliest labels that are told, or None where no log-probability is."""
        return (self.top_logprobs or 0) if self.logprobs else None


class ClassifyAsked(BaseModel):
    """vLLM's ``/classify``."""

    input: str | Annotated[list[str], Field(min_length=1, max_length=MOST_TEXTS)]

    @property
    def texts(self) -> Sequence[str]:
        return [self.input] if isinstance(self.input, str) else self.input


class CompletionAsked(BaseModel):
    """One token, a label, behind a text's token ids: what an engine is tried with, and measured by."""

    prompt: list[int] = Field(min_length=1)
    max_tokens: int = Field(ge=1, le=1)

    @model_validator(mode="before")
    @classmethod
    def _is_no_text(cls, given: Any) -> Any:
        if isinstance(given, dict) and not isinstance(given.get("prompt"), list):
            text = "prompt: a classifier completes no text; ask /v1/classify, or a chat"
            raise BadRequestError(text, "prompt")
        return given


class TokenizeAsked(BaseModel):
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = Field(default=None, min_length=1)


class ScoreAsked(BaseModel):
    """The first line of what is scored: a text's token ids and a label behind them, from ``start`` on."""

    tokens: list[int] = Field(min_length=2)
    start: int = Field(ge=1)
    head: str | None = None
    keep: bool | None = False


def last_user(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of the last user's message. Raises BadRequestError."""
    for message in reversed(messages):
        if message.get("role") == "user":
            content = message.get("content")
            if isinstance(content, list):
                parts = [part.get("text") for part in content if isinstance(part, Mapping)]
                content = "\n".join(part for part in parts if isinstance(part, str))
            if isinstance(content, str) and content.strip():
                return content
            break
    text = "messages: a classifier reads the last user's message, and there is none that has a text"
    raise BadRequestError(text, "messages")


def answered(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """The label that a conversation ends with, where it ends with an assistant's message."""
    last = messages[-1]
    return str(last.get("content")) if last.get("role") == "assistant" else None
