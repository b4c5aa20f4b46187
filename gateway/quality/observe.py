"""What is done with a finished answer. Nothing here can delay a byte or break a request.

The signals and the rules are looked at at once. A share of the answers, chosen by a hash of the request's
id, is put before the reference, and copies of a share of the requests go to variants on probation; both when
there is time (:mod:`gateway.quality.inquiry`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

from gateway.config import Config
from gateway.errors import BadRequestError
from gateway.proxy.body import Body
from gateway.quality import judge
from gateway.quality.answer import Answer
from gateway.quality.cells import Key
from gateway.quality.checks import HARD, failures
from gateway.quality.grounded import Grounded, check, context_of
from gateway.quality.inquiry import Examiner, Inquiry, Provider, UnansweredError
from gateway.quality.shadow import Result, compare, same_meaning
from gateway.quality.watch import Watch
from gateway.telemetry.evaluations import emit
from gateway.telemetry.logs import EVENTS
from gateway.telemetry.metrics import Metrics

LONG_BODY = 8_000
"""Bytes of a request from which on an answer's rules are checked beside the loop."""
LONGEST_TEXT = 400_000
"""Characters of context and answer beyond which the grounded check is skipped."""
LONGEST_SHADOW = 200_000
"""Bytes of a request beyond which the reference is not asked about its answer."""
_SHARE = 1 << 32
_TOP = 5
SAMPLES = 3
"""Second answers that an unusual one is compared with."""


class CheckOutcome(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    """There was nothing to check: no log-probabilities, no text, or too much of it."""
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Observed:
    """A finished answer, and what it is the answer to."""

    role: str
    variant: str
    request_id: str
    body: Body
    answer: Answer
    first_token_s: float | None = None
    gap_s: float | None = None
    """Mean seconds between the parts of a stream."""


class Observer:
    """Runs the checks that a role wants, counts what they find, and tells the watch."""

    def __init__(
        self,
        config: Config,
        metrics: Metrics,
        watch: Watch | None = None,
        inquiry: Inquiry | None = None,
        grounded_check: Callable[[str, str], Grounded] = check,
        provider: Provider | None = None,
    ) -> None:
        """``grounded_check``: a detector's; ``provider``: the way to a judge that no pool of ours serves."""
        self._config = config
        self._metrics = metrics
        self._watch = watch
        self._inquiry = inquiry
        self._examiner = Examiner(inquiry, config.reference, provider) if inquiry else None
        self._grounded_check = grounded_check
        self._checks: set[asyncio.Task[None]] = set()
        self._log = logging.getLogger(EVENTS)
        self._shadowed = int(config.watch.rate * _SHARE)
        self._judged = int(config.watch.judge.rate * _SHARE) if config.watch.judge else 0
        self._copied = int(config.watch.probation_rate * _SHARE)

    def offer(self, seen: Observed) -> None:
        """Check an answer when there is time."""
        task = asyncio.get_running_loop().create_task(self.observe(seen))
        self._checks.add(task)
        task.add_done_callback(self._checks.discard)

    async def drain(self) -> None:
        if self._checks:
            await asyncio.wait(self._checks, timeout=1.0)

    async def observe(self, seen: Observed) -> None:
        """Check an answer that is complete. Raises nothing; a check that fails is counted as such."""
        role, variant = seen.role, seen.variant
        key = self._watch.key(variant, role) if self._watch else None
        self._count("signals", role, variant, lambda: self._signals(seen, key))
        if seen.body.size < LONG_BODY:
            self._rules(seen, key, self._failures(seen))
        else:
            try:
                self._rules(seen, key, await asyncio.to_thread(failures, seen.body, seen.answer))
            except Exception:
                self.count_error("rules", role, variant)
        if self._watch:
            self._watch.note_latency(variant, seen.first_token_s, seen.gap_s)
        if self._config.roles[role].grounded and "messages" in seen.body:
            # In a thread: a long context takes a while, and other requests should not wait for it.
            try:
                found = self._count_grounded(seen, await asyncio.to_thread(self._grounded, seen))
            except Exception:
                self.count_error("grounded", role, variant)
            else:
                self._metrics.quality_checks.labels(role, variant, "grounded", found).inc()
                if key and self._watch and found is not CheckOutcome.SKIPPED:
                    self._watch.note(key, "grounded", found is CheckOutcome.FAILED)
        if self._watch and self._inquiry:
            self._try("shadow", role, variant, lambda: self._inquire(seen, key))

    async def insufficient(self, role: str, body: Body, answer: Answer) -> str | None:
        """The check that an answer fails so plainly that a more precise variant should be asked; or None."""
        try:
            found = failures(body, answer)
            signals = answer.meter.result()
        except Exception:
            self._log.warning("a check before an escalation failed", exc_info=True)
            return None
        floor = self._config.roles[role].confidence
        if floor is not None and signals is not None and math.exp(-signals.nll_mean) < floor:
            return "confidence"
        return next((name for name in HARD if found.get(name)), None)

    def count_error(self, check_name: str, role: str, variant: str) -> None:
        self._metrics.quality_checks.labels(role, variant, check_name, CheckOutcome.ERROR).inc()
        self._log.warning("check %s failed", check_name, exc_info=True, extra={"fields": {"role": role}})

    def _try(self, name: str, role: str, variant: str, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except Exception:
            self.count_error(name, role, variant)
            return None

    def _count(self, name: str, role: str, variant: str, run: Callable[[], CheckOutcome]) -> None:
        if (outcome := self._try(name, role, variant, run)) is not None:
            self._metrics.quality_checks.labels(role, variant, name, outcome).inc()

    def _signals(self, seen: Observed, key: Key | None) -> CheckOutcome:
        """Never failed: they are sensors, not verdicts."""
        signals = seen.answer.meter.result()
        if signals is None:
            return CheckOutcome.SKIPPED
        role, variant = seen.role, seen.variant
        self._metrics.nll_mean.labels(role, variant).observe(signals.nll_mean)
        self._metrics.entropy_max.labels(role, variant).observe(signals.entropy_max)
        self._metrics.quality_score.labels(role, variant, "likely_tokens").observe(1 - signals.unlikely_share)
        if key and self._watch:
            self._watch.note(key, "signals", False, signals.nll_mean)
        return CheckOutcome.PASSED

    def _failures(self, seen: Observed) -> Mapping[str, bool]:
        found = self._try("rules", seen.role, seen.variant, lambda: failures(seen.body, seen.answer))
        return found or {}

    def _rules(
        self, seen: Observed, key: Key | None, found: Mapping[str, bool], *, probation: bool = False
    ) -> None:
        for name, bad in found.items():
            outcome = CheckOutcome.FAILED if bad else CheckOutcome.PASSED
            self._metrics.quality_checks.labels(seen.role, seen.variant, name, outcome).inc()
        if found and key and self._watch:
            self._watch.note(key, "rules", any(found.get(name) for name in HARD), probation=probation)

    def _grounded(self, seen: Observed) -> Grounded:
        context, text = context_of(seen.body.get("messages")), "\n".join(seen.answer.texts)
        if len(context) + len(text) > LONGEST_TEXT:
            return Grounded(())
        return self._grounded_check(text, context)

    def _count_grounded(self, seen: Observed, result: Grounded) -> CheckOutcome:
        role, variant = seen.role, seen.variant
        if result.score is None:
            return CheckOutcome.SKIPPED
        for label, count in result.counts.items():
            self._metrics.quality_sentences.labels(role, variant, label).inc(count)
        self._metrics.quality_score.labels(role, variant, "grounded").observe(result.score)
        if (strict := result.strict_score) is not None:
            self._metrics.quality_score.labels(role, variant, "grounded_strict").observe(strict)
        outcome = CheckOutcome.FAILED if result.bad else CheckOutcome.PASSED
        self._emit("grounded", outcome.value, result.score, seen)
        return outcome

    # what engines are asked, later

    def _inquire(self, seen: Observed, key: Key | None) -> None:
        assert self._watch
        assert self._inquiry
        candidates = [
            other
            for other in self._watch.on_probation(seen.role)
            if other != key and _in(seen.request_id, "probation", self._copied)
        ]
        grounded = self._config.roles[seen.role].grounded and "messages" in seen.body
        if grounded and _in(seen.request_id, "judge", self._judged):
            self._inquiry.offer(partial(self._judge, seen, key), partial(self._judge_shed, seen))
        shadowed = key is not None and _in(seen.request_id, "shadow", self._shadowed)
        signals = seen.answer.meter.result()
        unusual = key is not None and signals is not None and self._watch.unusual(key, signals.nll_mean)
        if not shadowed and not candidates and not unusual:
            return
        request = _asked(seen.body)
        if request is None:
            self._compared(seen, Result.INCOMPARABLE)
            return
        if key is not None and shadowed:
            if len(seen.answer.texts) != 1:
                self._compared(seen, Result.INCOMPARABLE)
            elif not seen.answer.tokens:
                self._compared(seen, Result.NO_LOGPROBS)
            else:
                shed = partial(self._compared, seen, Result.SHED)
                self._inquiry.offer(partial(self._shadow, seen, key, request), shed)
        if key is not None and unusual and len(seen.answer.texts) == 1:
            self._inquiry.offer(partial(self._resample, seen, key, request), later=True)
        for other in candidates:
            self._inquiry.offer(partial(self._copy, seen, other, request), later=True)

    async def _shadow(
        self, seen: Observed, key: Key, request: Mapping[str, Any], *, probation: bool = False
    ) -> None:
        """Let the reference score the answer; where there is suspicion, let it answer too."""
        assert self._examiner
        assert self._watch
        try:
            rows = await self._examiner.rows(request, seen.answer.texts[0])
            scored = compare(seen.answer.tokens, rows)
        except UnansweredError as error:
            self._compared(seen, Result.ERROR)
            self._log.warning("shadow: %s", error, extra={"fields": {"request_id": seen.request_id}})
            return
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            self._compared(seen, Result.ERROR)
            self._log.warning("shadow: the reference's answer cannot be read", exc_info=True)
            return
        if scored is None:
            self._compared(seen, Result.INCOMPARABLE)
            return
        self._compared(seen, scored.result)
        self._emit("shadow", scored.result.value, 1 - scored.disputed / scored.tokens, seen)
        labels = (seen.role, seen.variant)
        self._metrics.disagreement.labels(*labels).observe(scored.disagreement)
        self._metrics.divergence.labels(*labels).observe(scored.divergence)
        self._watch.note(key, "shadow", scored.result is Result.DISPUTED, probation=probation)
        if not probation:
            self._watch.note(key, "divergence", False, scored.divergence)
            if self._watch.suspected(key):
                await self._regenerate(seen, key, request)

    async def _regenerate(self, seen: Observed, key: Key, request: Mapping[str, Any]) -> None:
        """Compare with the reference's own answer; where that differs from time to time by itself, only if
        two of the reference's agree."""
        assert self._examiner
        assert self._watch
        mine = _message(seen.answer)
        try:
            theirs = await self._examiner.message(request)
            if request.get("temperature", 1) and not same_meaning(
                theirs, await self._examiner.message(request)
            ):
                return
            bad = not same_meaning(mine, theirs)
        except UnansweredError as error:
            self._log.warning("regenerate: %s", error, extra={"fields": {"request_id": seen.request_id}})
            return
        outcome = CheckOutcome.FAILED if bad else CheckOutcome.PASSED
        self._metrics.quality_checks.labels(seen.role, seen.variant, "regenerated", outcome).inc()
        self._watch.note(key, "regenerated", bad)

    async def _resample(self, seen: Observed, key: Key, request: Mapping[str, Any]) -> None:
        """Where an answer was unusually sure or unsure: does the variant say the same again, when it is
        asked at a temperature? (The idea is SelfCheckGPT's, arXiv:2303.08896.)"""
        assert self._examiner
        assert self._watch
        mine, same = _message(seen.answer), 0
        try:
            for number in range(SAMPLES):
                more = {"temperature": 1.0, "seed": number}
                choices = (await self._examiner.answer(key.variant, request, **more))["choices"]
                same += same_meaning(mine, choices[0].get("message") or {"content": choices[0]["text"]})
        except (UnansweredError, KeyError, TypeError, IndexError, AttributeError) as error:
            self._log.warning("resample: %s", error, extra={"fields": {"request_id": seen.request_id}})
            return
        labels = (seen.role, seen.variant, "consistency")
        self._metrics.quality_score.labels(*labels).observe(same / SAMPLES)
        self._watch.note(key, "consistency", same * 2 < SAMPLES)

    async def _copy(self, seen: Observed, key: Key, request: Mapping[str, Any]) -> None:
        """Let a variant on probation answer a request that another has answered, and judge that."""
        assert self._examiner
        try:
            reply = await self._examiner.answer(key.variant, request, logprobs=True, top_logprobs=_TOP)
            answer = Answer()
            answer.add(reply, 0.0)
        except (UnansweredError, KeyError, TypeError, ValueError, AttributeError) as error:
            self._log.warning("probation: %s", error, extra={"fields": {"variant": key.variant}})
            return
        copy = Observed(seen.role, key.variant, seen.request_id, seen.body, answer)
        self._rules(copy, key, self._failures(copy), probation=True)
        if answer.texts and answer.tokens:
            await self._shadow(copy, key, request, probation=True)

    async def _judge(self, seen: Observed, key: Key | None) -> None:
        """Let a model label the answer's sentences."""
        assert self._examiner
        settings = self._config.watch.judge
        assert settings
        answer = "\n".join(seen.answer.texts)
        asked = judge.request(answer, context_of(seen.body.get("messages")), settings.max_tokens)
        if asked is None:
            self._judged_as(seen, CheckOutcome.SKIPPED)
            return
        body, sentences = asked
        try:
            async with asyncio.timeout(settings.timeout_s):
                found = judge.read(await self._examiner.judge(settings.model, body), sentences)
        except (UnansweredError, judge.JudgeError, TimeoutError) as error:
            self._judged_as(seen, CheckOutcome.ERROR)
            fields = {"request_id": seen.request_id}
            self._log.warning("judge: %s", error or "no answer in time", extra={"fields": fields})
            return
        bad = found.bad > 0
        self._emit("judge", "failed" if bad else "passed", found.score, seen)
        self._judged_as(seen, CheckOutcome.FAILED if bad else CheckOutcome.PASSED)
        if found.score is not None:
            self._metrics.quality_score.labels(seen.role, seen.variant, "judge").observe(found.score)
        if key and self._watch:
            self._watch.note(key, "judge", bad)

    def _judged_as(self, seen: Observed, outcome: CheckOutcome) -> None:
        self._metrics.quality_checks.labels(seen.role, seen.variant, "judge", outcome).inc()

    def _judge_shed(self, seen: Observed) -> None:
        self._judged_as(seen, CheckOutcome.SKIPPED)

    def _emit(self, name: str, label: str, score: float | None, seen: Observed) -> None:
        emit(
            name,
            label,
            score,
            role=seen.role,
            variant=seen.variant,
            model=self._config.model.name,
            request_id=seen.request_id,
        )

    def _compared(self, seen: Observed, result: Result) -> None:
        self._metrics.shadow.labels(seen.role, seen.variant, result.value).inc()


def _message(answer: Answer) -> dict[str, Any]:
    """Its first choice, as an engine would have sent it whole."""
    calls = [{"function": {"name": name, "arguments": said}} for name, said in answer.tool_calls]
    return {"content": answer.texts[0] if answer.texts else "", "tool_calls": calls}


def _asked(body: Body) -> dict[str, Any] | None:
    """The request as an engine would be asked it again; None where that cannot be compared."""
    if len(body.raw("messages")) + len(body.raw("prompt")) > LONGEST_SHADOW:
        return None
    try:
        request = body.everything()
    except BadRequestError:
        return None
    if isinstance(request.get("messages"), list) or isinstance(request.get("prompt"), str):
        return request
    return None


def _in(request_id: str, what: str, below: int) -> bool:
    """Whether a request is in a sample: by a hash of its id, so that it does not depend on load or time."""
    return below >= _SHARE or zlib.crc32(f"{what}\0{request_id}".encode()) < below
