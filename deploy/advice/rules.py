"""The rules of advice, as data: the first that applies is taken, and its reason is what a person reads.

Reasons are written with the words of :attr:`deploy.advice.facts.Facts.words`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from deploy.advice.facts import FEW_BITS, Facts

ALMOST_NONE, LITTLE, SOME = 0.5, 2.0, 5.0
"""Per cent of right answers that may be lost: below the first nothing may be seen to change; the second is a
gate's default (``max_accuracy_drop``); from the third on an agent reads the answers, not a person."""
ALONE = 2
"""Requests at a time up to which an engine is bound by the bytes of its weights."""


class Technique(StrEnum):
    FULL_BITS = "16 bits"
    PTQ8 = "PTQ, 8 bits"
    PTQ4 = "PTQ, 4 bits"
    MIXED = "mixed plan"
    KV = "KV quantization"
    PTQ8_KV = "PTQ, 8 bits, and KV quantization"
    PTQ4_KV = "PTQ, 4 bits, and KV quantization"
    MIXED_KV = "mixed plan and KV quantization"
    QAT = "QAT"
    DISTILLATION = "distillation"
    SMALLER = "smaller model"
    GGUF = "GGUF"
    FULL = "full fine-tuning"
    LORA = "LoRA"
    QLORA = "QLoRA"


@dataclass(frozen=True)
class Rule:
    """``when`` it applies, ``technique`` is advised, for the reason ``why``."""

    name: str
    technique: Technique
    when: Callable[[Facts], bool]
    why: str


EDGE = (
    Rule(
        "edge-8-bits",
        Technique.GGUF,
        lambda f: f.gguf == "q8_0",
        "{model} in 8 bits fits into {memory} beside a KV cache of {kv}; llama.cpp runs where vLLM does not",
    ),
    Rule(
        "edge-4-bits",
        Technique.GGUF,
        lambda f: f.gguf is not None and f.gguf not in FEW_BITS,
        "the device has {memory} beside a KV cache of {kv}, which llama.cpp's k-quants fit; vLLM does not "
        "run there",
    ),
    Rule(
        "edge-2-bits",
        Technique.GGUF,
        lambda f: f.gguf is not None and f.wish.loss >= SOME,
        "nothing above {gguf} fits into {memory}; below 4 bits a model invents more, so judge it before "
        "anybody reads it",
    ),
    Rule(
        "edge-too-large",
        Technique.SMALLER,
        lambda f: True,
        "{model} does not fit into {memory} with a KV cache of {kv} ({tokens} tokens) at a loss of {loss}",
    ),
)
"""Of devices that llama.cpp serves."""

DEPLOY = (
    Rule(
        "nothing-may-change",
        Technique.FULL_BITS,
        lambda f: f.wish.loss < ALMOST_NONE and f.fits(16),
        "at most {loss} of the right answers may be lost, and 16 bits fit: {w16kv16} of {memory}",
    ),
    Rule(
        "cache-alone",
        Technique.KV,
        lambda f: f.wish.loss < ALMOST_NONE and f.fits(16, 8),
        "at most {loss} may be lost, and 16-bit weights fit once the KV cache of {kv} has 8 bits: {w16kv8}; "
        "weights lose more than the cache does",
    ),
    Rule(
        "one-stream",
        Technique.PTQ4,
        lambda f: (
            f.hardware.kind == "gpu" and f.wish.concurrency <= ALONE and f.wish.loss >= SOME and f.fits(4)
        ),
        "{tokens} tokens: so few requests at a time wait for the bytes of the weights, of which 4 bits have "
        "least, and {loss} may be lost",
    ),
    Rule(
        "eight-bits",
        Technique.PTQ8,
        lambda f: f.fits(8),
        "8 bits fit ({w8kv16} of {memory}): half the bytes, the least loss of what is quantized, and the "
        "fastest under load where that was measured (an H100, a CPU)",
    ),
    Rule(
        "eight-bits-and-cache",
        Technique.PTQ8_KV,
        lambda f: f.fits(8, 8),
        "8-bit weights fit only with an 8-bit KV cache ({w8kv8} of {memory}, with 16 bits {w8kv16})",
    ),
    Rule(
        "trained-below-eight",
        Technique.QAT,
        lambda f: f.wish.loss < LITTLE and f.trains("full") and (f.planned() or f.planned(f.small_kv)),
        "8 bits do not fit ({w8kv16} of {memory}), at most {loss} may be lost, and there is {device} to "
        "train on (about {full} are needed): training wins back a part of what rounding below 8 bits loses "
        "(of the demo model 84 % at 2 bits in most roles, nothing to see at 4: docs/benchmarks/training.md)",
    ),
    Rule(
        "mixture",
        Technique.MIXED,
        lambda f: f.wish.loss < SOME and f.planned(),
        "8 bits do not fit ({w8kv16} of {memory}); {room} are left for weights, {bits} bits each, which a "
        "plan spends where they count",
    ),
    Rule(
        "four-bits",
        Technique.PTQ4,
        lambda f: f.fits(4),
        "8 bits do not fit ({w8kv16} of {memory}), 4 do ({w4kv16}), and {loss} may be lost",
    ),
    Rule(
        "mixture-and-cache",
        Technique.MIXED_KV,
        lambda f: f.wish.loss < SOME and f.planned(f.small_kv),
        "with a KV cache of 8 bits {room8} are left for weights, {bits8} bits each; with one of 16 bits "
        "({kv}) not even 4-bit weights fit",
    ),
    Rule(
        "four-bits-and-cache",
        Technique.PTQ4_KV,
        lambda f: f.fits(4, 8) or (f.wish.loss >= SOME and f.fits(4, 4)),
        "4-bit weights fit only with a smaller KV cache: {w4kv8} with 8 bits, {w4kv16} with 16, of {memory}",
    ),
    Rule(
        "served-at-16-alone",
        Technique.FULL_BITS,
        lambda f: f.fits(16),
        "{target} serves this model in 16 bits alone, or what was quantized failed its gates; that fits: "
        "{w16kv16}",
    ),
    Rule(
        "served-at-16-and-cache",
        Technique.KV,
        lambda f: f.fits(16, 8),
        "{target} serves this model's weights in 16 bits alone; they fit with an 8-bit KV cache: {w16kv8}",
    ),
    Rule(
        "student",
        Technique.DISTILLATION,
        lambda f: f.wish.training is not None,
        "not even 4 bits fit ({least} of weights and {kv} of KV cache into {memory}); there is {device} to "
        "train a smaller model on this one's answers to conversations that a gateway has kept",
    ),
    Rule(
        "too-large",
        Technique.SMALLER,
        lambda f: True,
        "not even 4 bits fit ({least} of weights and {kv} of KV cache into {memory}), and there is nothing "
        "to train on",
    ),
)
"""Of what vLLM serves."""

FINETUNE = (
    Rule(
        "experts",
        Technique.SMALLER,
        lambda f: f.wish.training is not None and f.shape.has_experts,
        "experts are not trained here; train a model without them",
    ),
    Rule(
        "all-weights",
        Technique.FULL,
        lambda f: f.wish.loss < ALMOST_NONE and f.trains("full"),
        "nothing of what training could gain may be lost ({loss}), and all weights can be trained: {full} "
        "of {device}",
    ),
    Rule(
        "adapters",
        Technique.LORA,
        lambda f: f.trains("lora"),
        "the 16-bit base with adapters takes {lora} of {device}; full training would take {full}",
    ),
    Rule(
        "adapters-on-four-bits",
        Technique.QLORA,
        lambda f: f.trains("qlora"),
        "with a base in NF4 it takes {qlora} of {device}; LoRA on 16 bits would take {lora}, full training "
        "{full}",
    ),
    Rule(
        "too-large-to-train",
        Technique.SMALLER,
        lambda f: f.wish.training is not None,
        "not even QLoRA fits: {qlora} of {device}; train a smaller model",
    ),
)
"""Where something is to be learnt, and there is something to train on."""


def serving_rule(facts: Facts) -> Rule:
    """Of what to serve."""
    rules = EDGE if facts.hardware.kind == "edge" else DEPLOY
    return next(rule for rule in rules if rule.when(facts))


def training_rule(facts: Facts) -> Rule | None:
    """Of how to train; None where nothing is to be learnt, or nothing is there to train on."""
    if facts.wish.goal != "finetune":
        return None
    return next((rule for rule in FINETUNE if rule.when(facts)), None)


@dataclass(frozen=True)
class Against:
    """Why a technique is not advised: the first line that applies."""

    techniques: tuple[Technique, ...]
    when: Callable[[Facts], bool]
    why: str


_TRAINED = (Technique.LORA, Technique.QLORA, Technique.FULL)
_BELOW_16 = (Technique.PTQ4, Technique.MIXED, Technique.KV, Technique.QAT)

AGAINST = (
    Against(_TRAINED, lambda f: f.wish.goal == "deploy", "nothing is to be learnt (--goal finetune)"),
    Against(
        (*_TRAINED, Technique.QAT, Technique.DISTILLATION),
        lambda f: f.wish.training is None,
        "there is nothing to train on (--train-on)",
    ),
    Against((*_TRAINED, Technique.QAT), lambda f: f.shape.has_experts, "experts are not trained here"),
    Against((Technique.FULL,), lambda f: not f.trains("full"), "it takes {full}, and there is {device}"),
    Against((Technique.LORA,), lambda f: not f.trains("lora"), "it takes {lora}, and there is {device}"),
    Against((Technique.QLORA,), lambda f: f.trains("lora"), "LoRA fits, whose base loses nothing to NF4"),
    Against((Technique.FULL,), lambda f: True, "adapters learn most of it in a part of the memory"),
    Against(
        (*_BELOW_16, Technique.FULL_BITS),
        lambda f: f.hardware.kind == "edge",
        "vLLM serves it, which does not run there",
    ),
    Against(
        (Technique.GGUF,),
        lambda f: True,
        "vLLM runs there and batches requests; GGUF is for devices that it does not run on (--edge)",
    ),
    Against(
        (Technique.MIXED, Technique.PTQ4),
        lambda f: not (f.fits(4) or f.fits(4, 8) or f.planned() or f.planned(f.small_kv)),
        "not even 4 bits fit: {w4kv16} of {memory}",
    ),
    Against((Technique.QAT,), lambda f: f.fits(8) or f.fits(16), "what fits loses little without training"),
    Against((Technique.QAT,), lambda f: not f.trains("full"), "it takes about {full}, and there is {device}"),
    Against((Technique.QAT,), lambda f: f.wish.loss >= LITTLE, "a loss of {loss} needs no training"),
    Against(
        (Technique.KV,),
        lambda f: f.fits(16) or f.fits(8) or f.fits(4),
        "the 16-bit KV cache fits ({kv}); one of 8 bits would hold twice the tokens",
    ),
    Against((Technique.KV,), lambda f: not f.fits(16, 8), "16-bit weights do not fit even so: {w16kv8}"),
    Against(
        (Technique.MIXED,),
        lambda f: f.fits(8) or f.fits(16) or f.fits(8, 8),
        "more bits fit; a plan pays below 8",
    ),
    Against(
        (Technique.PTQ4,),
        lambda f: f.fits(8) or f.fits(16) or f.fits(8, 8),
        "more bits fit and lose less; 4 pay where memory is short or requests come one at a time",
    ),
    Against((Technique.PTQ4,), lambda f: f.wish.loss < SOME, "a plan of the same bytes loses less"),
    Against(
        (Technique.DISTILLATION, Technique.SMALLER),
        lambda f: any(f.fits(bits, kv) for bits in (16, 8, 4) for kv in (16, 8)),
        "this model fits",
    ),
    Against((Technique.FULL_BITS,), lambda f: not f.fits(16), "it does not fit: {w16kv16} of {memory}"),
    Against((Technique.FULL_BITS,), lambda f: True, "8 bits serve more requests at a loss within {loss}"),
)

_WITH_CACHE = {Technique.PTQ8_KV, Technique.PTQ4_KV, Technique.MIXED_KV, Technique.KV}
_KINDS = {
    Technique.KV: _WITH_CACHE,
    Technique.MIXED: {Technique.MIXED, Technique.MIXED_KV, Technique.QAT},
    Technique.PTQ4: {Technique.PTQ4, Technique.PTQ4_KV},
}
"""Techniques that are in what was chosen under another name."""


def against(facts: Facts, chosen: set[Technique]) -> dict[str, str]:
    """Technique to the reason why it is not advised, of those that have one."""
    found: dict[str, str] = {}
    for one in AGAINST:
        for technique in one.techniques:
            taken = _KINDS.get(technique, {technique}) & chosen
            if not taken and technique.value not in found and one.when(facts):
                found[technique.value] = one.why.format_map(facts.words)
    return found
