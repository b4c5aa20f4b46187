"""Writes a plan into the configuration: the lists ``models.<name>.serve``, and nothing else of the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from gateway.config import ConfigError, parse_config, parts_of


def apply(path: Path, served: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
    """Serve these variants (``model:variant``): what every model serves then, by name.

    Comments and the order of the file stay. A model of which nothing is to be served keeps its list; the text
    says so to whoever reads the result. Raises ConfigError, and then the file is as it was.
    """
    text = path.read_text(encoding="utf-8")
    wanted: dict[str, list[str]] = {}
    for identity in served:
        model, variant = parts_of(identity)
        wanted.setdefault(model, []).append(variant)
    changes = []
    for model, node in _serve_nodes(text, str(path)):
        if model in wanted:
            end = node.value[-1].end_mark.index if not node.flow_style and node.value else node.end_mark.index
            changes.append((node.start_mark.index, end, f"[{', '.join(wanted[model])}]"))
    for start, end, new in sorted(changes, reverse=True):
        text = text[:start] + new + text[end:]
    config = parse_config(text, str(path), path.resolve().parent)
    if missing := sorted(set(wanted) - set(config.models)):
        raise ConfigError(f"{path}: models.{missing[0]} is not there; the plan is of another file")
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)
    return {name: model.serve for name, model in config.models.items()}


def _serve_nodes(text: str, source: str) -> Iterator[tuple[str, yaml.SequenceNode]]:
    """The lists in the file's text, by model."""
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    for name, model in _entries(_entry(root, "models")):
        serve = _entry(model, "serve")
        if isinstance(serve, yaml.SequenceNode):
            yield name, serve


def _entries(node: yaml.Node | None) -> Iterator[tuple[str, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield str(key.value), value


def _entry(node: yaml.Node | None, name: str) -> yaml.Node | None:
    return next((value for key, value in _entries(node) if key == name), None)
