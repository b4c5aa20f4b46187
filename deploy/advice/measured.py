"""What textbooks say, and what was measured here: sentences with the document that holds the figures.

A test looks every ``figures`` up in its document.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from deploy.advice.facts import Facts
from deploy.advice.rules import Technique

QUANTIZATION, FLEET, FLEET_GUIDE = (
    "docs/benchmarks/quantization.md",
    "docs/benchmarks/fleet.md",
    "docs/fleet.md",
)
MEASURED_AT = 1_000_000_000
"""Parameters below which the real model of the benchmarks (135 M) tells more than what is said of 7 B."""


@dataclass(frozen=True)
class Finding:
    """What was found, where that matters. ``figures`` stand in ``document`` as they are written."""

    name: str
    when: Callable[[Facts, frozenset[Technique]], bool]
    textbook: str
    text: str
    document: str
    figures: tuple[str, ...]


def _among(*techniques: Technique) -> Callable[[Facts, frozenset[Technique]], bool]:
    return lambda _facts, chosen: bool(chosen & set(techniques))


def _on_cpu(facts: Facts, _chosen: frozenset[Technique]) -> bool:
    return facts.hardware.kind == "cpu"


def _on_gpu(facts: Facts, _chosen: frozenset[Technique]) -> bool:
    return facts.hardware.kind == "gpu"


_EIGHT = (Technique.PTQ8, Technique.PTQ8_KV)
_FOUR = (Technique.PTQ4, Technique.PTQ4_KV, Technique.MIXED, Technique.MIXED_KV, Technique.QAT)

FINDINGS = (
    Finding(
        "4-bits-slower-on-a-cpu",
        _on_cpu,
        "fewer bits are faster",
        "on a CPU with AVX-512 (135 M parameters) 4 bits are slower than 16: 71 tokens/s by int4, 118 by "
        "bf16, 148 by int8; 4 bits pay in memory alone",
        FLEET,
        ("71", "118", "148"),
    ),
    Finding(
        "inputs-cost-8-bits",
        _among(*_EIGHT),
        "8 bits lose next to nothing, and GPTQ mends what they lose",
        "of what w8a8 by rounding loses on the real model (0.071 nats per token) rounding inputs alone "
        "makes 0.058 and weights alone 0.005: smoothing and one down projection in 16 bits take it from "
        "64.5 to 10.1, GPTQ to 63.9 (1/1000 nat)",
        QUANTIZATION,
        ("71.0", "58.1", "5.1", "64.5", "10.1", "63.9"),
    ),
    Finding(
        "gptq-alone",
        _among(*_FOUR),
        "GPTQ or AWQ is what 4 bits take",
        "GPTQ alone lost 1.71 times what it loses with importance-weighted ranges (real model, g64), and "
        "smoothing and zero points each take another quarter, a fifth goes where groups are made one behind "
        "the other from twice the text: hence smooth+imatrix+gptaq in groups of 32 with zero points",
        QUANTIZATION,
        ("1.71 (1.59–1.85)", "0.74 (0.69–0.79)", "0.72 (0.68–0.76)", "0.81 (0.76–0.86)"),
    ),
    Finding(
        "small-models-lose-more",
        lambda f, chosen: bool(chosen & set(_FOUR)) and f.shape.parameters < MEASURED_AT,
        "4 bits lose 1 to 3 %",
        "a model of 135 M parameters loses 0.077 nats per token at 4.6 bits, passes the role auxiliary and "
        "fails default and core; small models lose more than large ones",
        FLEET,
        ("0.079", "fails", "passes"),
    ),
    Finding(
        "plans",
        _among(Technique.MIXED, Technique.MIXED_KV),
        "mixed precision halves the loss",
        "on the real model a plan lost 0.76 of the best uniform variant at 4.5 bits, 0.96 at 4.625 and 0.72 "
        "at 5; half was not reached",
        QUANTIZATION,
        ("0.76 (0.72–0.81)", "0.96 (0.91–1.02)", "0.72 (0.67–0.77)"),
    ),
    Finding(
        "two-engines-on-one-gpu",
        lambda f, _chosen: f.hardware.kind == "gpu" and len(f.hardware.machine.gpus) == 1,
        "core agents at 16 bits beside auxiliary ones at 4",
        "two engines that share one H100 gave 0.78–0.83 of the sessions per second of one BF16 engine (8B "
        "shape): serve one quantized variant for every role that it passes, not a split",
        FLEET_GUIDE,
        ("0.78–0.83", "0.95–1.0"),
    ),
    Finding(
        "fp8-cache",
        _among(Technique.KV, Technique.PTQ8_KV, Technique.PTQ4_KV, Technique.MIXED_KV),
        "an 8-bit KV cache is free",
        "with calibrated FP8 scales twice the tokens fit, and perplexity moved by 0.025 % (standard error "
        "0.048 %, demo model)",
        QUANTIZATION,
        ("1,048,576", "0.025 %", "0.048 %"),
    ),
    Finding(
        "gpu-rules-read",
        lambda f, _chosen: bool(f.hardware.target and f.hardware.target.untried and f.hardware.kind == "gpu"),
        "",
        "most rules of this target were read in the engine's sources, not run: `tiercel quantize check "
        "MODEL --target …` lists which, and every variant is compared with what its engine really loaded",
        "docs/quantization.md",
        ("CUDA rules are read",),
    ),
)


def findings(facts: Facts, chosen: frozenset[Technique]) -> list[Finding]:
    """Those that matter here."""
    return [one for one in FINDINGS if one.when(facts, chosen)]
