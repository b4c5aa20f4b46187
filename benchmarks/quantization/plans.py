"""Two hundred plans for random budgets and targets: does the engine accept every one?

    python -m benchmarks.quantization.plans [--plans 200] [--loads 20]

The planner works on random losses, so that its plans are of every kind. Each is read by vLLM's own code for
compressed-tensors; a sample of those for this machine's processor is made and loaded by the engine, and
answers.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.quantization import data
from benchmarks.quantization.run import DEMO, WORK
from quantize.core.checkpoint import open_checkpoint
from quantize.core.modules import FUSED, Modules, read_modules
from quantize.core.plan import Plan
from quantize.core.quantization_config import quantization_config
from quantize.core.schemes import scheme
from quantize.core.targets import TARGETS, Target, detect
from quantize.evaluate.bench import Bench
from quantize.make.parts import PartStore
from quantize.plan.planner import Planner
from quantize.plan.sensitivity import Row, Sensitivity


def random_planner(modules: Modules, where: Target, rng: random.Random) -> Planner:
    """A planner whose losses are drawn, falling with the bits of a scheme."""
    rows = []
    for group in modules:
        weight = rng.lognormvariate(0, 1.5)
        for name in where.candidates(group):
            if name == "bf16":
                continue
            size = group.stored_bytes(scheme(name))
            loss = weight * rng.lognormvariate(0, 0.5) * 4.0 ** -(8 * size / group.weights)
            rows.append(
                Row(
                    group=group.name,
                    kind=group.kind,
                    layer=group.layer,
                    scheme=name,
                    method="rtn",
                    bytes=size,
                    sqnr_db=0.0,
                    fisher=loss,
                )
            )
    return Planner(modules, Sensitivity(rows=tuple(rows), tokens=0))


def random_plan(modules: Modules, where: Target, head_dim: int, rng: random.Random) -> Plan:
    planner = random_planner(modules, where, rng)
    least, most = planner.weight_bytes(planner.smallest()), 2 * sum(g.weights for g in modules)
    budget = rng.randint(least, max(least, modules.other_bytes + most))
    kvs = [kv for kv in ("auto", "fp8") if not where.kv_problems(kv, head_dim)]
    return planner.plan(planner.within(budget), rng.choice(kvs))


def case(plan: Plan, modules: Modules, here: bool) -> dict[str, Any]:
    bits = {group.name: scheme(plan.groups[group.name]).weight_bits for group in modules}
    config = quantization_config(plan, modules)
    return {"config": config, "fused": FUSED, "modules": bits, "constructs": here}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--plans", type=int, default=200)
    parser.add_argument("--loads", type=int, default=20)
    parser.add_argument("--python", type=Path, default=Path(".venv-engine/bin/python"))
    options = parser.parse_args()
    rng = random.Random(0)
    checkpoint = open_checkpoint(DEMO)
    modules = read_modules(checkpoint)
    here = detect()
    plans = []
    for _ in range(options.plans):
        name = rng.choice([here, *TARGETS])
        plan = random_plan(modules, TARGETS[name], checkpoint.head_dim, rng)
        if problems := TARGETS[name].check_plan(plan, modules, checkpoint.head_dim):
            sys.exit(f"the planner emitted an illegal plan for {name}: {problems[0]}")
        plans.append((name, plan))
    parts = PartStore(WORK / "plans-parts", checkpoint, modules, data.calibration(DEMO))
    with Bench(options.python, WORK / "plans.log", site=Path("deploy/engine_site")) as bench:
        refused = bench.parse([case(plan, modules, name == here) for name, plan in plans])
        for (name, plan), words in zip(plans, refused, strict=True):
            if words:
                print(f"{name}: {plan.describe()}: {words[0]}")
        read = sum(not words for words in refused)
        print(
            f"{read} of {len(plans)} plans for {len({name for name, _ in plans})} targets are read as meant"
        )
        mine = [plan for name, plan in plans if name == here][: options.loads]
        loaded = 0
        for plan in tqdm(mine, desc="load", unit="plan", file=sys.stderr):
            out = WORK / "plans-candidate"
            parts.assemble(plan, out)
            words = bench.load_error(out, kv=plan.kv)
            loaded += words is None
            if words:
                print(f"{plan.describe()}: {words}")
        print(f"{loaded} of {len(mine)} plans for {here} were loaded by the engine and answered")
    if read < len(plans) or loaded < len(mine):
        sys.exit(1)


if __name__ == "__main__":
    main()
