"""What passes between the gateway's event loop and the process that reads content: plain records, as bytes.

One message goes to the process at a time, and one ``Step`` comes back for each: what was found, or what an
engine is to be asked. Before it there may be steps that say which schema is about to be looked at. The loop
decodes no more than that: prompts, answers and what engines say are bytes to it.
"""

from __future__ import annotations

import struct
from enum import StrEnum

import msgspec

from gateway.quality.schemas import Mark

HEADER = struct.Struct(">III")
"""Before a message to the process: the bytes of its task and of the record that this is about, and the
milliseconds that it may take. Before a step: its bytes, and two zeros."""


class CheckOutcome(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    """There was nothing to check: no log-probabilities, no text, or too much of it; or a process was lost
    over the schema before."""
    ERROR = "error"


class Result(StrEnum):
    """What came of putting an answer before the reference."""

    AGREED = "agreed"
    DISPUTED = "disputed"
    INCOMPARABLE = "incomparable"
    """There is no text, or more than one, or too much of it."""
    NO_LOGPROBS = "no_logprobs"
    SHED = "shed"
    """Given up before it was asked, for users' requests."""
    ERROR = "error"


class Unfit(StrEnum):
    """Why a request or an answer is not kept."""

    FORM = "form"
    """It has what an item does not hold: tools, images, another guidance than a JSON schema; of an answer: it
    is not one text with log-probabilities."""
    REDACTED = "redacted"
    """Of an answer that the reference was to score: something would have been taken out."""
    TOO_LONG = "too_long"


class Kept(msgspec.Struct, array_like=True):
    """What is to be kept, encoded."""

    data: bytes

    def __repr__(self) -> str:
        return f"Kept({len(self.data)} bytes)"


class AnswerRecord(msgspec.Struct, array_like=True, gc=False):
    """A finished answer and its request, as they passed by."""

    body: bytes
    """The request's JSON."""
    events: list[bytes]
    """Those of the answer, or the whole of one that was not streamed."""
    cache_salt: str = ""
    """The tenant's: engines that are asked about the answer are given it."""


# to the process


class Prepare(msgspec.Struct, tag="prepare", array_like=True):
    """The first message. ``classifier``: the directory of a detector's model, to be loaded."""

    classifier: str | None = None
    deadly: list[Mark] = []
    """Schemas over which earlier processes were lost, and which are not to be looked at."""


class Look(msgspec.Struct, tag="look", array_like=True):
    """Check the record's answer by itself. ``detector``: who looks for what it makes up; None for nobody."""

    detector: str | None = None
    classifier: str | None = None


class Suffices(msgspec.Struct, tag="suffices", array_like=True):
    """Whether an answer is good enough to be sent. ``confidence``: the least geometric mean probability of
    its tokens, if any."""

    confidence: float | None = None


class Score(msgspec.Struct, tag="score", array_like=True):
    """Let the reference score an answer."""

    reference: str


class Regenerate(msgspec.Struct, tag="regenerate", array_like=True):
    """Compare an answer with the reference's own."""

    reference: str


class Resample(msgspec.Struct, tag="resample", array_like=True):
    """Ask a variant again, at a temperature, whether it says the same."""

    variant: str


class Copy(msgspec.Struct, tag="copy", array_like=True):
    """Let another variant answer the request, and judge that by rules and, if there is one, by the
    reference of its model. ``keep``: patterns that are redacted where the answer is to be kept for the
    reference; None where it is not."""

    variant: str
    reference: str | None
    keep: list[str] | None = None


class Keep(msgspec.Struct, tag="keep", array_like=True):
    """Say what of the record is to be kept. ``kind``: ``request`` for an item, ``answer`` for the reference.
    ``own``: the user's patterns."""

    kind: str
    own: list[str] = []


class Judge(msgspec.Struct, tag="judge", array_like=True):
    """Let a model label the answer's sentences."""

    max_tokens: int


class Resume(msgspec.Struct, tag="resume", array_like=True):
    """An engine's answer to what a session has asked; None, with the reason, where there was none."""

    session: int
    answer: bytes | None
    why: str = ""


class Forget(msgspec.Struct, tag="forget", array_like=True):
    """A session will not be resumed."""

    session: int


Examination = Score | Regenerate | Resample | Copy | Judge
Task = Prepare | Look | Suffices | Keep | Score | Regenerate | Resample | Copy | Judge | Resume | Forget


# from the process


class Ask(msgspec.Struct, array_like=True):
    """A POST to an engine of ``variant``; to the judge where that is empty. ``body`` is a JSON object that is
    not empty and names no priority."""

    variant: str
    path: str
    body: bytes


class Note(msgspec.Struct, array_like=True):
    """An outcome for the watch."""

    check: str
    bad: bool
    value: float | None = None


class Evaluation(msgspec.Struct, array_like=True):
    """For OpenTelemetry. ``score``: 1 is best, None for none."""

    name: str
    label: str
    score: float | None


class Findings(msgspec.Struct, omit_defaults=True):
    """What was found. Nothing of it quotes a prompt or an answer, but for what is to be kept."""

    outcomes: dict[str, CheckOutcome] = {}
    """By check."""
    scores: dict[str, float] = {}
    """By check; 1 is best."""
    sentences: dict[str, int] = {}
    """How many, by label."""
    notes: list[Note] = []
    evaluations: list[Evaluation] = []
    problems: list[str] = []
    """For the log."""
    nll_mean: float | None = None
    """Mean -log p of the answer's tokens, and the highest entropy, in nats."""
    entropy_max: float | None = None
    askable: bool = False
    """An engine can be asked the same request."""
    incomparable: Result | None = None
    """Why the answer cannot be put before the reference; None where it can."""
    one_text: bool = False
    """It has exactly one choice."""
    compared: Result | None = None
    """What came of putting it before the reference, and how far they are apart (``shadow.Scored``)."""
    divergence: float | None = None
    disagreement: float | None = None
    insufficient: str | None = None
    """The check for which the answer should not be sent."""
    kept: Kept | None = None
    unfit: Unfit | None = None
    """Why there is nothing to be kept, where there was to be."""


class Step(msgspec.Struct, omit_defaults=True):
    """What a message has led to: findings, or a question after whose answer ``session`` goes on. Neither
    where the message could not be understood; ``error`` then says why."""

    findings: Findings | None = None
    session: int = 0
    ask: Ask | None = None
    error: str = ""
    begins: Mark | None = None
    """Nothing has come of the message yet: this schema is about to be looked at, or ``NONE`` is any more."""


_ENCODER = msgspec.msgpack.Encoder()
_TASKS: msgspec.msgpack.Decoder[Task] = msgspec.msgpack.Decoder(Task)
_STEPS = msgspec.msgpack.Decoder(Step)
_ANSWERS = msgspec.msgpack.Decoder(AnswerRecord)


def encode(message: Task | Step | AnswerRecord) -> bytes:
    return _ENCODER.encode(message)


def decode_task(message: bytes) -> Task:
    """Raises msgspec.MsgspecError."""
    return _TASKS.decode(message)


def decode_step(message: bytes) -> Step:
    """Raises msgspec.MsgspecError."""
    return _STEPS.decode(message)


def decode_answer(record: bytes) -> AnswerRecord:
    """Raises msgspec.MsgspecError."""
    return _ANSWERS.decode(record)
