"""What pydantic says of a value that it refuses, as the beginning of a sentence."""

from __future__ import annotations

from pydantic import ValidationError


def first_fault(error: ValidationError, whole: str = "") -> str:
    """The first field that does not fit, by its place, and why not.

    ``whole`` stands for the place where no single field is at fault.

    >>> first_fault(error, "the line")
    'messages.0.role: Field required'
    """
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or whole
    said = first["msg"].removeprefix("Value error, ")
    return f"{place}: {said}" if place else said
