"""YAML of a person, read so that nothing of it is dropped without a word."""

from __future__ import annotations

import re
from typing import Any

import yaml

_QUOTED = re.compile(r"'[^'<\s][^'\s]+'")
_MERGE = "tag:yaml.org,2002:merge"
_DECIMAL = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(?:0b[01_]+|0x[\da-fA-F_]+|0[0-7_]*|[1-9][\d_]*)$"),
    "tag:yaml.org,2002:float": re.compile(
        r"(?:[-+]?\d[\d_]*\.[\d_]*(?:[eE][-+]\d+)?|\.\d[\d_]*(?:[eE][-+]\d+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
}
"""PyYAML's own patterns without numbers to base 60."""


class YamlError(ValueError):
    """What is wrong with the text and where, without the text itself, which may hold a secret."""


class _TwiceError(yaml.composer.ComposerError):
    """A mapping names a key twice."""


class _Loader(yaml.SafeLoader):
    """Refuses a mapping that names a key twice, of which YAML libraries keep the last alone. Times of day and
    the like (1:30) are text, and no numbers to base 60."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            named = key.tag, key.value
            if named in seen:
                first = f"the key {key.value!r} is in line {seen[named]} already; put both together"
                raise _TwiceError(None, None, first, key.start_mark)
            seen[named] = key.start_mark.line + 1
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, _DECIMAL.get(tag, pattern)) for tag, pattern in resolvers]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(text: str) -> Any:
    """The value that ``text`` says. Raises YamlError."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        said = ", ".join(part for part in (error.context, error.problem) if part)
        if not isinstance(error, _TwiceError):
            # PyYAML quotes what it stumbles over: a password that begins with * or ! is an alias or a tag.
            said = _QUOTED.sub("'…'", said)
        raise YamlError(where + said) from None
    except yaml.YAMLError as error:
        raise YamlError(" ".join(str(error).split())) from None
    except RecursionError:
        raise YamlError("it is nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise YamlError(str(error).partition(";")[0]) from None
