"""Quality checks on a finished answer. Nothing here can delay a byte or break a request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from enum import StrEnum

from gateway.api.body import Body
from gateway.config import Config
from gateway.quality.answer import Answer
from gateway.quality.grounded import Grounded, Label, check, context_of
from gateway.telemetry.logs import EVENTS
from gateway.telemetry.metrics import Metrics

LONGEST_TEXT = 400_000
"""Characters of context and answer beyond which the grounded check is skipped."""


class CheckOutcome(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    """There was nothing to check: no log-probabilities, no text, or too much of it."""
    ERROR = "error"


class Observer:
    """Runs the checks that a role wants and counts what they find."""

    def __init__(
        self,
        config: Config,
        metrics: Metrics,
        grounded_check: Callable[[str, str], Grounded] = check,
    ) -> None:
        self._config = config
        self._metrics = metrics
        self._grounded_check = grounded_check
        self._log = logging.getLogger(EVENTS)

    async def observe(self, role: str, variant: str, body: Body, answer: Answer) -> None:
        """Check an answer that is complete. Raises nothing; a check that fails is counted as such."""
        self._count("signals", role, variant, lambda: self._signals(role, variant, answer))
        if self._config.roles[role].grounded and "messages" in body:
            # In a thread: a long context takes a while, and other requests should not wait for it.
            await asyncio.to_thread(
                self._count, "grounded", role, variant, lambda: self._grounded(role, variant, body, answer)
            )

    def count_error(self, check_name: str, role: str, variant: str) -> None:
        self._metrics.quality_checks.labels(role, variant, check_name, CheckOutcome.ERROR).inc()
        self._log.warning("check %s failed", check_name, exc_info=True, extra={"fields": {"role": role}})

    def _count(self, name: str, role: str, variant: str, run: Callable[[], CheckOutcome]) -> None:
        try:
            outcome = run()
        except Exception:
            self.count_error(name, role, variant)
        else:
            self._metrics.quality_checks.labels(role, variant, name, outcome).inc()

    def _signals(self, role: str, variant: str, answer: Answer) -> CheckOutcome:
        """Never failed: they are sensors, not verdicts."""
        signals = answer.meter.result()
        if signals is None:
            return CheckOutcome.SKIPPED
        self._metrics.nll_mean.labels(role, variant).observe(signals.nll_mean)
        self._metrics.entropy_max.labels(role, variant).observe(signals.entropy_max)
        self._metrics.quality_score.labels(role, variant, "likely_tokens").observe(1 - signals.unlikely_share)
        return CheckOutcome.PASSED

    def _grounded(self, role: str, variant: str, body: Body, answer: Answer) -> CheckOutcome:
        context, text = context_of(body.get("messages")), "\n".join(answer.texts)
        if len(context) + len(text) > LONGEST_TEXT:
            return CheckOutcome.SKIPPED
        result = self._grounded_check(text, context)
        if result.score is None:
            return CheckOutcome.SKIPPED
        for label, count in result.counts.items():
            self._metrics.quality_sentences.labels(role, variant, label).inc(count)
        self._metrics.quality_score.labels(role, variant, "grounded").observe(result.score)
        if (strict := result.strict_score) is not None:
            self._metrics.quality_score.labels(role, variant, "grounded_strict").observe(strict)
        return CheckOutcome.FAILED if result.counts[Label.UNSUPPORTED] else CheckOutcome.PASSED
