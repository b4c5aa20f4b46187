"""The demo's second act: a quantized variant is harmed under live traffic, and the watch acts.

The engine of the variant that serves most auxiliary answers is replaced by one that serves a harmed copy
(:mod:`deploy.damage`), at the same address and under the same name. Nobody tells the gateway.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp
from tqdm import tqdm

from deploy.damage import damaged
from deploy.models import one_model
from deploy.report_data import Answer, Demotion, Incident
from deploy.supervisor import Stack
from deploy.team.run import TicketResult, run_team
from deploy.team.tickets import Ticket
from gateway.config import parts_of

FAULT = "two-bits"
BATCH = 24
"""Messages between two looks at the watch."""
MOST_MESSAGES = 480
AFTERWARDS = 72
"""Messages after the last demotion, to see whether the roles recover."""
POLL_S = 0.25

Say = Callable[[str], None]


class Clock:
    """Answers with the time at which they came. ``right``: whether an agent's is."""

    def __init__(self, right: Callable[[str, TicketResult], bool]) -> None:
        self.began = time.monotonic()
        self.answers: list[Answer] = []
        self._right = right

    @property
    def now(self) -> float:
        return time.monotonic() - self.began

    def take(self, result: TicketResult) -> None:
        for agent, one in result.agents.items():
            variant = parts_of(one.variant)[1] if one.variant else None
            self.answers.append(
                Answer(role=one.role, variant=variant, right=self._right(agent, result), at=self.now)
            )


async def second_act(
    stack: Stack, clock: Clock, tickets: Sequence[Ticket], concurrency: int, say: Say
) -> Incident | None:
    """Harm, wait for the watch, go on for a while. None where no quantized variant serves anything."""
    config, model = stack.config, one_model(stack.config)
    served = Counter(answer.variant for answer in clock.answers if answer.variant != model.reference)
    if not served:
        say("no quantized variant serves a role: there is nothing to harm")
        return None
    variant = served.most_common(1)[0][0]
    assert variant is not None
    roles = {answer.role for answer in clock.answers if answer.variant == variant}
    spec = stack.engines[model.id(variant)].spec
    say(f"replacing the engine of {variant} by one with harmed weights ({FAULT})")
    await stack.swap(model.id(variant), damaged(spec.directory, config.run_dir / "harmed", FAULT))
    harmed_at = clock.now
    demotions: dict[str, Demotion] = {}
    sent, after = 0, 0
    endless = itertools.cycle(tickets)
    async with aiohttp.ClientSession() as session:
        with tqdm(total=MOST_MESSAGES, desc="messages", unit="message", mininterval=1) as bar:
            while sent < MOST_MESSAGES and after < AFTERWARDS:
                batch = list(itertools.islice(endless, BATCH))
                looking = asyncio.create_task(
                    _until_demoted(session, stack.url, spec.id, roles, demotions, clock, harmed_at)
                )
                try:
                    await run_team(batch, stack.url, model.name, concurrency=concurrency, progress=clock.take)
                finally:
                    looking.cancel()
                    await asyncio.gather(looking, return_exceptions=True)
                sent += BATCH
                after += BATCH if roles <= set(demotions) else 0
                bar.update(BATCH)
    for one in demotions.values():
        took = f"{one.answers} answers, {one.seconds:.0f} s"
        say(f"{variant} was demoted for {one.role} after {took}: {one.why}")
    for role in sorted(roles - set(demotions)):
        say(f"{variant} was not demoted for {role} within {sent} messages")
    return Incident(
        variant=variant,
        fault=FAULT,
        harmed_at=harmed_at,
        answers=tuple(clock.answers),
        demotions=tuple(demotions.values()),
    )


async def _until_demoted(
    session: aiohttp.ClientSession,
    url: str,
    variant: str,
    roles: set[str],
    demotions: dict[str, Demotion],
    clock: Clock,
    harmed_at: float,
) -> None:
    """``variant``: the whole ``model:variant``."""
    while roles - set(demotions):
        for cell in (await read_watch(session, url))["cells"]:
            role = cell["role"]
            if cell["variant"] == variant and role in roles and not cell["serves"] and role not in demotions:
                given = sum(
                    (answer.role, answer.variant) == (role, parts_of(variant)[1]) and answer.at > harmed_at
                    for answer in clock.answers
                )
                demotions[role] = Demotion(
                    role=role, answers=given, seconds=clock.now - harmed_at, why=cell["why"]
                )
        await asyncio.sleep(POLL_S)


async def read_watch(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    """What the gateway's watch knows."""
    async with session.get(url + "/admin/watch") as response:
        found: dict[str, Any] = await response.json()
        return found
