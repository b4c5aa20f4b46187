"""The books: every finished request in the metrics, and as a line of the access log."""

from __future__ import annotations

import time

import msgspec

from gateway.config import parts_of
from gateway.proxy.record import Record, Usage
from gateway.telemetry.counters import Counter, Histogram
from gateway.telemetry.logs import AccessLog
from gateway.telemetry.metrics import OTHER, Metrics

NO_VARIANT = "none"
"""The labels, model and variant, of a request that got no route."""


class _Line(msgspec.Struct, gc=False):
    """What the access log says of a request. Never a prompt or an answer."""

    time: float
    """Unix time, seconds."""
    request_id: str
    path: str
    key: str | None
    tenant: str | None
    role: str | None
    session: str | None
    parent_session: str | None
    model: str
    variant: str | None
    replica: str | None
    reason: str | None
    status: int
    prompt_tokens: int | None
    completion_tokens: int
    duration_s: float
    first_token_s: float | None
    overhead_s: float
    hedged: bool
    error: str | None
    logger: str = "tiercel.access"


_Account = tuple[str | None, str, tuple[str, str]]
"""Key, role, and model with its variant: whose tokens they are."""
_Kind = tuple[str | None, str, str, str, str, int]
"""Key, role, model as it was asked for, ``model:variant``, reason and outcome."""


class _Tokens:
    """The token counters of one account."""

    __slots__ = ("cached", "completion", "key_completion", "key_prompt", "prompt")

    def __init__(self, metrics: Metrics, account: _Account) -> None:
        key, role, of = account
        self.prompt: Counter = metrics.tokens.labels(role, *of, "prompt")
        self.cached: Counter = metrics.cached_tokens.labels(role, *of)
        self.completion: Counter = metrics.tokens.labels(role, *of, "completion")
        self.key_prompt: Counter | None = None
        self.key_completion: Counter | None = None
        if key is not None:
            self.key_prompt = metrics.key_tokens.labels(key, role, *of, "prompt")
            self.key_completion = metrics.key_tokens.labels(key, role, *of, "completion")

    def add(self, usage: Usage) -> None:
        prompt, completion = usage.prompt or 0, usage.completion
        self.prompt.value += prompt
        self.cached.value += usage.cached
        self.completion.value += completion
        if self.key_prompt is not None and self.key_completion is not None:
            self.key_prompt.value += prompt
            self.key_completion.value += completion


class _Books:
    """The metrics of requests of one kind, found once."""

    __slots__ = ("duration", "first_token", "gaps", "overhead", "requests", "routes", "tokens")

    def __init__(self, metrics: Metrics, kind: _Kind) -> None:
        key, role, requested, variant, reason, outcome = kind
        of = labels_of(variant, requested)
        self.requests: Counter = metrics.requests.labels(role, requested, *of, str(outcome))
        self.routes: Counter = metrics.routes.labels(role, *of, reason)
        self.duration: Histogram = metrics.duration.labels(role, *of)
        self.overhead: Histogram = metrics.overhead.labels(role, *of)
        self.first_token: Histogram = metrics.first_token.labels(role, *of)
        self.gaps: Histogram = metrics.token_gap.labels(role, *of)
        self.tokens = _Tokens(metrics, (key, role, of))


class Ledger:
    """Writes finished requests into the metrics and the access log."""

    def __init__(self, metrics: Metrics, log: AccessLog) -> None:
        self._metrics = metrics
        self.log = log
        self._books: dict[_Kind, _Books] = {}
        self._accounts: dict[_Account, _Tokens] = {}

    def record(self, record: Record, _exchange: object = None, *, log: bool) -> None:
        """The hop after a request. ``log``: a line of the access log, too; errors have one anyway."""
        role, variant = record.role, record.variant
        if role is not None and variant is not None:
            kind = (record.key, role, record.model, variant, record.reason or "", record.status)
            books = self._books.get(kind)
            if books is None:
                books = self._books[kind] = _Books(self._metrics, kind)
            books.requests.value += 1
            books.routes.value += 1
            books.duration.observe(record.duration_s)
            books.overhead.observe(record.overhead_s)
            books.tokens.add(record.usage)
            if record.first_token_s is not None:
                books.first_token.observe(record.first_token_s)
                for gap in record.gaps_s:
                    books.gaps.observe(gap)
            for spent in record.spent:
                self.spend(record.key, role, labels_of(spent.variant, record.model), spent.usage)
            if record.hedged:
                of = labels_of(variant, record.model)
                self._metrics.hedges.labels(role, *of, record.winner or "none").inc()
        else:
            labels = (role or OTHER, record.model, NO_VARIANT, NO_VARIANT, str(record.status))
            self._metrics.requests.labels(*labels).inc()
        if log or record.status != 200:
            self.log.write(_line(record))

    def spend(self, key: str | None, role: str, of: tuple[str, str], usage: Usage) -> None:
        """Tokens of an answer that nobody got, or that became known after its request had ended. ``of``: the
        model and the variant that wrote it."""
        account = (key, role, of)
        tokens = self._accounts.get(account)
        if tokens is None:
            tokens = self._accounts[account] = _Tokens(self._metrics, account)
        tokens.add(usage)


def labels_of(variant: str, requested: str) -> tuple[str, str]:
    """Model and variant. A provider's model is called as it was asked for, and its variant ``provider``."""
    model, short = parts_of(variant)
    return model or requested, short


def _line(record: Record) -> _Line:
    return _Line(
        time.time(),
        record.request_id,
        record.path,
        record.key,
        record.tenant,
        record.role,
        record.session,
        record.parent,
        record.model,
        record.variant,
        record.replica,
        record.reason,
        record.status,
        record.usage.prompt,
        record.usage.completion,
        record.duration_s,
        record.first_token_s,
        record.overhead_s,
        record.hedged,
        record.error,
    )
