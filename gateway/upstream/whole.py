"""Answers that the gateway itself has asked engines for: read as a whole, and never without bound."""

from __future__ import annotations

import aiohttp


class TooLongError(ValueError):
    """The answer has more bytes than anybody would read."""


async def read_whole(response: aiohttp.ClientResponse, most: int) -> bytes:
    """The body of an answer, of up to ``most`` bytes as they are after decompression. Raises TooLongError as
    soon as there are more: leaving the answer's context then closes the connection."""
    parts: list[bytes] = []
    size = 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > most:
            raise TooLongError(f"the answer has more than {most} bytes")
        parts.append(part)
    return b"".join(parts)
