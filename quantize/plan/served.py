"""What a plan loses through the engine's own kernels."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from quantize.core.jsonl import append_kept, read_kept
from quantize.core.plan import Plan
from quantize.evaluate.bench import Bench, Span
from quantize.make.parts import PartStore

Choice = tuple[str, str]
"""A scheme and a method."""
KEPT: Choice = ("bf16", "rtn")
"""The choice of a group that is not quantized."""


class PlanError(ValueError):
    """No plan fits. The text says the least that is possible."""


class NotFiniteError(PlanError):
    """The engine answers a plan with numbers that are not finite: whatever it weighs, it cannot be served."""


def plan_of(choices: Mapping[str, Choice], kv: str = "auto") -> Plan:
    """The plan that gives every group its choice."""
    methods = {name: choice[1] for name, choice in choices.items() if choice[0] != "bf16"}
    main = Counter(methods.values()).most_common(1)[0][0] if methods else "rtn"
    return Plan(
        groups={name: choice[0] for name, choice in choices.items()},
        method=main,
        methods={name: method for name, method in methods.items() if method != main},
        kv=kv,
    )


class ServedKl:
    """Measures plans on the engine's kernels, and remembers what it measured.

    The reference is scored once on every engine, and its final hidden states are kept beside what was
    measured. ``kv`` is the KV cache's scheme. Raises NotFiniteError, again when it is asked again.
    """

    def __init__(self, parts: PartStore, bench: Bench, spans: Sequence[Span], workdir: Path) -> None:
        self._parts, self._bench, self._spans, self._workdir = parts, bench, spans, workdir
        workdir.mkdir(parents=True, exist_ok=True)
        engine = hashlib.sha256(bench.identity.encode()).hexdigest()[:12]
        self._reference, self._file = workdir / f"reference-{engine}.npz", workdir / "served.jsonl"
        self._known: dict[str, float] = dict(read_kept(self._file))
        self.measured = 0
        self.tokens = sum(len(tokens) - start for tokens, start in spans)

    def __call__(self, choices: Mapping[str, Choice], kv: str = "auto") -> float:
        plan = plan_of({g.name: choices.get(g.name, KEPT) for g in self._parts.modules}, kv)
        key = f"{self._bench.identity} {plan.model_dump_json()}"
        if key not in self._known:
            folder = self._workdir / "candidate"
            self._parts.link(plan, folder)
            if not self._reference.exists():
                self._bench.score(self._parts.checkpoint.path, self._spans, save=self._reference)
            scores = self._bench.score(folder, self._spans, kv=kv, reference=self._reference)
            self._known[key] = float(scores.kl.mean())
            self.measured += 1
            append_kept(self._file, [[key, self._known[key]]])
        if not math.isfinite(found := self._known[key]):
            schemes = sorted({name for name in plan.groups.values() if name != KEPT[0]})
            said = " and ".join([*schemes, *([f"the KV cache {kv}"] if kv != "auto" else [])]) or "16 bits"
            raise NotFiniteError(f"the engine answers {said} with numbers that are not finite")
        return found
