"""Advice: what is chosen and why, the commands, and the memory of everything, as one document."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict

from deploy.advice.facts import BATCHES, GGUF_BITS, Facts
from deploy.advice.measured import findings
from deploy.advice.rules import Technique, against, serving_rule, training_rule
from deploy.advice.steps import MERGED, RUN, Asked, commands
from deploy.placement import CPU_OVERHEAD, GPU_OVERHEAD
from quantize.core.plan import Plan, uniform
from quantize.core.schemes import KV_SCHEMES
from quantize.core.training_memory import OPTIMIZERS, TrainingMemory, full_memory, lora_memory

NOMINAL = (32, 16, 8, 4, 2)
ATTENTION = "self_attn"


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WeightRow(_Frozen):
    """Bytes of the weights: every parameter at so many bits, or as a variant is stored."""

    what: str
    bits: float
    bytes: int
    stored: bool
    """By the schemes' own account (scales, and all else at 16 bits), else parameters times bits."""


class KvRow(_Frozen):
    kv: str
    bytes_per_token: int
    bytes: int
    problem: str = ""


class ServingRow(_Frozen):
    """One precision on the hardware."""

    weights: str
    kv: str
    weight_bytes: int
    kv_bytes: int
    overhead: int
    bytes: int
    gpus: int
    """That share one engine; 0 on a CPU."""
    replicas: int
    """Engines of it that the hardware holds side by side."""
    problem: str = ""


class TrainingRow(_Frozen):
    """One way to train, by what takes the bytes."""

    way: str
    what: str
    trained: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    overhead: int
    bytes: int
    tokens: int
    """Of a micro-batch."""
    fits: bool | None
    """None where there is nothing to train on."""


class Choice(_Frozen):
    """One decision, by the rule of that name."""

    technique: str
    rule: str
    why: str
    scheme: str
    kv: str
    bytes: int
    """Of the engine in all, or of training."""
    commands: tuple[str, ...]


class Measured(_Frozen):
    textbook: str
    here: str
    document: str


class Advice(_Frozen):
    model: str
    parameters: int
    assumed: tuple[str, ...]
    hardware: str
    memory: int
    training_memory: int
    """Of the one device that is trained on; 0 where there is nothing to train on."""
    target: str
    goal: str
    loss: float
    context: int
    concurrency: int
    choices: tuple[Choice, ...]
    """What to do, in order: to train, where something is to be learnt, and to serve."""
    against: dict[str, str]
    """Technique to why it is not advised."""
    weights: tuple[WeightRow, ...]
    kv: tuple[KvRow, ...]
    serving: tuple[ServingRow, ...]
    training: tuple[TrainingRow, ...]
    measured: tuple[Measured, ...]
    cards: tuple[str, ...] = ()
    """What was measured of this very model."""


def advise(facts: Facts, asked: Asked | None = None) -> Advice:
    """What to do, and what everything takes. Pure: nothing is looked at but ``facts``."""
    asked, here, wish = asked or Asked(), facts.hardware, facts.wish
    choices = list(_choices(facts, asked))
    chosen = frozenset(Technique(one.technique) for one in choices)
    assumed = [facts.shape.assumed, here.note]
    if wish.goal == "finetune" and wish.training is None:
        assumed.append("nothing is there to train on (--train-on), so that only serving is advised")
    if wish.training is not None and wish.training.note != here.note:
        assumed.append(wish.training.note)
    return Advice(
        model=facts.shape.name,
        parameters=facts.shape.parameters,
        assumed=tuple(one for one in assumed if one),
        hardware=here.name,
        memory=here.memory,
        training_memory=facts.device,
        target=here.target.name if here.target else "llama.cpp",
        goal=wish.goal,
        loss=wish.loss,
        context=wish.context,
        concurrency=wish.concurrency,
        choices=tuple(choices),
        against=against(facts, set(chosen)),
        weights=tuple(weight_rows(facts)),
        kv=tuple(_kv_rows(facts)),
        serving=tuple(_serving_rows(facts)),
        training=tuple(training_rows(facts)),
        measured=tuple(
            Measured(textbook=one.textbook, here=one.text, document=one.document)
            for one in findings(facts, chosen)
        ),
        cards=tuple(facts.measured.values()),
    )


def _choices(facts: Facts, asked: Asked) -> Iterator[Choice]:
    if (rule := training_rule(facts)) is not None:
        way = {Technique.FULL: "full", Technique.LORA: "lora"}.get(rule.technique, "qlora")
        yield Choice(
            technique=rule.technique,
            rule=rule.name,
            why=rule.why.format_map(facts.words),
            scheme="NF4" if way == "qlora" else "bf16",
            kv="",
            bytes=facts.training(way).total + facts.training_overhead,
            commands=tuple(commands(rule.technique, facts, asked)),
        )
        if rule.technique is Technique.SMALLER:
            return
        where = f"{RUN}/model" if way == "full" else MERGED
        asked = Asked(where)
    rule = serving_rule(facts)
    scheme, kv, taken = _served(facts, rule.technique)
    yield Choice(
        technique=rule.technique,
        rule=rule.name,
        why=rule.why.format_map(facts.words),
        scheme=scheme,
        kv=kv,
        bytes=taken,
        commands=tuple(commands(rule.technique, facts, asked)),
    )


_SERVED = {
    Technique.FULL_BITS: (16, (16,)),
    Technique.KV: (16, (8,)),
    Technique.PTQ8: (8, (16,)),
    Technique.PTQ8_KV: (8, (8,)),
    Technique.PTQ4: (4, (16,)),
    Technique.PTQ4_KV: (4, (8, 4)),
}
"""Technique to bits of weights and of the KV cache."""


def _served(facts: Facts, technique: Technique) -> tuple[str, str, int]:
    """Scheme, KV-cache type and bytes in all of what is served; empty where that is another model."""
    if technique is Technique.GGUF and facts.gguf is not None:
        return facts.gguf, "F16", facts.gguf_bytes(facts.gguf) + facts.kv_bytes()
    if technique in (Technique.MIXED, Technique.MIXED_KV, Technique.QAT):
        cached = technique is Technique.MIXED_KV or not facts.planned()
        kv = facts.small_kv if cached else "auto"
        return "mixed, 4 bits and more", kv, facts.room(kv) + facts.kv_bytes(kv)
    if technique in _SERVED:
        bits, caches = _SERVED[technique]
        found = [facts.options[bits, kv] for kv in caches]
        one = next((one for one in found if one.fits), found[0])
        return one.scheme, one.kv, one.taken
    return "", "", 0


def weight_rows(facts: Facts) -> Iterator[WeightRow]:
    """Every parameter at so many bits; then what is really stored."""
    shape, where = facts.shape, facts.hardware.target
    for bits in NOMINAL:
        yield WeightRow(what=f"{bits} bits", bits=bits, bytes=shape.parameters * bits // 8, stored=False)
    names = {"w8a8": "w8a8", "w4a16-g128": "w4a16-g128", "w4a16-g32-asym": "int4"}
    for scheme, called in names.items():
        yield _stored(
            f"{scheme} (int4)" if called == "int4" else scheme, uniform(shape.modules, scheme), facts
        )
    yield _stored("attention w8a8, MLP w4a16-g128", mixed(facts), facts)
    if where is None:
        for kind, width in GGUF_BITS.items():
            yield WeightRow(what=f"GGUF {kind}", bits=width, bytes=facts.gguf_bytes(kind), stored=True)


def mixed(facts: Facts) -> Plan:
    """Attention at 8 bits, all else at 4: what is called mixed precision where no plan was made."""
    groups = {
        group.name: "w8a8" if group.kind.startswith(ATTENTION) else "w4a16-g128"
        for group in facts.shape.modules
    }
    return Plan(groups=groups)


def _stored(what: str, plan: Plan, facts: Facts) -> WeightRow:
    modules = facts.shape.modules
    return WeightRow(
        what=what, bits=plan.bits_per_weight(modules), bytes=plan.weight_bytes(modules), stored=True
    )


def _kv_rows(facts: Facts) -> Iterator[KvRow]:
    where, shape, wish = facts.hardware.target, facts.shape, facts.wish
    for kv in KV_SCHEMES:
        per_token = shape.kv_bytes_per_token(kv)
        found = where.kv_problems(kv, shape.head_dim) if where else ()
        yield KvRow(
            kv="16 bits" if kv == "auto" else kv,
            bytes_per_token=per_token,
            bytes=per_token * wish.context * wish.concurrency,
            problem=found[0].rule if found else "",
        )


def _serving_rows(facts: Facts) -> Iterator[ServingRow]:
    for option in facts.options.values():
        yield ServingRow(
            weights=f"{option.bits} bits, {option.scheme.partition('(')[0]}",
            kv="16 bits" if option.kv_bits == 16 else option.kv or f"{option.kv_bits} bits",
            weight_bytes=option.weight_bytes,
            kv_bytes=option.kv_bytes,
            overhead=option.taken - option.weight_bytes - option.kv_bytes,
            bytes=option.taken,
            gpus=option.gpus,
            replicas=facts.replicas(option),
            problem=option.problem,
        )


def training_rows(facts: Facts) -> Iterator[TrainingRow]:
    """Full training with every optimizer, LoRA and QLoRA, in the first micro-batch."""
    shape = facts.shape
    for name in OPTIMIZERS:
        yield _training_row(facts, full_memory(shape, name))
    for quantized in (False, True):
        yield _training_row(facts, lora_memory(shape, quantized=quantized))


def _training_row(facts: Facts, one: TrainingMemory) -> TrainingRow:
    where = facts.wish.training or facts.hardware
    overhead = GPU_OVERHEAD if where.machine.gpus else CPU_OVERHEAD
    return TrainingRow(
        way=one.way,
        what=one.what,
        trained=one.trained,
        weights=one.weights,
        gradients=one.gradients,
        optimizer=one.optimizer,
        activations=one.activations,
        overhead=overhead,
        bytes=one.total + overhead,
        tokens=BATCHES[0],
        fits=None if facts.wish.training is None else one.total + overhead <= facts.device,
    )
