"""YAML of a person, read so that nothing of it is dropped without a word."""

from __future__ import annotations

from typing import Any

import yaml

_MERGE = "tag:yaml.org,2002:merge"


class YamlError(ValueError):
    """What is wrong with the text and where, without the text itself, which may hold a secret."""


class _Loader(yaml.SafeLoader):
    """Refuses a mapping that names a key twice, of which YAML libraries keep the last alone."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            named = key.tag, key.value
            if named in seen:
                first = f"the key {key.value!r} is in line {seen[named]} already; put both together"
                raise yaml.composer.ComposerError(None, None, first, key.start_mark)
            seen[named] = key.start_mark.line + 1
        return node


def read_yaml(text: str) -> Any:
    """The value that ``text`` says. Raises YamlError."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise YamlError(where + said) from None
    except yaml.YAMLError as error:
        raise YamlError(" ".join(str(error).split())) from None
