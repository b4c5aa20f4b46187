"""What is done with a finished answer. Nothing here can delay a byte or break a request.

Content is read in a process of its own (:mod:`gateway.quality.process`): here answers are handed over as
bytes, and what was found is counted and told to the watch. A share of the answers, chosen by a hash of a
number that clients do not choose, is put before the reference, and copies of a share of the requests go to
variants on probation; both when there is time (:mod:`gateway.quality.inquiry`).
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from functools import partial

from gateway.config import Config, parts_of
from gateway.kept.keeper import Keeper
from gateway.quality.answer import Answer
from gateway.quality.cells import CellKey
from gateway.quality.examiner import UnansweredError
from gateway.quality.inquiry import Inquiry, ShedError
from gateway.quality.process import CLASSIFIER_STEP_S, STEP_S, CheckProcess, LostError
from gateway.quality.records import (
    AnswerRecord,
    CheckOutcome,
    Copy,
    Examination,
    Findings,
    Forget,
    Judge,
    Look,
    Regenerate,
    Resample,
    Result,
    Resume,
    Score,
    Step,
    Suffices,
    encode,
)
from gateway.quality.sampling import SHARE, is_in
from gateway.quality.watch import Watch
from gateway.telemetry.evaluations import emit
from gateway.telemetry.ledger import labels_of
from gateway.telemetry.logs import EVENTS
from gateway.telemetry.metrics import Metrics

LONGEST = 4 << 20
"""Bytes of a request and its answer beyond which they are not looked at."""
LONGEST_WAITED_FOR = 1 << 20
"""The same where a client waits for what is found."""
ESCALATION_S = 0.25
"""Seconds that a client waits for it; then it gets the answer as it is."""


@dataclass(frozen=True, slots=True)
class Observed:
    """A finished answer, and what it is the answer to."""

    role: str
    variant: str
    request_id: str
    path: str
    body: bytes
    """The request's JSON."""
    answer: Answer
    first_token_s: float | None = None
    gap_s: float | None = None
    """Mean seconds between the parts of a stream."""
    cache_salt: str = ""
    """The tenant's."""
    sample_id: str = ""
    """Unlike the request's id not of the client's choosing: it decides which samples the answer is in."""
    requested: str = ""
    """The model as the client named it."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """What is kept of an answer while it is looked at. ``record``: an encoded ``AnswerRecord``."""

    role: str
    variant: str
    labels: tuple[str, str]
    """Of metrics: its model and variant."""
    request_id: str
    sample_id: str
    key: CellKey | None
    grounded: bool
    record: bytes


class Observer:
    """Has answers looked at as a role wants, counts what is found, and tells the watch."""

    def __init__(
        self,
        config: Config,
        metrics: Metrics,
        checks: CheckProcess,
        escalation: CheckProcess,
        watch: Watch | None = None,
        inquiry: Inquiry | None = None,
        keeper: Keeper | None = None,
    ) -> None:
        """``checks`` is given finished answers, ``escalation`` those that a client waits for, ``keeper``
        those that wait until the reference is started for them."""
        self._config = config
        self._metrics = metrics
        self._checks = checks
        self._escalation = escalation
        self._watch = watch
        self._inquiry = inquiry
        self._keeper = keeper if config.watch.reference == "batch" else None
        self._log = logging.getLogger(EVENTS)
        quality = config.quality
        self._classifier = str(quality.classifier) if quality.detector == "classifier" else None
        self._shadowed = int(config.watch.rate * SHARE)
        self._judged = int(config.watch.judge.rate * SHARE) if config.watch.judge else 0
        self._copied = int(config.watch.probation_rate * SHARE)

    async def ready(self) -> None:
        """Wait until answers can be checked before they are sent, where a role wants that."""
        if any(role.escalate for role in self._config.roles.values()):
            self._escalation.want()
            await self._escalation.ready()

    def offer(self, seen: Observed) -> None:
        """Have an answer looked at that is complete. Never waits, and raises nothing: what there is no time
        for is dropped and counted."""
        try:
            self._offer(seen)
        except Exception:
            self.count_error("listen", seen.role, labels_of(seen.variant, seen.requested))
            self._log.exception("an answer could not be looked at")

    def _offer(self, seen: Observed) -> None:
        if self._watch:
            self._watch.note_latency(seen.variant, seen.first_token_s, seen.gap_s)
        if seen.answer.too_long or len(seen.body) + seen.answer.size > LONGEST:
            self._checks.drop("too_long")
            return
        kept = _Kept(
            seen.role,
            seen.variant,
            labels_of(seen.variant, seen.requested),
            seen.request_id,
            seen.sample_id,
            self._watch.key(seen.variant, seen.role) if self._watch else None,
            self._config.roles[seen.role].grounded,
            encode(AnswerRecord(seen.body, seen.answer.events, seen.cache_salt)),
        )
        task, limit_s, classifier = Look(), STEP_S, None
        if kept.grounded:
            task.detector, classifier = self._config.quality.detector, self._classifier
            limit_s = CLASSIFIER_STEP_S if classifier else STEP_S
        self._checks.submit(task, kept.record, partial(self._looked, kept), limit_s, classifier)

    async def drain(self, within_s: float) -> None:
        """Wait until all is looked at that was offered, but no longer than that; the rest is dropped."""
        await self._checks.drain(within_s)

    async def insufficient(self, role: str, body: bytes, answer: Answer, salt: str) -> str | None:
        """The check that an answer fails so plainly that a more precise variant should be asked; None where
        it fails none, or that cannot be said within ``ESCALATION_S``. ``salt``: the tenant's."""
        if answer.too_long or len(body) + answer.size > LONGEST_WAITED_FOR:
            self._escalation.drop("too_long")
            return None
        record = encode(AnswerRecord(body, answer.events, salt))
        try:
            async with asyncio.timeout(ESCALATION_S):
                task = Suffices(self._config.roles[role].confidence)
                step = await self._escalation.step(task, record, 4 * ESCALATION_S)
        except (TimeoutError, LostError):
            self._escalation.drop("late")
            return None
        if step.findings is None:
            self._log.warning("a check before an escalation failed: %s", step.error)
            return None
        return step.findings.insufficient

    def count_error(self, check: str, role: str, of: tuple[str, str]) -> None:
        """A check could not be made of an answer of a model and its variant."""
        self._metrics.quality_checks.labels(role, *of, check, CheckOutcome.ERROR).inc()

    # what was found

    def _looked(self, kept: _Kept, step: Step | None) -> None:
        found = step.findings if step else None
        if found is None:
            for check in ("signals", "rules", *(("grounded",) if kept.grounded else ())):
                self.count_error(check, kept.role, kept.labels)
            if step:
                self._say(kept, "checks", step.error)
            return
        self._take(kept, found)
        if self._watch and self._inquiry:
            self._inquire(self._watch, self._inquiry, kept, found)

    def _take(
        self, kept: _Kept, found: Findings, of: CellKey | None = None, *, probation: bool = False
    ) -> None:
        """Count what was found; ``of``: whom it is about, where that is not who answered the client."""
        key = of or kept.key
        labels, metrics = parts_of(of.variant) if of else kept.labels, self._metrics
        asked = kept.role, *labels
        for check, outcome in found.outcomes.items():
            metrics.quality_checks.labels(*asked, check, outcome).inc()
        for check, score in found.scores.items():
            metrics.quality_score.labels(*asked, check).observe(score)
        for label, count in found.sentences.items():
            metrics.quality_sentences.labels(*asked, label).inc(count)
        if found.nll_mean is not None and found.entropy_max is not None:
            metrics.nll_mean.labels(*asked).observe(found.nll_mean)
            metrics.entropy_max.labels(*asked).observe(found.entropy_max)
        if found.compared is not None:
            metrics.shadow.labels(*asked, found.compared).inc()
        if found.disagreement is not None and found.divergence is not None:
            metrics.disagreement.labels(*asked).observe(found.disagreement)
            metrics.divergence.labels(*asked).observe(found.divergence)
        if key and self._watch:
            for note in found.notes:
                self._watch.note(key, note.check, note.bad, note.value, probation=probation)
        for one in found.evaluations:
            emit(one.name, one.label, one.score, role=kept.role, of=labels, request_id=kept.request_id)
        for problem in found.problems:
            self._say(kept, "checks", problem)

    def _say(self, kept: _Kept, what: str, problem: str) -> None:
        fields = {"request_id": kept.request_id, "role": kept.role, "variant": kept.variant}
        self._log.warning("%s: %s", what, problem, extra={"fields": fields})

    # what engines are asked, later

    def _inquire(self, watch: Watch, inquiry: Inquiry, kept: _Kept, found: Findings) -> None:
        key = kept.key
        candidates = [
            other
            for other in watch.on_probation(kept.role)
            if other != key and is_in(kept.sample_id, "probation", self._copied)
        ]
        if kept.grounded and is_in(kept.sample_id, "judge", self._judged):
            skipped = partial(self._judged_as, kept, CheckOutcome.SKIPPED)
            inquiry.offer(partial(self._judge, kept), skipped)
        reference = self._reference(kept.variant)
        shadowed = reference is not None and is_in(kept.sample_id, "shadow", self._shadowed)
        unusual = key is not None and found.nll_mean is not None and watch.unusual(key, found.nll_mean)
        if not shadowed and not candidates and not unusual:
            return
        if not found.askable:
            if reference is not None:
                self._compared(kept, Result.INCOMPARABLE)
            return
        if key is not None and reference is not None and shadowed:
            if found.incomparable is not None:
                self._compared(kept, found.incomparable)
            elif self._keeper is not None:
                self._keeper.offer_answer(kept.role, key.variant, key.version, kept.record)
            else:
                shed = partial(self._compared, kept, Result.SHED)
                inquiry.offer(partial(self._shadow, watch, kept, key, reference), shed)
        if key is not None and unusual and found.one_text:
            inquiry.offer(partial(self._resample, kept, key), later=True)
        for other in candidates:
            inquiry.offer(partial(self._copy, kept, other), later=True)

    def _reference(self, variant: str) -> str | None:
        """Of the variant's own model; None where it is this one, or is to be left alone."""
        if self._config.watch.reference == "none":
            return None
        reference = self._config.references.get(parts_of(variant)[0])
        return None if reference == variant else reference

    async def _shadow(self, watch: Watch, kept: _Kept, key: CellKey, reference: str) -> None:
        """Let the reference score the answer; where there is suspicion, let it answer too."""
        try:
            found = await self._examine(kept, Score(reference))
        except UnansweredError as error:
            self._compared(kept, Result.ERROR)
            self._say(kept, "shadow", str(error))
            return
        self._take(kept, found)
        if found.compared is not Result.INCOMPARABLE and watch.suspected(key):
            await self._also(kept, "regenerate", Regenerate(reference))

    async def _resample(self, kept: _Kept, key: CellKey) -> None:
        await self._also(kept, "resample", Resample(key.variant))

    async def _also(self, kept: _Kept, what: str, task: Examination) -> None:
        """An examination that is not missed where it cannot be made."""
        try:
            self._take(kept, await self._examine(kept, task))
        except UnansweredError as error:
            self._say(kept, what, str(error))
        except ShedError:
            return

    async def _copy(self, kept: _Kept, other: CellKey) -> None:
        """Let a variant on probation answer a request that another has answered, and judge that."""
        reference, keeper = self._reference(other.variant), self._keeper
        try:
            if keeper is not None:
                task = Copy(other.variant, None, keeper.own if reference is not None else None)
            else:
                task = Copy(other.variant, reference)
            found = await self._examine(kept, task)
        except UnansweredError as error:
            self._say(kept, "probation", str(error))
            return
        self._take(kept, found, other, probation=True)
        if keeper is not None and task.keep is not None:
            about = keeper.about(kept.role, other.variant, other.version, probation=True)
            keeper.take(about, Step(findings=found))

    async def _judge(self, kept: _Kept) -> None:
        """Let a model label the answer's sentences."""
        settings = self._config.watch.judge
        assert settings
        try:
            async with asyncio.timeout(settings.timeout_s):
                found = await self._examine(kept, Judge(settings.max_tokens))
        except (UnansweredError, TimeoutError) as error:
            self._judged_as(kept, CheckOutcome.ERROR)
            self._say(kept, "judge", str(error) or "no answer in time")
            return
        self._take(kept, found)

    async def _examine(self, kept: _Kept, task: Examination) -> Findings:
        """Have an answer examined, and engines asked what that takes. Raises UnansweredError or ShedError."""
        session = 0
        try:
            step = await self._checks.step(task, kept.record)
            while step.ask is not None:
                session, asked = step.session, step.ask
                try:
                    reply = Resume(session, await self._ask(asked.variant, asked.path, asked.body))
                except UnansweredError as error:
                    reply = Resume(session, None, str(error))
                session, step = 0, await self._checks.step(reply)
        except LostError as error:
            raise UnansweredError(str(error)) from None
        finally:
            if session:
                self._checks.submit(Forget(session), b"", lambda _: None)
        if step.findings is None:
            raise UnansweredError(step.error)
        return step.findings

    async def _ask(self, variant: str, path: str, body: bytes) -> bytes:
        assert self._inquiry
        if variant:
            return await self._inquiry.ask(variant, path, body)
        judge = self._config.watch.judge
        assert judge
        return await self._inquiry.ask_judge(judge.model, body)

    def _judged_as(self, kept: _Kept, outcome: CheckOutcome) -> None:
        self._metrics.quality_checks.labels(kept.role, *kept.labels, "judge", outcome).inc()

    def _compared(self, kept: _Kept, result: Result) -> None:
        self._metrics.shadow.labels(kept.role, *kept.labels, result).inc()
