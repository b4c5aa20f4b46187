"""Asks a started engine what it has loaded, and refuses one that serves something else than the card says."""

from __future__ import annotations

from typing import Any

import aiohttp

from deploy.engine import EngineProcess
from deploy.engine_failures import EngineLoadError
from quantize.account import account_of_log, account_of_workers, differences
from quantize.card import Card
from quantize.core.engine_figures import EngineAccount

ROUTE = "/tiercel/account"
PATIENCE_S = 90.0


class ServedOtherwiseError(EngineLoadError):
    """The engine loaded the variant's files and serves something else than its card says."""


async def ask_account(url: str, log: str = "") -> tuple[EngineAccount | None, dict[str, Any] | None]:
    """The engine's account, and the workers' own answer where it has our route; else what ``log`` shows.

    (None, None) where neither tells anything, as of a stock server that was started elsewhere.
    """
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url + ROUTE) as response:
            if response.status == 200:
                answer: dict[str, Any] = await response.json()
                return account_of_workers(answer), answer
    except (aiohttp.ClientError, TimeoutError, KeyError, ValueError):
        pass
    return account_of_log(log), None


async def checked_account(card: Card, url: str, log: str = "") -> EngineAccount | None:
    """The account of the engine at ``url``, after comparing it with the card.

    Raises ServedOtherwiseError, whose text names modules, card and engine.
    """
    account, answer = await ask_account(url, log)
    if account is not None and (found := differences(card, account, answer)):
        words = "; ".join(found)
        raise ServedOtherwiseError(
            f"the engine ({account.engine}) at {url} does not serve what the card of {card.variant} "
            f"({card.version}) says: {words}. Make the variant again, or remove the files that the "
            "engine took instead",
            words,
        )
    return account


async def refuse_otherwise(engine: EngineProcess) -> EngineAccount | None:
    """The account of an engine that was started here. Raises ServedOtherwiseError."""
    return await checked_account(engine.spec.card, engine.spec.url, engine.said())
