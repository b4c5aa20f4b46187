"""Uniform variants, heuristics and the planner at the same bytes, on the kernels of a real engine.

    python -m benchmarks.quantization.run [--models demo outliers] [--quick]

Plans are chosen on one set of conversations and reported on another; every figure is the mean KL over the
whole vocabulary against the BF16 reference on the same tokens, with a 95 % interval that treats
conversations as independent. Finished measurements are kept under var/benchmarks/quantization, so that an
interrupted run goes on. Writes results.json, a table and a picture.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.quantization import data, outlier_model, show
from quantize.core.checkpoint import open_checkpoint
from quantize.core.modules import read_modules
from quantize.core.plan import Plan
from quantize.core.targets import target
from quantize.evaluate.bench import Bench
from quantize.make.parts import PartStore
from quantize.plan import autoscheme
from quantize.plan.controls import RANDOM_PLANS, random_plan
from quantize.plan.paired_kl import PairedKl
from quantize.plan.planner import Planner
from quantize.plan.search import search
from quantize.plan.sensitivity import analyse, calibrated
from quantize.plan.served import Choice, ServedKl
from quantize.plan.session import shortlist
from quantize.plan.simulated import SimulatedModel
from quantize.plan.tune import tune, write_tuned

WORK = Path("var/benchmarks/quantization")
DEMO = Path("deploy/assistant/model")
BUDGETS = (4.25, 4.5, 4.75, 5.0)
UNIFORM = ("rtn", "imatrix", "gptq", "imatrix+gptq", "awq", "autoround")
GROUPS = ("w4a16-g128", "w4a16-g64", "w4a16-g32")
SLOW = ("awq", "autoround")
"""Minutes each on a CPU: at the first group size alone."""
PLANNED = ("gptq", "imatrix+gptq")
"""Methods whose parts the planner may mix."""


def run(
    name: str,
    checkpoint_dir: Path,
    bench: Bench,
    quick: bool,
    without: Sequence[str],
    budgets: Sequence[float],
    tries: int,
    tunes: bool,
) -> dict[str, Any]:
    """Everything for one model; returns rows and comparisons."""
    work = WORK / name
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(checkpoint_dir)
    modules = read_modules(checkpoint)
    calibration = data.calibration(checkpoint_dir)
    parts = PartStore(work / "parts", checkpoint, modules, calibration)
    chosen = data.chosen(checkpoint_dir, *((30, 10) if quick else ()))
    reported_spans = data.reported(checkpoint_dir, *((60, 15) if quick else ()))
    simulated = SimulatedModel(parts, chosen)

    def make(plan: Plan, folder: Path) -> None:
        parts.assemble(plan, folder)
        if plan.tuned:
            write_tuned(tune(simulated, plan, folder, calibration.sequences), folder)

    reported = PairedKl(checkpoint_dir, bench, reported_spans, work, make)
    where = target("vllm-cpu")
    ladder = shortlist(where, modules)
    eight = next(name for name in ladder if name.startswith("w8a8"))
    rows: list[dict[str, Any]] = []

    def report(label: str, kind: str, plan: Plan, **more: Any) -> Plan:
        kl, half = reported.interval(plan)
        row = {"label": label, "kind": kind, "bytes": plan.weight_bytes(modules), "kl": kl, "half": half}
        row |= {"bits": plan.bits_per_weight(modules), "plan": plan.model_dump(mode="json"), **more}
        rows.append(row)
        print(
            f"{name}: {label}: {row['bits']:.3f} bits, KL {kl:.5f} ± {half:.5f}", file=sys.stderr, flush=True
        )
        return plan

    def uniform(how: str, method: str) -> Plan:
        return Plan(groups={group.name: how for group in modules}, method=method)

    plans: dict[str, Plan] = {}
    for how in GROUPS:
        for method in UNIFORM:
            if method in without or (method in SLOW and how != GROUPS[0]):
                continue
            label = f"{how} {method}"
            plans[label] = report(label, "uniform", uniform(how, method))
    for how, method in ((eight, "gptq"), (eight, "smoothquant"), ("w8a8", "gptq")):
        report(f"{how} {method}", "uniform", uniform(how, method))
    base = "w4a16-g128"
    for layer in range(modules.layers):
        mixed = {group.name: eight if group.layer == layer else base for group in modules}
        label = f"layer {layer} at 8 bits"
        plans[label] = report(label, "heuristic", Plan(groups=mixed, method="imatrix+gptq"))
    ends = {g.name: eight if g.layer in (0, modules.layers - 1) else base for g in modules}
    plans["ends"] = report("first and last at 8 bits", "heuristic", Plan(groups=ends, method="imatrix+gptq"))
    downs = {g.name: eight if "down" in g.kind else base for g in modules}
    report("all down_proj at 8 bits", "heuristic", Plan(groups=downs, method="imatrix+gptq"))

    options = (base, "w8a8")  # it is told w8a8 where w8a8-r7 is made
    for bits in budgets:
        found = autoscheme.assign(checkpoint_dir, modules, options, bits, work, calibration.sequences)
        mixed = {name: eight if how == "w8a8" else how for name, how in found.items()}
        label = f"AutoScheme at {bits}"
        plans[label] = report(label, "heuristic", Plan(groups=mixed, method="imatrix+gptq"))

    choices: dict[str, Sequence[Choice]] = {
        group.name: [
            (how, method) for how in ladder for method in (PLANNED if how.startswith("w4") else ("rtn",))
        ]
        for group in modules
    }
    began = time.monotonic()
    served = ServedKl(parts, bench, chosen, work / "chosen")
    sensitivity = calibrated(analyse(parts, choices, chosen, work / "rows.jsonl"), served)
    seconds = time.monotonic() - began
    planner = Planner(modules, sensitivity)
    linears = sum(group.weights for group in modules)
    rng = random.Random(0)
    comparisons = []
    one_layer = plans["layer 0 at 8 bits"].bits_per_weight(modules)
    for bits in sorted({*budgets, one_layer}):
        budget = modules.other_bytes + round(bits * linears / 8)
        result = search(planner, served, budget, tries=tries)
        best = result[0]
        found_kl = {"predicted": best.predicted_kl, "chosen": best.served_kl}
        mine = report(f"planned at {bits:.3g} bits", "planned", best.plan, **found_kl)
        tuned = best.plan.model_copy(update={"tuned": True})
        if tunes or reported.knows(tuned):
            mine = report(f"planned at {bits:.3g} bits and tuned", "tuned", tuned)
        alike = Plan(groups={group.name: same_bytes(bits) for group in modules}, method="imatrix+gptq")
        if tunes and alike.weight_bytes(modules) <= budget:
            label = f"{same_bytes(bits)} imatrix+gptq tuned"
            if label not in plans:
                plans[label] = report(label, "tuned", alike.model_copy(update={"tuned": True}))
        for number in range(RANDOM_PLANS):
            plan = random_plan(planner, budget, rng)
            label = f"random {number} at {bits:.3g}"
            plans[label] = report(label, "random", plan)
        one = compare(bits, budget, mine, plans, modules, reported)
        one["untuned"] = compare(bits, budget, best.plan, plans, modules, reported)
        comparisons.append(one)
    return {
        "model": name,
        "target": where.name,
        "engine": f"vLLM {bench.version}",
        "tokens": int(reported.lengths.sum()),
        "conversations": len(reported.lengths),
        "sensitivity_s": seconds,
        "uniform": dict(sensitivity.uniform),
        "rows": rows,
        "comparisons": comparisons,
        "sensitivity": [row.model_dump() for row in sensitivity.rows],
    }


def same_bytes(bits: float) -> str:
    """The uniform scheme of at most so many bits per weight."""
    return "w4a16-g64" if bits < 4.5 else "w4a16-g32"


def compare(
    bits: float, budget: int, mine: Plan, plans: Mapping[str, Plan], modules: Any, reported: PairedKl
) -> dict[str, Any]:
    """The planner against the best of each kind that takes no more bytes."""

    def best(labels: Sequence[str]) -> dict[str, Any] | None:
        fitting = [label for label in labels if plans[label].weight_bytes(modules) <= budget]
        if not fitting:
            return None
        label = min(fitting, key=lambda one: reported.interval(plans[one])[0])
        return {"label": label, **asdict(reported.ratio(mine, plans[label]))}

    return {
        "bits": bits,
        "budget": budget,
        "uniform": best([one for one in plans if one.startswith("w4") and not one.endswith("tuned")]),
        "layer": best([label for label in plans if label.startswith("layer ") or label == "ends"]),
        "autoscheme": best([label for label in plans if label.startswith("AutoScheme")]),
        "random": best(
            [label for label in plans if label.startswith("random") and label.endswith(f"{bits:.3g}")]
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="*", default=["demo", "outliers"], choices=["demo", "outliers"])
    parser.add_argument("--quick", action="store_true", help="small sets and few tries, to see that it runs")
    parser.add_argument("--budgets", nargs="*", type=float, default=BUDGETS, help="bits per weight")
    parser.add_argument("--tries", type=int, default=12, help="plans that the search measures on the engine")
    parser.add_argument("--no-tune", dest="tune", action="store_false", help="tuning takes minutes a plan")
    parser.add_argument("--without", nargs="*", default=[], help="uniform methods to leave out")
    parser.add_argument("--python", type=Path, default=Path(".venv-engine/bin/python"))
    options = parser.parse_args()
    results = []
    with Bench(
        options.python, WORK / f"engine-{'-'.join(options.models)}.log", site=Path("deploy/engine_site")
    ) as bench:
        for name in options.models:
            directory = DEMO if name == "demo" else outlier_model.make()
            results.append(
                run(
                    name,
                    directory,
                    bench,
                    options.quick,
                    options.without,
                    options.budgets,
                    options.tries,
                    options.tune,
                )
            )
            (WORK / name / "result.json").write_text(json.dumps(results[-1], indent=1))
    show.table(results, sys.stdout)
    show.figure(results, WORK / "quantization.png")


if __name__ == "__main__":
    main()
