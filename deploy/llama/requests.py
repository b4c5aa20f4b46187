"""What clients ask, as far as it is served here; what is not is refused with the field's name.

Fields that a gateway or vLLM's clients add and that change nothing here (``cache_salt``, ``priority``,
``user`` …) are passed over, and so is whatever nobody knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deploy.engine_server import BadRequestError, StreamOptions
from deploy.llama.sampling import Sampling
from gateway.routing.serving import LLAMA_LACKS

MOST_CHOICES = 16
MOST_STOPS = 64
"""Texts that an answer may stop at: each is looked for after every token."""
MOST_GRAMMAR = 1 << 18
"""Characters of a grammar."""
MOST_RULES = 20_000
"""Of properties that may be left out, each of which may follow on any before it."""
LEAST_REPETITION = 0.01
"""Of the penalty: with less, and more than its inverse, logits are none any more."""
MOST_BIAS = 100.0
"""Of ``logit_bias``; a larger one counts as this, as in vLLM."""
_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class Asked(BaseModel):
    """What chat and plain completions have in common. None is the model's own default."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=0)
    n: int | None = Field(default=1, ge=1, le=MOST_CHOICES)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = None
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, ge=LEAST_REPETITION, le=1 / LEAST_REPETITION)
    seed: int | None = None
    logit_bias: dict[int, float] | None = None
    ignore_eos: bool | None = False
    min_tokens: int | None = Field(default=0, ge=0)
    response_format: dict[str, Any] | None = None
    cache_salt: str | None = None
    return_token_ids: bool | None = False

    @model_validator(mode="after")
    def _is_served(self) -> Self:
        more = self.model_extra or {}
        for name in LLAMA_LACKS:
            if more.get(name):
                raise BadRequestError(
                    f"{name}: a llama.cpp engine does not serve it; leave it out, or use a variant that "
                    "vLLM serves",
                    name,
                )
        return self

    @property
    def stops(self) -> Sequence[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def sampling(self, logprobs: int | None, vocabulary: int, defaults: Mapping[str, Any]) -> Sampling:
        """``defaults`` are the model's own, of its generation config."""
        given = {name: getattr(self, name) for name in _DEFAULTS}
        chosen = {name: defaults.get(name) if value is None else value for name, value in given.items()}
        for token in self.logit_bias or {}:
            if not 0 <= token < vocabulary:
                text = f"logit_bias: token {token} is out of vocabulary, which has {vocabulary} tokens"
                raise BadRequestError(text, "logit_bias")
        return Sampling(
            **{name: value for name, value in chosen.items() if value is not None},
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            seed=None if self.seed is None else abs(self.seed),
            logit_bias={
                token: max(-MOST_BIAS, min(MOST_BIAS, bias))
                for token, bias in (self.logit_bias or {}).items()
            },
            logprobs=logprobs,
            ignore_eos=bool(self.ignore_eos),
            min_tokens=self.min_tokens or 0,
        )

    def grammar(self) -> str | None:
        """llama.cpp's grammar for ``response_format``. Raises BadRequestError for a schema that has none."""
        if self.response_format is None:
            return None
        from llama_cpp_py_sync.constraints import response_format_to_grammar

        field = "response_format"
        if (rules := optional_rules(self.response_format)) > MOST_RULES:
            text = f"{field}: properties that may be left out make {rules:,} rules, {MOST_RULES:,} are taken"
            raise BadRequestError(f"{text}; require more of them", field)
        try:
            made: str | None = response_format_to_grammar(self.response_format)
        except RecursionError:
            raise BadRequestError(f"{field}: is nested too deeply; send a flatter schema", field) from None
        except Exception as error:  # what of a schema the converter never thought of
            raise BadRequestError(f"{field}: {str(error) or type(error).__name__}", field) from None
        if made is not None and len(made) > MOST_GRAMMAR:
            text = f"{field}: its grammar has {len(made):,} characters, {MOST_GRAMMAR:,} are taken"
            raise BadRequestError(f"{text}; send a smaller schema", field)
        return made


class ChatAsked(Asked):
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=0)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=0, ge=-1)
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def told(self) -> int | None:
        """Likeliest tokens that are told, or None where no log-probability is."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def longest(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionAsked(Asked):
    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=-1)

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[one for one in self.prompt if isinstance(one, int)]]
        return [one for one in self.prompt if not isinstance(one, int)]


class TokenizeAsked(BaseModel):
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def optional_rules(schema: Any) -> int:
    """Rules that a schema's objects make of the properties that they do not require."""
    found, left = 0, [schema]
    while left:
        one = left.pop()
        if isinstance(one, Mapping):
            properties, required = one.get("properties"), one.get("required")
            if isinstance(properties, Mapping):
                needed = set(map(str, required)) if isinstance(required, list) else set()
                found += len(properties.keys() - needed) ** 2
            left += one.values()
        elif isinstance(one, list):
            left += one
    return found


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose contents are texts: parts are joined by line feeds. Raises BadRequestError."""
    found = []
    for at, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
            if not all(isinstance(part, str) for part in parts):
                place = f"messages[{at}].content"
                raise BadRequestError(f"{place}: a llama.cpp engine takes text alone", place)
            content = "\n".join(map(str, parts))
        found.append({**message, "content": content})
    return found
