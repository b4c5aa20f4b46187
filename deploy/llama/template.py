"""The chat template of a model, rendered as transformers and vLLM render it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from deploy.engine_server import BadRequestError


class ChatTemplate:
    """``names`` are texts that the template may name: ``bos_token`` and so on."""

    def __init__(self, text: str, names: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._template, self._names = environment.from_string(text), dict(names)

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, more: Mapping[str, Any]
    ) -> str:
        """The text of a conversation. Raises BadRequestError, with the template's own words."""
        given = {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(**{"tools": None, "documents": None, **self._names, **more, **given})
        except Exception as error:  # a template computes what it likes with what it is given
            said = str(error) or type(error).__name__
            raise BadRequestError(
                f"messages: the chat template refuses them ({said[:300]})", "messages"
            ) from None


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **more: Any) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **more)


def _refuse(text: str) -> None:
    raise TemplateError(text)
