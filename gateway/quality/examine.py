"""The checks of one answer, as they run beside the event loop: by itself, and by asking engines.

Each function gives what it found. A check that raises is an outcome of its own, and the others go on.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.kept.conversation import LONGEST, answer_of, asked_of
from gateway.kept.redact import redactor
from gateway.quality import judge, shadow
from gateway.quality.checks import HARD, LONGEST_TEXT, failures
from gateway.quality.detectors import DETECTORS, Detector
from gateway.quality.examiner import Asking, Examiner, UnansweredError
from gateway.quality.grounded import context_of
from gateway.quality.records import (
    AnswerRecord,
    CheckOutcome,
    Copy,
    Evaluation,
    Examination,
    Findings,
    Keep,
    Kept,
    Look,
    Note,
    Regenerate,
    Resample,
    Result,
    Score,
    Suffices,
    Unfit,
    decode_answer,
)
from gateway.quality.schemas import Schemas
from gateway.quality.transcript import Transcript, read_object

LONGEST_COMPARED = 200_000
"""Bytes of a request beyond which no engine is asked about its answer."""
SAMPLES = 3
"""Second answers that an unusual one is compared with."""
_TOP = 5


@dataclass(frozen=True, slots=True)
class Subject:
    """An answer and its request, read."""

    record: AnswerRecord
    request: Mapping[str, Any]
    answer: Transcript

    @classmethod
    def of(cls, encoded: bytes, tools: Tools | None = None) -> Subject:
        """``tools`` are told whose it is. Raises msgspec.MsgspecError for what is no ``AnswerRecord``."""
        record = decode_answer(encoded)
        if tools is not None:
            tools.schemas.tenant = record.cache_salt
        return cls(record, read_object(record.body) or {}, Transcript.of(record.events))


@dataclass(slots=True)
class Tools:
    """What the process keeps between answers. ``detectors`` has those that are ready; ``problem`` says why
    the classifier is not."""

    schemas: Schemas = field(default_factory=Schemas)
    detectors: dict[str, Detector] = field(default_factory=dict)
    problem: str = ""

    def detector(self, name: str) -> Detector:
        """Raises RuntimeError for a classifier that could not be loaded."""
        if name not in self.detectors:
            if name == "classifier":
                raise RuntimeError("the classifier is not loaded")
            self.detectors[name] = DETECTORS[name](None)
        return self.detectors[name]


# by itself


def look(task: Look, record: bytes, tools: Tools) -> Findings:
    """Signals, rules, and what the answer makes up."""
    subject, found = Subject.of(record, tools), Findings()
    _guarded(found, "signals", lambda: _signals(subject, found))
    _guarded(found, "rules", lambda: _rules(subject, found, tools))
    detector = task.detector
    if detector is not None and "messages" in subject.request:
        _guarded(found, "grounded", lambda: _grounded(subject, found, tools.detector(detector)))
    found.one_text = len(subject.answer.texts) == 1
    found.askable, found.incomparable = _askable(subject), _incomparable(subject)
    return found


def suffices(task: Suffices, record: bytes, tools: Tools) -> Findings:
    """Whether an answer is good enough to be sent."""
    subject = Subject.of(record, tools)
    failed = failures(subject.request, subject.answer, tools.schemas)
    signals = subject.answer.signals
    if task.confidence is not None and signals and math.exp(-signals.nll_mean) < task.confidence:
        return Findings(insufficient="confidence")
    return Findings(insufficient=next((name for name in HARD if failed.get(name)), None))


def keep(task: Keep, record: bytes) -> Findings:
    """What of a request, or of its answer, is to be kept."""
    subject, found = Subject.of(record), Findings()
    if task.kind == "request":
        _take(found, asked_of(subject.request, redactor(tuple(task.own))))
    else:
        _keep_answer(subject, found, task.own)
    return found


def _keep_answer(subject: Subject, found: Findings, own: Sequence[str]) -> None:
    if len(subject.record.body) + sum(map(len, subject.answer.texts)) > LONGEST:
        found.unfit = Unfit.TOO_LONG
    else:
        _take(found, answer_of(subject.request, subject.answer, redactor(tuple(own))))


def _take(found: Findings, what: Kept | Unfit) -> None:
    if isinstance(what, Kept):
        found.kept = what
    else:
        found.unfit = what


def _signals(subject: Subject, found: Findings) -> None:
    """Never failed: they are sensors, not verdicts."""
    signals = subject.answer.signals
    if signals is None:
        found.outcomes["signals"] = CheckOutcome.SKIPPED
        return
    found.outcomes["signals"] = CheckOutcome.PASSED
    found.nll_mean, found.entropy_max = signals.nll_mean, signals.entropy_max
    found.scores["likely_tokens"] = 1 - signals.unlikely_share
    found.notes.append(Note("signals", False, signals.nll_mean))


def _rules(subject: Subject, found: Findings, tools: Tools) -> None:
    unchecked: set[str] = set()
    tools.schemas.tenant = subject.record.cache_salt  # another's may have been looked at meanwhile
    failed = failures(subject.request, subject.answer, tools.schemas, unchecked)
    found.outcomes.update(dict.fromkeys(unchecked, CheckOutcome.SKIPPED))
    for name, bad in failed.items():
        found.outcomes[name] = _outcome(bad)
    if failed:
        found.notes.append(Note("rules", any(failed.get(name) for name in HARD)))


def _grounded(subject: Subject, found: Findings, detector: Detector) -> None:
    context, text = context_of(subject.request.get("messages")), "\n".join(subject.answer.texts)
    found.outcomes["grounded"] = CheckOutcome.SKIPPED
    if len(context) + len(text) > LONGEST_TEXT:
        return
    result = detector.check(text, context)
    if result.score is None:
        return
    found.sentences = {label.value: count for label, count in result.counts.items()}
    found.scores["grounded"] = result.score
    if (strict := result.strict_score) is not None:
        found.scores["grounded_strict"] = strict
    outcome = found.outcomes["grounded"] = _outcome(result.bad > 0)
    found.evaluations.append(Evaluation("grounded", outcome.value, result.score))
    found.notes.append(Note("grounded", result.bad > 0))


def _askable(subject: Subject) -> bool:
    """Whether an engine can be asked the same request."""
    request = subject.request
    asked = isinstance(request.get("messages"), list) or isinstance(request.get("prompt"), str)
    return asked and len(subject.record.body) <= LONGEST_COMPARED


def _incomparable(subject: Subject) -> Result | None:
    """Why the reference cannot be asked about the answer; None where it can."""
    if not _askable(subject) or len(subject.answer.texts) != 1:
        return Result.INCOMPARABLE
    return None if subject.answer.tokens else Result.NO_LOGPROBS


# by asking engines


async def examine(task: Examination, record: bytes, tools: Tools, ask: Asking) -> Findings:
    """What comes of asking engines about an answer. Raises UnansweredError."""
    subject = Subject.of(record)
    examiner = Examiner(ask, subject.record.cache_salt)
    match task:
        case Score():
            return await _score(subject, examiner, task.reference)
        case Regenerate():
            return await _regenerate(subject, examiner, task.reference)
        case Resample():
            return await _resample(subject, examiner, task.variant)
        case Copy():
            return await _copy(subject, examiner, task, tools)
        case _:
            return await _judge(subject, examiner, task.max_tokens)


async def _score(subject: Subject, examiner: Examiner, reference: str) -> Findings:
    """Let the reference score the answer's tokens."""
    text = subject.answer.texts[0]
    rows = await examiner.rows(reference, subject.request, text)
    try:
        scored = shadow.compare(subject.answer.tokens, rows)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        raise UnansweredError("the reference's answer cannot be read") from None
    if scored is None:
        return Findings(compared=Result.INCOMPARABLE)
    return Findings(
        compared=scored.result,
        disagreement=scored.disagreement,
        divergence=scored.divergence,
        evaluations=[Evaluation("shadow", scored.result.value, 1 - scored.disputed / scored.tokens)],
        notes=[
            Note("shadow", scored.result is Result.DISPUTED),
            Note("divergence", False, scored.divergence),
        ],
    )


async def _regenerate(subject: Subject, examiner: Examiner, reference: str) -> Findings:
    """Compare with the reference's own answer; where that differs from time to time by itself, only if two of
    the reference's agree."""
    request = subject.request
    theirs = (await examiner.answer(reference, request)).message
    if request.get("temperature", 1):
        again = (await examiner.answer(reference, request)).message
        if not shadow.same_meaning(theirs, again):
            return Findings()
    bad = not shadow.same_meaning(subject.answer.message, theirs)
    return Findings(outcomes={"regenerated": _outcome(bad)}, notes=[Note("regenerated", bad)])


async def _resample(subject: Subject, examiner: Examiner, variant: str) -> Findings:
    """Where an answer was unusually sure or unsure: does the variant say the same again, when it is asked at
    a temperature? (The idea is SelfCheckGPT's, arXiv:2303.08896.)"""
    mine, same = subject.answer.message, 0
    for number in range(SAMPLES):
        other = await examiner.answer(variant, subject.request, temperature=1.0, seed=number)
        same += shadow.same_meaning(mine, other.message)
    bad = same * 2 < SAMPLES
    return Findings(scores={"consistency": same / SAMPLES}, notes=[Note("consistency", bad)])


async def _copy(subject: Subject, examiner: Examiner, task: Copy, tools: Tools) -> Findings:
    """Let a variant on probation answer a request that another has answered, and judge that."""
    more: dict[str, Any] = {"logprobs": True, "top_logprobs": _TOP} if "messages" in subject.request else {}
    answer = await examiner.answer(task.variant, subject.request, **more)
    copy = Subject(subject.record, subject.request, answer)
    found = Findings()
    _rules(copy, found, tools)
    if task.keep is not None:
        _keep_answer(copy, found, task.keep)
    if task.reference is not None and _incomparable(copy) is None:
        scored = await _score(copy, examiner, task.reference)
        found.compared, found.evaluations = scored.compared, scored.evaluations
        found.disagreement, found.divergence = scored.disagreement, scored.divergence
        found.notes += [note for note in scored.notes if note.check == "shadow"]
    return found


async def _judge(subject: Subject, examiner: Examiner, max_tokens: int) -> Findings:
    """Let a model label the answer's sentences."""
    if "messages" not in subject.request:
        return Findings()
    text = "\n".join(subject.answer.texts)
    asked = judge.request(text, context_of(subject.request.get("messages")), max_tokens)
    if asked is None:
        return Findings(outcomes={"judge": CheckOutcome.SKIPPED})
    body, sentences = asked
    try:
        result = judge.read(await examiner.judge(body), sentences)
    except judge.JudgeError as error:
        raise UnansweredError(str(error)) from None
    bad = result.bad > 0
    outcome = _outcome(bad)
    found = Findings(outcomes={"judge": outcome}, notes=[Note("judge", bad)])
    found.evaluations.append(Evaluation("judge", outcome.value, result.score))
    if result.score is not None:
        found.scores["judge"] = result.score
    return found


def _guarded(found: Findings, name: str, check: Callable[[], None]) -> None:
    try:
        check()
    except Exception as error:
        found.outcomes[name] = CheckOutcome.ERROR
        found.problems.append(f"check {name} failed: {where(error)}")


def where(error: BaseException) -> str:
    """What an error is and where it was raised; not its text, which may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"


def _outcome(bad: bool) -> CheckOutcome:
    return CheckOutcome.FAILED if bad else CheckOutcome.PASSED
