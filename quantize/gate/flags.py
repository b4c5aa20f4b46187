"""Yes and no where a number belongs: YAML's ``yes``, ``on`` and ``true`` would be 1."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel


def refuse_flags(kind: type[BaseModel], given: Any) -> Any:
    """``given``, of which a section is to be made. Raises ValueError for a yes or no of a field that takes
    none."""
    if isinstance(given, dict):
        for name, value in given.items():
            field = kind.model_fields.get(name)
            if isinstance(value, bool) and field is not None and not _takes(field.annotation):
                raise ValueError(f"{name}: {str(value).lower()} is a yes or no, and none is asked for here")
    return given


def _takes(annotation: Any) -> bool:
    return annotation in (bool, Any, object) or any(map(_takes, get_args(annotation)))
