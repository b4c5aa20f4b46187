"""The commands that an advised technique comes to, as they are typed."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from deploy.advice.facts import FEW_BITS, Facts, Wish
from deploy.advice.rules import Technique
from quantize.core.recipes import FOUR_BITS, RECIPES
from quantize.core.schemes import scheme
from quantize.core.shape import parameters_of, shape_of_parameters

PLACEHOLDER = "MODEL"
"""Stands for the checkpoint where a number of parameters is all that is known."""
ITEMS, ROLE = "items.jsonl", "default"
"""What is to be learnt from, and the role whose conversations it is made of."""
RUN, MERGED = "var/train", "var/merged"
"""Where a run lies, and the checkpoint that is made of its adapter."""
SIZES = (
    *("135M", "360M", "500M", "1B", "1.5B", "3B", "4B", "7B", "8B", "13B", "14B"),
    *("24B", "32B", "34B", "70B", "120B", "180B", "235B", "405B"),
)
"""In which models are published."""


@dataclass(frozen=True)
class Asked:
    """How the model is called on the command line, and whether a configuration has it already."""

    model: str = PLACEHOLDER
    configured: bool = False

    is_hub: bool = False
    """It is a repository's id, not a directory."""


def commands(technique: Technique, facts: Facts, asked: Asked) -> list[str]:
    """What to run, in order; the first is the next."""
    model = shlex.quote(asked.model)
    begin = [] if asked.configured else [f"tiercel init {model}"]
    serve = ["tiercel up"]
    match technique:
        case Technique.GGUF:
            return _exported(facts, asked)
        case Technique.SMALLER:
            return [_smaller(facts)]
        case Technique.DISTILLATION:
            taught = [f"tiercel tasks record {ROLE} --out {ITEMS}"]
            return [
                *begin,
                *taught,
                *_trained("lora", f"{PLACEHOLDER}-{smaller_size(facts)}"),
                f"tiercel up {MERGED}",
            ]
        case Technique.FULL | Technique.LORA | Technique.QLORA:
            way = {Technique.FULL: "full", Technique.LORA: "lora", Technique.QLORA: "qlora"}[technique]
            return _trained(way, model)
        case Technique.QAT:
            return [*begin, *_planned(facts), "tiercel train qat planned", *serve]
        case Technique.MIXED:
            return [*begin, *_planned(facts), *serve]
        case Technique.MIXED_KV:
            return [*begin, *_planned(facts, with_cache=True), *serve]
        case Technique.KV:
            return [*begin, _made(facts, "bf16", 8), *serve]
        case Technique.PTQ8_KV:
            return [*begin, _made(facts, _eight(facts), 8), *serve]
        case Technique.PTQ4_KV:
            return [*begin, _made(facts, _four(facts), 8 if facts.fits(4, 8) else 4), *serve]
        case Technique.FULL_BITS:
            return [*begin, "tiercel quantize bf16", *serve]
        case Technique.PTQ8 | Technique.PTQ4:
            where = facts.hardware.target
            assert where is not None  # edge has rules of its own
            bits = 8 if technique is Technique.PTQ8 else 4
            made = [f"tiercel quantize {facts.recipe(bits, where)}{_target(facts)}"]
            return [*begin, *([] if bits in facts.proven else made), *serve]


def _trained(way: str, model: str) -> list[str]:
    """A run, and from its adapter a checkpoint like any other."""
    run = f"tiercel train {way} --model {model} --data {ITEMS} --out {RUN}"
    merge = f"tiercel train merge {RUN}/adapter --model {model} --out {MERGED}"
    return [run] if way == "full" else [run, merge]


def _exported(facts: Facts, asked: Asked) -> list[str]:
    """A variant that is measured and judged where there is a file for that, else a file alone."""
    model, kind = shlex.quote(asked.model), f"--type {facts.gguf}"
    if asked.configured or asked.is_hub:
        begin = [] if asked.configured else [f"tiercel init {model}"]
        return [*begin, f"tiercel export gguf {kind}"]
    return [f"tiercel export gguf {model} {kind} --out {facts.gguf}.gguf"]


def _target(facts: Facts) -> str:
    """Where another machine's engine is planned for."""
    where = facts.hardware
    return "" if where.here or where.target is None else f" --target {where.target.name}"


def _eight(facts: Facts) -> str:
    where = facts.hardware.target
    assert where is not None
    return where.instead(RECIPES[facts.recipe(8, where)].schemes[0])


def _four(facts: Facts) -> str:
    """The scheme that most of the model has in ``int4``."""
    where, groups = facts.hardware.target, facts.shape.modules.groups
    assert where is not None
    served = (one for one in FOUR_BITS if all(where.legal(scheme(one), group) for group in groups))
    return next(served, FOUR_BITS[-1])


def _made(facts: Facts, name: str, kv_bits: int) -> str:
    bits = scheme(name).weight_bits
    kv = facts.options[bits, kv_bits].kv
    short = name if bits == 16 else f"int{bits}" if not name.startswith("fp8") else "fp8"
    return f"tiercel quantize make --scheme {name} --kv {kv} --name {short}-kv{kv_bits}{_target(facts)}"


def _planned(facts: Facts, with_cache: bool = False) -> list[str]:
    """A plan at the room that there is; a little of it is left, as plans may come out up to that."""
    if not with_cache and facts.planned():
        bits = min(facts.bits_within(facts.room()), MOST_BITS)
        return [f"tiercel quantize plan --bits {bits:.2f}{_target(facts)}"]
    kv, wish = facts.small_kv, facts.wish
    budget = min(facts.room(kv), _bytes_at(facts, MOST_BITS)) + facts.kv_bytes(kv)
    cache = f"--kv {kv} --concurrency {wish.concurrency} --context {wish.context}"
    return [f"tiercel quantize plan --bytes {budget} {cache}{_target(facts)}"]


MOST_BITS = 8.0
"""That a plan is asked for: above it is 8 bits' place."""


def _bytes_at(facts: Facts, bits: float) -> int:
    return facts.shape.modules.other_bytes + round(bits * facts.shape.weights / 8)


def _smaller(facts: Facts) -> str:
    """The same question for a model that fits."""
    wish, size = facts.wish, smaller_size(facts)
    words = ["tiercel advise", f"--parameters {size}", f"--goal {wish.goal}", f"--loss {wish.loss:g}"]
    words += [f"--context {wish.context}", f"--concurrency {wish.concurrency}", facts.hardware.option]
    words += [f"--train-on {trained_on(wish)}"] if wish.training is not None else []
    return " ".join(word for word in words if word)


def trained_on(wish: Wish) -> str:
    """What says the same on the command line."""
    where = wish.training
    if where is None:
        return "none"
    return where.option.split()[1] if where.option.startswith("--gpu") else "here"


def smaller_size(facts: Facts) -> str:
    """The largest published size below the model's that does what is wanted on the hardware; the smallest
    where none does."""
    for size in reversed(SIZES):
        count = parameters_of(size)
        if count < 0.9 * facts.shape.parameters:
            made = Facts(shape_of_parameters(count), facts.hardware, facts.wish)
            if _does(made):
                return size
    return SIZES[0]


def _does(facts: Facts) -> bool:
    if facts.wish.goal == "finetune" and facts.wish.training is not None and not facts.trains("qlora"):
        return False
    if facts.hardware.kind == "edge":
        return facts.gguf is not None and facts.gguf not in FEW_BITS
    return any(facts.fits(bits, kv) for bits in (16, 8, 4) for kv in (16, 8))
