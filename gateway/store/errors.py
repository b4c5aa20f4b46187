"""What goes wrong with a database; apart from it, so that whoever explains errors need not load it."""

from __future__ import annotations


class StoreError(RuntimeError):
    """The database cannot be used. The text names it, the reason and the fix."""
