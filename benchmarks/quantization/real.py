"""Variants of a real chat model at 8 bits and at 4 to 5, on the kernels of a real engine.

    python -m benchmarks.quantization.real --list                  # what would be measured, in MB
    python -m benchmarks.quantization.real --only w8a8             # rows whose label holds a word
    python -m benchmarks.quantization.real --plan "planned 4.5=plan.json"

Rows are uniform variants of llm-compressor's methods and AutoRound, 8 bits with down projections in 16,
AutoScheme's assignments, and plans given as JSON (``--plan``), which must have been chosen on the set
``chosen`` of :mod:`benchmarks.quantization.real_data`: every figure here is of the set ``reported``. It is
the mean KL to BF16 over the whole vocabulary per token of the reference's own answers. Intervals are 95 %
with conversations as independent; ratios of KL are paired by bootstrap. Finished rows are kept under
var/benchmarks/real, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantize.plan.parts import PartStore

from benchmarks.quantization import real_data
from quantize.core.checkpoint import open_checkpoint
from quantize.core.modules import Modules, read_modules
from quantize.core.plan import Plan, uniform
from quantize.evaluate.bench import Bench
from quantize.plan import autoscheme
from quantize.plan.paired_kl import PairedKl

WORK = Path("var/benchmarks/real")
EIGHT = ("rtn", "mse", "gptq", "smoothquant+rtn", "smoothquant+gptq")
FOUR = ("rtn", "imatrix", "gptq", "imatrix+gptq", "awq+gptq")
GROUPS = ("w4a16-g128", "w4a16-g64", "w4a16-g32")
SLOW = ("awq+gptq", "autoround")
"""At one group size alone: each takes tens of minutes on two cores."""
SLOW_GROUP = "w4a16-g64"
AVERAGES = (4.5, 5.0)
"""Average bits that AutoScheme is asked for."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    label: str
    plan: Plan
    megabytes: float
    kl: float
    half: float


def fits(modules: Modules, scheme: str) -> bool:
    """Whether the scheme's group size divides the inputs of every module."""
    group = int(scheme.rpartition("-g")[2]) if "-g" in scheme else 1
    return all(linear.in_features % group == 0 for linear in modules.linears)


def rows_at_8_bits(modules: Modules) -> dict[str, Plan]:
    """Uniform ``w8a8`` by every method, and with the groups that read the widest inputs in 16 bits."""
    found = {f"w8a8 {method}": uniform(modules, "w8a8", method=method) for method in EIGHT}
    mixed = {group.name: "bf16" if "down" in group.kind else "w8a8" for group in modules}
    for method in ("rtn", "smoothquant+rtn"):
        found[f"w8a8 {method}, down_proj in 16 bits"] = Plan(groups=mixed, method=method)
    return found


def rows_at_4_bits(modules: Modules) -> dict[str, Plan]:
    """Uniform ``w4a16`` by group size and method, and the ends of the model at 8 bits."""
    found = {}
    for scheme in filter(lambda one: fits(modules, one), GROUPS):
        for method in (*FOUR, "autoround"):
            if method not in SLOW or scheme == SLOW_GROUP:
                found[f"{scheme} {method}"] = uniform(modules, scheme, method=method)
    ends = (0, modules.layers - 1)
    for eight in ("w8a8", "bf16"):
        groups = {group.name: eight if group.layer in ends else SLOW_GROUP for group in modules}
        found[f"first and last layer {eight}, else {SLOW_GROUP}"] = Plan(groups=groups, method="imatrix+gptq")
    return found


def rows_of_autoscheme(model: Path, modules: Modules, sequences: Sequence[Sequence[int]]) -> dict[str, Plan]:
    """AutoRound's own mixture of 4 and 8 bits at each average."""
    assigned = autoscheme.assign(model, modules, AVERAGES, WORK, sequences)
    return {
        f"AutoScheme at {bits}": Plan(
            groups={name: "w8a8" if wide == 8 else SLOW_GROUP for name, wide in layers.items()},
            method="imatrix+gptq",
        )
        for bits, layers in assigned.items()
    }


def given_plans(arguments: Sequence[str]) -> dict[str, Plan]:
    """Plans of ``LABEL=FILE`` arguments; ends the program with a sentence where one cannot be read."""
    found = {}
    for argument in arguments:
        label, _, path = argument.partition("=")
        if not path:
            sys.exit(f"--plan {argument!r}: write LABEL=FILE, FILE being a plan as JSON")
        try:
            found[label] = Plan.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            sys.exit(f"--plan {argument!r}: {error}")
    return found


def dominated(rows: Sequence[Row], reported: PairedKl) -> list[str]:
    """Of every row, the best other of no more bytes as a ratio of KL (paired, 95 %)."""
    lines = []
    for row in sorted(rows, key=lambda one: one.megabytes):
        smaller = [one for one in rows if one is not row and one.megabytes <= row.megabytes]
        if smaller:
            best = min(smaller, key=lambda one: one.kl)
            ratio = reported.ratio(row.plan, best.plan)
            lines.append(
                f"| {row.label} | {best.label} | {ratio.ratio:.2f} ({ratio.low:.2f}–{ratio.high:.2f}) |"
            )
    return lines


def report(rows: Sequence[Row], reported: PairedKl) -> str:
    """Two Markdown tables: KL by bytes, and each row over the best that is no larger."""
    lines = ["| variant | weights, MB | KL, 1/1000 nat per token |", "|---|---|---|"]
    for row in sorted(rows, key=lambda one: (one.megabytes, one.kl)):
        lines.append(f"| {row.label} | {row.megabytes:.1f} | {1e3 * row.kl:.1f} ± {1e3 * row.half:.1f} |")
    lines += ["", "| variant | best other of no more bytes | ratio of KL |", "|---|---|---|"]
    return "\n".join(lines + dominated(rows, reported)) + "\n"


def measured(plans: Mapping[str, Plan], modules: Modules, reported: PairedKl) -> list[Row]:
    """Every plan on the engine, one after another, said as it comes."""
    rows = []
    for label, plan in plans.items():
        kl, half = reported.interval(plan)
        rows.append(Row(label, plan, plan.weight_bytes(modules) / 1e6, kl, half))
        print(f"{label}: {rows[-1].megabytes:.1f} MB, KL {kl:.5f} ± {half:.5f}", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=WORK / "model", help="made where it is missing")
    parser.add_argument("--only", nargs="*", default=[], help="rows whose label holds one of these words")
    parser.add_argument("--plan", action="append", default=[], metavar="LABEL=FILE")
    parser.add_argument("--calibration", type=int, default=64, help="conversations")
    parser.add_argument("--autoscheme", action="store_true", help="tens of minutes on two cores")
    parser.add_argument("--list", action="store_true", help="print the rows and end")
    parser.add_argument("--python", type=Path, default=Path(".venv-engine/bin/python"))
    options = parser.parse_args()
    directory = real_data.real_model(options.model)
    checkpoint = open_checkpoint(directory)
    modules = read_modules(checkpoint)
    plans = rows_at_8_bits(modules) | rows_at_4_bits(modules) | given_plans(options.plan)
    if options.only:
        plans = {label: plan for label, plan in plans.items() if any(word in label for word in options.only)}
    if options.list:
        for label, plan in plans.items():
            print(f"{plan.weight_bytes(modules) / 1e6:8.1f} MB  {label}")
        return
    texts = real_data.texts(directory, WORK / "texts.json")
    calibration = texts.calibration(options.calibration)
    if options.autoscheme:
        plans |= rows_of_autoscheme(directory, modules, calibration.sequences)
    parts = PartStore(WORK / "parts", checkpoint, modules, calibration)
    with Bench(options.python, WORK / "engine.log", site=Path("deploy/engine_site")) as bench:
        reported = PairedKl(directory, bench, texts.reported, WORK / "reported", parts.assemble)
        rows = measured(plans, modules, reported)
        table = report(rows, reported)
    (WORK / "result.md").write_text(table, encoding="utf-8")
    (WORK / "plans.json").write_text(
        json.dumps({label: plan.model_dump(mode="json") for label, plan in plans.items()}, indent=1),
        encoding="utf-8",
    )
    print(table)


if __name__ == "__main__":
    main()
