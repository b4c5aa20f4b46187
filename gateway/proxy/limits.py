"""What attempts may take and do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from gateway.config import Config

if TYPE_CHECKING:
    from gateway.proxy.exchange import Exchange


class Limits(msgspec.Struct, frozen=True):
    """Time limits, in seconds, and what is hedged, listened to and escalated."""

    first_byte_s: float
    """Of a stream, until its first part."""
    answer_s: float
    """Of an answer that is not streamed, until all of it has come."""
    idle_s: float
    total_s: float
    wait_s: Mapping[str, float]
    """By role: how long a request waits for a replica."""
    escalates: frozenset[str] = frozenset()
    """Roles whose answers are looked at before the client gets them."""
    escalated_share: float = 0.2
    listened_share: float = 0.0
    paced: bool = False
    """There are targets, for which it is learned how soon pools answer."""
    adapters: frozenset[str] = frozenset()
    """Their answers are not listened to: the reference without the adapter would say something else."""

    def overdue(self, exchange: Exchange, now: float) -> tuple[str, str] | None:
        """What of its engine's takes too long, as a sentence, and the setting that says so."""
        silence = now - exchange.heard_at
        if now - exchange.received > self.total_s:
            return f"The answer took longer than {self.total_s:g} s", "total_timeout_s"
        if exchange.paused_at is not None:  # then it is the client's
            return None
        if exchange.begun:
            if silence > self.idle_s:
                return f"The engine fell silent for {self.idle_s:g} s", "idle_timeout_s"
        elif not exchange.attempts or exchange.attempts[0].over:
            pass
        elif exchange.options.stream:
            if silence > self.first_byte_s:
                return f"The engine gave no token within {self.first_byte_s:g} s", "first_byte_timeout_s"
        elif silence > self.answer_s:
            return f"The engine gave no answer within {self.answer_s:g} s", "answer_timeout_s"
        return None


def limits_of(config: Config) -> Limits:
    """What attempts may take and do, by the configuration."""
    gateway, quality = config.gateway, config.quality
    return Limits(
        first_byte_s=gateway.first_byte_timeout_s,
        answer_s=gateway.answer_timeout_s,
        idle_s=gateway.idle_timeout_s,
        total_s=gateway.total_timeout_s,
        wait_s={name: role.wait_s for name, role in config.roles.items()},
        escalates=frozenset(name for name, role in config.roles.items() if role.escalate),
        escalated_share=config.watch.escalated_share,
        listened_share=quality.sample_rate if quality.logprobs else 0.0,
        paced=any(role.target is not None for role in config.roles.values()),
        adapters=frozenset(config.adapters),
    )
