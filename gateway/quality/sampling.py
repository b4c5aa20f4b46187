"""Samples that no client can choose to be in."""

from __future__ import annotations

import hashlib

SHARE = 1 << 32
"""What stands for all."""


def is_in(sample_id: str, what: str, below: int) -> bool:
    """Whether an answer is in a sample of ``below`` of ``SHARE``. Samples are independent of each other and
    of any other hash of the same number: a checksum would not be, since checksums of texts that differ by
    what is before them differ by a constant."""
    if below >= SHARE or below == 0:
        return below > 0
    digest = hashlib.blake2b(sample_id.encode(), digest_size=4, person=what.encode()).digest()
    return int.from_bytes(digest) < below
