"""The card of a variant: what it is, how it was made, what it lost, and whether it may serve a role.

``card.json`` lies beside the variant's weights and is the contract between ``quantize``, which
writes it, and ``gateway`` and ``deploy``, which read it. This module needs pydantic alone, and is light.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator

from quantize.core.engine_figures import AdapterCarried, EngineAccount, Speed, Strict
from quantize.core.files import sha256_of, write_whole
from quantize.core.refusals import first_fault
from quantize.core.reported_figures import Reported
from quantize.seal import SEAL, is_edited, sealed

CARD_NAME = "card.json"
FORMAT: Literal[5] = 5
"""Raised whenever a card gets fields that an older version cannot read."""
READABLE = (2, 3, 4, FORMAT)
"""Formats that are read. What was measured under the oldest is stale: it does not say on what."""
ADAPTER = "adapter"
"""Name of the folder, in a version's directory, of the LoRA adapter that it carries."""
CURRENT = "current"
"""Name of the link, in a variant's directory, to the version that is in use."""
Evidence = Literal["labels", "reference"]
"""What answers are compared with: right ones that somebody gave, or the reference's own."""
VARIANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
VERSION = re.compile(r"[0-9a-f]{12}")
LLAMA, ONNX = "llama.cpp", "onnxruntime"
"""Targets of variants that another engine than vLLM serves: GGUF files, and classifiers."""


class CardError(ValueError):
    """A card is missing, malformed, or does not match the files beside it. The text says the fix."""


class Outcome(StrEnum):
    """What a gate concluded for one role."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_ENOUGH_EVIDENCE = "not_enough_evidence"


class Verdict(Strict):
    """A gate's conclusion for one role, with the numbers it rests on in words."""

    outcome: Outcome
    reasons: tuple[str, ...]


class TextEvaluation(Strict):
    """Token statistics on right answers in their context, paired with the reference on the same tokens."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    tokens: int = Field(ge=1)
    perplexity: float = Field(description="of right answers, given what was asked")
    reference_perplexity: float
    delta_log_perplexity: float = Field(description="ln(perplexity) minus the reference's, nats")
    delta_log_perplexity_se: float = Field(description="standard error of that difference, paired")
    delta_log_perplexity_skewness: float | None = Field(default=None, description="over conversations")
    kl_mean: float = Field(description="KL(reference || variant), nats per token")
    kl_p99: float
    kl_vocabulary: int = Field(description="tokens of the vocabulary that the KL sums over")
    kl_exact: bool = Field(
        default=False, description="those are the whole vocabulary; else the KL is a lower bound"
    )
    kl_se: float = Field(default=0.0, ge=0, description="standard error of kl_mean, clustered by sequence")
    kl_interval: tuple[float, float] | None = Field(default=None, description="95 % of kl_mean, clustered")
    kl_upper: float = Field(
        default=math.inf, ge=0, description="upper bound of kl_mean, equal where exact; infinite without one"
    )
    kl_upper_se: float = Field(default=math.inf, ge=0, description="standard error of kl_upper")
    sequences: int = Field(default=0, ge=0, description="conversations that the tokens are of; 0: not kept")
    top1_agreement: float = Field(ge=0, le=1)
    other_choices: float | None = Field(
        default=None, description="share of tokens with another likeliest one, the mean over conversations"
    )
    other_choices_se: float = Field(default=0.0, ge=0, description="standard error of that mean")

    @model_validator(mode="before")
    @classmethod
    def _exact_is_its_own_bound(cls, data: Any) -> Any:
        """An exact KL need not be given twice."""
        if isinstance(data, dict) and data.get("kl_exact") and "kl_upper" not in data:
            return {**data, "kl_upper": data.get("kl_mean"), "kl_upper_se": data.get("kl_se", 0.0)}
        return data


class Paired(Strict):
    """A yes-or-no property of answers to the same items, of the variant and of the reference."""

    items: int = Field(ge=1)
    good: int = Field(ge=0, description="answers of the variant that have it")
    reference_good: int = Field(ge=0)
    flips_to_bad: int = Field(ge=0, description="the reference's answer has it, the variant's has not")
    flips_to_good: int = Field(ge=0)
    mcnemar_p: float = Field(ge=0, le=1, description="two-sided exact McNemar test on the flips")

    @property
    def drop(self) -> float:
        """Share of the reference that has it minus the variant's share."""
        return (self.reference_good - self.good) / self.items


class NoiseFloor(Strict):
    """The reference against itself: a second pass over the same items, in another order."""

    items: int = Field(ge=1)
    flips: int = Field(ge=0, description="items right in one pass and wrong in the other")
    other_answers: int = Field(ge=0, description="items with another text")
    kl_mean: float = Field(description="nats per token, as for variants")
    kl_p99: float


class LongContext(Strict):
    """Answers from a context that fills the model's window, and the right answers' log-probabilities."""

    prompt_tokens: float = Field(ge=0, description="mean length of the scored conversations, tokens")
    retrieval: Paired = Field(description="items answered right")
    text: TextEvaluation
    noise_kl: float | None = Field(default=None, description="mean KL of the reference against itself")


class RoleEvaluation(Strict):
    """A variant's answers to a role's held-out items, paired with the reference's answers."""

    evidence: Evidence = Field(
        default="labels",
        description="'reference': nobody said what is right; 'right' are answers that begin as the "
        "reference's, which it repeats itself in reference_correct",
    )
    items: int = Field(ge=1)
    correct: int = Field(ge=0, description="items answered right, by the role's check")
    reference_correct: int = Field(ge=0)
    flips_to_wrong: int = Field(ge=0, description="reference right, variant wrong")
    flips_to_right: int = Field(ge=0, description="reference wrong, variant right")
    same_answer: int = Field(ge=0, description="items where both gave the same text")
    text: TextEvaluation
    mcnemar_p: float = Field(ge=0, le=1, description="two-sided exact McNemar test on the flips")
    grounded: Paired | None = Field(
        default=None, description="answers that say nothing which the items' grounds do not hold"
    )
    valid_json: Paired | None = Field(default=None, description="answers that match the items' JSON schema")
    across: dict[str, Paired] = Field(
        default_factory=dict, description="another model to right answers, paired with its reference's"
    )
    across_grounded: dict[str, Paired] = Field(default_factory=dict, description="the same of grounded ones")
    long_context: LongContext | None = None
    noise: NoiseFloor | None = None
    reported: Reported | None = Field(default=None, description="what gates nothing")

    @property
    def task(self) -> Paired:
        """Right answers."""
        return Paired(
            items=self.items,
            good=self.correct,
            reference_good=self.reference_correct,
            flips_to_bad=self.flips_to_wrong,
            flips_to_good=self.flips_to_right,
            mcnemar_p=self.mcnemar_p,
        )

    @property
    def accuracy(self) -> float:
        return self.correct / self.items

    @property
    def agreement(self) -> float:
        return self.same_answer / self.items


class Evaluation(Strict):
    """Everything measured through the served engine, and on which engine that was."""

    roles: dict[str, RoleEvaluation]
    text: TextEvaluation = Field(description="all roles pooled")
    tasks_sha256: str
    engine: dict[str, str] = Field(description="on what: engine, build, device, driver, flags, environment")
    noise: NoiseFloor | None = Field(default=None, description="all roles pooled")
    p_values: dict[str, float] = Field(
        default_factory=dict, description="'variant/role' to its gate's p-value, of all judged together"
    )


class Making(Strict):
    """What making a variant took."""

    seconds: float = Field(ge=0)
    peak_memory_bytes: int | None = Field(default=None, ge=0, description="largest resident size")
    peak_device_bytes: int | None = Field(default=None, ge=0, description="largest use of an accelerator")


class Training(Strict):
    """How a trained variant's numbers were found. KL is to the reference, nats per token, on conversations
    that training did not see, in torch."""

    base: str = Field(description="what it was begun with: a variant and its version, or a method")
    settings: dict[str, bool | int | float | str | None]
    source: str = Field(description="of the text")
    sha256: str = Field(description="of the text's tokens")
    sequences: int
    tokens: int
    kl_before: float | None = None
    kl_after: float | None = None
    tensors: int = Field(default=0, description="compared with what was trained, and equal bit for bit")
    seconds: float = 0.0


class Calibration(Strict):
    source: str
    sha256: str
    samples: int
    tokens: int


class Card(Strict):
    """The whole card. Bytes are of tensors as stored; bits are of a weight, scales not counted.

    The files that it lists never change, and the version is their hash. What was found out about them
    later (evaluation, gate, state) is written into the card again.
    """

    format: Literal[5] = FORMAT
    model: str
    variant: str
    reference: str = Field(description="name of the variant that this one is compared with")
    origin: Literal["made", "registered"] = Field(
        default="made", description="made here, or made elsewhere and registered as it was"
    )
    scheme: str = Field(description="the scheme of all groups, or how many have which")
    method: str = Field(description="how the numbers were found, as far as that is known")
    schemes: dict[str, str] = Field(default_factory=dict, description="module group to scheme: the plan")
    methods: dict[str, str] = Field(
        default_factory=dict, description="module group to method, where it is another one"
    )
    kv: str = Field(default="auto", description="scheme of the KV cache, by vLLM's --kv-cache-dtype")
    weight_bits: int = Field(ge=1, le=32, description="lowest bits of any linear module's weights")
    module_bits: dict[str, int] = Field(description="linear module name to weight bits")
    bits_per_weight: float | None = Field(
        default=None, gt=0, description="of the quantizable modules alone, scales and zero points included"
    )
    weight_bytes: int = Field(ge=0)
    kv_bytes_per_token: int = Field(ge=0)
    max_model_len: int = Field(ge=1)
    predicted_kl: float | None = Field(default=None, description="by the planner, nats per token")
    target: str | None = Field(default=None, description="where it was checked to load, before it was made")
    state: Literal["ready", "broken"] = "ready"
    engine_words: str = Field(default="", description="what the engine said when it could not load it")
    notes: tuple[str, ...] = Field(default=(), description="what a person should know about the files")
    calibration: Calibration | None = None
    adapter: AdapterCarried | None = Field(default=None, description="in the folder adapter, by PEFT")
    base_sha256: str = Field(default="", description="of the base checkpoint's files")
    parent: str | None = Field(default=None, description="version of the reference that it was made from")
    versions: dict[str, str] = Field(description="package name to version, of what made it")
    created: str
    inputs_sha256: str = Field(default="", description="of everything that decides the weights")
    files: dict[str, str] = Field(description="file name to SHA-256, all files but the card")
    evaluation: Evaluation | None = None
    speed: Speed | None = Field(default=None, description="on the engine that the evaluation names")
    account: EngineAccount | None = Field(
        default=None, description="what the engine served when the variant was measured"
    )
    making: Making | None = Field(default=None, description="what making it took")
    training: Training | None = Field(default=None, description="of a variant that was trained")
    doubts: tuple[str, ...] = Field(
        default=(), description="why its figures are not to be trusted; with any it passes no gate"
    )
    gate: dict[str, Verdict] = Field(default_factory=dict)

    @property
    def id(self) -> str:
        """What the variant is called among those of other models."""
        return f"{self.model}:{self.variant}"

    @property
    def version(self) -> str:
        """Twelve hex digits that change whenever a file of the variant changes."""
        listing = json.dumps(self.files, sort_keys=True).encode()
        return hashlib.sha256(listing).hexdigest()[:12]

    @property
    def passed(self) -> frozenset[str]:
        """Roles whose gate it passed."""
        return frozenset(role for role, verdict in self.gate.items() if verdict.outcome == Outcome.PASSED)

    def memory_bytes(self, kv_tokens: int) -> int:
        """Bytes that serving takes with ``kv_tokens`` tokens in the KV cache."""
        return self.weight_bytes + kv_tokens * self.kv_bytes_per_token


def variant_directory(variants_dir: Path, variant: str, version: str | None = None) -> Path:
    """Where the files of a variant's version lie: ``variants_dir/<variant>/<version>``.

    Without ``version`` the link ``current`` is followed, so that a reader keeps the version that it began
    with when another one is chosen meanwhile. The directory need not exist. Raises CardError.
    """
    directory = variants_dir / variant
    if VARIANT_NAME.fullmatch(variant) is None:
        raise CardError(f"variant name {variant!r} cannot be used; take letters, digits, '.', '_' and '-'")
    if (directory / CARD_NAME).exists():
        raise CardError(
            f"{directory} holds a variant in an older layout, without versions; remove it and make the "
            "variant again"
        )
    if version is not None:
        if VERSION.fullmatch(version) is None:
            raise CardError(f"{variant}: version {version!r} is not twelve hexadecimal digits")
        return directory / version
    link = directory / CURRENT
    return directory / os.readlink(link) if link.is_symlink() else link


def refuse_broken(card: Card) -> None:
    """Raise CardError when the engine could not load the variant, with the engine's words."""
    if card.state == "broken":
        raise CardError(
            f"variant {card.variant} ({card.version}) is broken: the engine could not load it "
            f"({card.engine_words}); take it out of serve, choose another version with "
            "`tiercel variants use`, or make it again"
        )


def hash_files(directory: Path) -> dict[str, str]:
    """SHA-256 of every file of a variant but its card, by name relative to ``directory``."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != CARD_NAME)
    return {path.relative_to(directory).as_posix(): sha256_of(path) for path in paths}


def write_card(card: Card, directory: Path) -> None:
    """Write ``card.json``, sealed, so that a reader sees the old one or the new one, never a part."""
    write_whole(directory / CARD_NAME, sealed(card.model_dump_json()))


def read_card(directory: Path, *, even_edited: bool = False) -> Card:
    """Read a variant's card. Raises CardError when there is none or it is malformed, and when it was edited
    after it was written, unless ``even_edited``: then nothing that it says of measurements is to be used."""
    path = directory / CARD_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CardError(f"{path} does not exist; make the variant with `tiercel quantize`") from None
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise CardError(f"{path}: is no JSON object; make the variant again")
    if (given := found.get("format", FORMAT)) not in READABLE:
        known = ", ".join(map(str, READABLE))
        raise CardError(
            f"{path}: format {given!r} is none of {known}, which this version of Tiercel reads; "
            "make the variant again"
        )
    edited = is_edited(found)
    found.pop(SEAL, None)
    try:
        card = Card.model_validate(found | {"format": FORMAT})
    except ValidationError as error:
        raise CardError(f"{path}: {first_fault(error, 'the file')}; make the variant again") from None
    if edited and not even_edited:
        raise CardError(
            f"{path} was edited after it was written: it does not match its own seal, and what it says of "
            f"measurements cannot be trusted; `tiercel quantize measure {card.variant}` measures again"
        )
    return card


def has_seal(directory: Path) -> bool:
    """Whether a card that can be read was sealed; what older versions wrote was not."""
    return SEAL in json.loads((directory / CARD_NAME).read_text(encoding="utf-8"))


def verify_files(card: Card, directory: Path) -> None:
    """Raise CardError unless the files in ``directory`` are exactly those that the card lists."""
    present = {name: digest for name, digest in hash_files(directory).items() if ".partial" not in name}
    for name, digest in card.files.items():
        if name not in present:
            raise CardError(
                f"{directory}: {name} is listed in {CARD_NAME} but missing; make the variant again"
            )
        if present[name] != digest:
            raise CardError(
                f"{directory}: {name} does not match {CARD_NAME} (SHA-256 {present[name][:12]}…, card says "
                f"{digest[:12]}…); make the variant again, or restore the file"
            )
    if extra := sorted(present.keys() - card.files.keys()):
        raise CardError(f"{directory}: {extra[0]} is not listed in {CARD_NAME}; remove it")
