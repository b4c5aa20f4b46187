"""Variants of a real chat model at 8 bits and at 4 to 6, on the kernels of a real engine.

    python -m benchmarks.quantization.real --list                  # what would be measured, in MB
    python -m benchmarks.quantization.real --make                  # parts and estimates, without an engine
    python -m benchmarks.quantization.real --only w4a16-g32        # rows whose label holds a word
    python -m benchmarks.quantization.real --budgets 4.5 5 --controls autoscheme  # plans, and AutoScheme's
    python -m benchmarks.quantization.real --groups 20             # single groups: estimated and measured
    python -m benchmarks.quantization.real --plan "planned 4.5=plan.json"
    python -m benchmarks.quantization.real --checkpoint "w4a16-g32-asym awq=DIRECTORY"  # made elsewhere
    python -m benchmarks.quantization.real --checkpoint "planned, tuned=var/variants/m/planned/current"
    python -m benchmarks.quantization.real --only none --checkpoint …              # and nothing else

Rows are uniform variants by every method, heuristics (the ends of the model or every down projection in
more bits), and at each of ``--budgets``, in bits per weight of the linear modules, the planner's plan and
what AutoScheme, 8 bits at the ends and chance make of the same bytes. Plans are chosen on the set
``chosen`` of :mod:`benchmarks.quantization.real_data`; every figure here is of the set ``reported``, but
for single groups. It is the mean KL to BF16 over the whole vocabulary per token of the reference's own
answers. Intervals are 95 % with conversations as independent; ratios of KL are paired by bootstrap.
Finished rows are kept under var/benchmarks/real, so that an interrupted run goes on; each run writes
result.md, result.json, the seconds of its stages (stages.jsonl) and a picture from all rows so far.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.quantization import real_data, show
from benchmarks.quantization.stages import Stages
from quantize.card import CARD_NAME, read_card
from quantize.core.checkpoint import open_checkpoint
from quantize.core.methods import in_order, parse_method
from quantize.core.modules import Modules
from quantize.core.plan import Plan, uniform
from quantize.core.targets import Target, detect, target
from quantize.evaluate.bench import Bench
from quantize.plan import controls
from quantize.plan.paired_kl import PairedKl
from quantize.plan.sensitivity import Row as Estimate
from quantize.plan.sensitivity import analyse
from quantize.plan.served import Choice, ServedKl
from quantize.plan.session import PlanningSession

WORK = Path("var/benchmarks/real")
EIGHT = ("rtn", "gptq", "smooth+rtn")
SLOW_EIGHT = ("smoothquant+rtn", "rotation+rtn")
BEST = "smooth+imatrix+gptq"
"""The method of plans and heuristics."""
ORDERED = in_order(BEST)
FOUR = ("rtn", "imatrix", "gptq", "imatrix+gptq", BEST, ORDERED)
GROUPS = ("w4a16-g128", "w4a16-g64", "w4a16-g32", "w4a16-g16")
ASYMMETRIC = ("w4a16-g64-asym", "w4a16-g32-asym", "w4a16-g16-asym")
SLOW_FOUR = ("awq+rtn", "awq+imatrix+gptq", "autoround")
"""Made by llm-compressor in minutes or tens of minutes on two cores: at one group size, and only with
``--slow``."""
SLOW_GROUP = "w4a16-g64"


@dataclass(frozen=True)
class Row:
    """One line of the table. ``bits`` are per weight of the linear modules, ``kl`` is in nats per token,
    ``half`` half of its 95 % interval."""

    label: str
    kind: str
    plan: Plan
    megabytes: float
    bits: float
    kl: float
    half: float


@dataclass(frozen=True)
class Wanted:
    """A plan that is to be measured."""

    kind: str
    plan: Plan


Rows = dict[str, Wanted]
"""What is measured, by label."""


def fits(modules: Modules, where: Target, scheme: str) -> bool:
    """Whether every module may have the scheme on the target."""
    return all(scheme in where.candidates(group) for group in modules)


def rows_at_8_bits(modules: Modules, where: Target, slow: bool = False) -> Rows:
    """Uniform ``w8a8`` by every method, and with the groups that read the widest inputs in 16 bits."""
    pairs = [("w8a8", method) for method in (*EIGHT, *(SLOW_EIGHT if slow else ()))]
    pairs.append(("w8a8-asym", "smooth+rtn"))
    found = {
        f"{scheme} {method}": Wanted("uniform", uniform(modules, scheme, method=method))
        for scheme, method in pairs
        if fits(modules, where, scheme)
    }
    mixed = {group.name: "bf16" if "down" in group.kind else "w8a8" for group in modules}
    for method in ("rtn", "smooth+rtn"):
        plan = Plan(groups=mixed, method=method)
        found[f"w8a8 {method}, down_proj in 16 bits"] = Wanted("heuristic", plan)
    return found


def rows_at_4_bits(modules: Modules, where: Target, slow: bool = False) -> Rows:
    """Uniform ``w4a16`` by group size and method, and heuristics: ends or down projections in more bits."""
    pairs = [(scheme, method) for scheme in GROUPS for method in FOUR]
    pairs += [(scheme, method) for scheme in ASYMMETRIC for method in ("imatrix+gptq", BEST, ORDERED)]
    pairs += [(SLOW_GROUP, method) for method in SLOW_FOUR if slow]
    found = {
        f"{scheme} {method}": Wanted("uniform", uniform(modules, scheme, method=method))
        for scheme, method in pairs
        if fits(modules, where, scheme)
    }
    ends = (0, modules.layers - 1)
    for high in ("w8a8", "bf16"):
        of_ends = {g.name: high if g.layer in ends else SLOW_GROUP for g in modules}
        of_downs = {g.name: high if "down" in g.kind else SLOW_GROUP for g in modules}
        for what, groups in (("first and last layer", of_ends), ("down_proj", of_downs)):
            label = f"{what} {high}, else {SLOW_GROUP}"
            methods = {name: "smooth+rtn" for name, scheme in groups.items() if scheme == "w8a8"}
            found[label] = Wanted("heuristic", Plan(groups=groups, method=BEST, methods=methods))
    return found


def rows_at(
    session: PlanningSession,
    bench: Bench,
    budgets: Sequence[float],
    tries: int,
    kinds: Sequence[controls.Kind],
) -> Iterator[tuple[str, Wanted]]:
    """At each budget the planner's plan, and what needs no planner at no more bytes."""
    weights = sum(group.weights for group in session.blocks)
    for bits in budgets:
        budget = session.blocks.other_bytes + round(bits * weights / 8)
        best = session.within(bench, budget, tries=tries)[0]
        yield f"planned at {bits:g} bits", Wanted("planned", best.plan)
        for label, kind, plan in controls.plans(session, session.planner(bench), budget, kinds, print):
            yield f"{label} at {bits:g} bits", Wanted("random" if kind == "random" else "heuristic", plan)


def given_plans(arguments: Sequence[str]) -> Rows:
    """Plans of ``LABEL=FILE`` arguments; ends the program with a sentence where one cannot be read."""
    found = {}
    for argument in arguments:
        label, _, path = argument.partition("=")
        if not path:
            sys.exit(f"--plan {argument!r}: write LABEL=FILE, FILE being a plan as JSON")
        try:
            plan = Plan.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            sys.exit(f"--plan {argument!r}: {error}")
        found[label] = Wanted("given", plan)
    return found


def checkpoints(arguments: Sequence[str], modules: Modules) -> dict[str, tuple[Wanted, Path]]:
    """Variants of ``LABEL=DIRECTORY`` arguments that Tiercel made, as their cards say, and uniform ones of
    ``SCHEME METHOD=DIRECTORY`` that were made elsewhere, by label; ends the program where there is no
    checkpoint."""
    found = {}
    for argument in arguments:
        label, _, path = argument.partition("=")
        if path and (Path(path) / CARD_NAME).is_file():
            card = read_card(Path(path))
            found[label] = Wanted("given", Plan(groups=card.schemes, kv=card.kv, method=label)), Path(path)
            continue
        name, _, method = label.partition(" ")
        if not method or not (Path(path) / "config.json").is_file():
            sys.exit(
                f"--checkpoint {argument!r}: write LABEL=DIRECTORY of a variant with its card, or SCHEME "
                "METHOD=DIRECTORY of a checkpoint without one"
            )
        found[label] = Wanted("uniform", uniform(modules, name, method=method)), Path(path)
    return found


def choices(session: PlanningSession, rows: Rows) -> dict[str, list[Choice]]:
    """What is streamed for the rows and the planner, by group, in one pass; not what is of one plan alone."""
    found = {name: list(known) for name, known in session.choices().items()}
    for wanted in rows.values():
        for name, scheme in wanted.plan.groups.items():
            if not parse_method(method := wanted.plan.method_of(name)).asymmetric:
                found[name].append((scheme, method))
    return {name: list(dict.fromkeys(many)) for name, many in found.items()}


def single_groups(estimates: Sequence[Estimate], served: ServedKl, count: int) -> list[dict[str, Any]]:
    """Groups at ``SLOW_GROUP``, everything else in 16 bits, as measured on the engine: evenly spread over
    the order of the estimates. KL in nats per token."""
    order = sorted((one for one in estimates if one.scheme == SLOW_GROUP), key=lambda one: one.fisher)
    spread = {order[round(n * (len(order) - 1) / max(1, count - 1))].group for n in range(count)}
    return [
        {
            "group": one.group,
            "estimate": one.fisher,
            "kl": served({one.group: (one.scheme, one.method)}),
        }
        for one in order
        if one.group in spread
    ]


def rank_correlation(singles: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Spearman's rank correlation of estimate and measured KL, and its p-value."""
    from scipy.stats import spearmanr

    found = spearmanr([one["estimate"] for one in singles], [one["kl"] for one in singles])
    return float(found.statistic), float(found.pvalue)


def ratios(rows: Sequence[Row], reported: PairedKl) -> list[dict[str, Any]]:
    """Paired ratios of KL (95 %): methods over ``BEST`` at one group size; plans over the best uniform,
    heuristic and random one of no more bytes."""
    found = []

    def add(row: Row, other: Row, what: str) -> None:
        ratio = asdict(reported.ratio(row.plan, other.plan))
        found.append({"label": row.label, "over": other.label, "what": what, **ratio})

    by_label = {row.label: row for row in rows}
    for row in rows:
        scheme = row.label.partition(" ")[0]
        for name in dict.fromkeys((scheme, scheme.removesuffix("-asym"))):
            best = by_label.get(f"{name} {BEST}")
            if row.kind == "uniform" and best is not None and best is not row:
                add(row, best, "method")
    for row in (one for one in rows if one.kind in ("planned", "given")):
        for kinds in (("uniform",), ("heuristic",), ("random",)):
            smaller = [one for one in rows if one.kind in kinds and one.megabytes <= row.megabytes + 1e-6]
            if smaller:
                add(row, min(smaller, key=lambda one: one.kl), kinds[0])
    return found


def measured(
    wanted: Mapping[str, Wanted], modules: Modules, reported: PairedKl, known_only: bool = False
) -> list[Row]:
    """Every plan on the engine, one after another, said as it comes."""
    rows = []
    for label, one in wanted.items():
        if known_only and not reported.knows(one.plan):
            continue
        new = not reported.knows(one.plan)
        kl, half = reported.interval(one.plan)
        megabytes, bits = one.plan.weight_bytes(modules) / 1e6, one.plan.bits_per_weight(modules)
        rows.append(Row(label, one.kind, one.plan, megabytes, bits, kl, half))
        if new:
            print(f"{label}: {megabytes:.1f} MB, KL {kl:.5f} ± {half:.5f}", file=sys.stderr, flush=True)
    return rows


def remembered(file: Path) -> Rows:
    """What earlier runs measured."""
    if not file.is_file():
        return {}
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return {row["label"]: Wanted(row["kind"], Plan.model_validate(row["plan"])) for row in rows}


def write(rows: Sequence[Row], reported: PairedKl, singles: Sequence[Mapping[str, Any]]) -> None:
    """result.json, result.md and the picture."""
    result = {
        "conversations": len(reported.lengths),
        "tokens": int(reported.lengths.sum()),
        "rows": [asdict(row) | {"plan": row.plan.model_dump(mode="json")} for row in rows],
        "ratios": ratios(rows, reported),
        "groups": list(singles),
    }
    if len(singles) > 2:
        result["rank_correlation"], result["p"] = rank_correlation(singles)
    (WORK / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    with (WORK / "result.md").open("w", encoding="utf-8") as file:
        show.by_bytes(result, file)
    show.loss_by_bytes(result, WORK / "real-model.png")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=WORK / "model", help="made where it is missing")
    parser.add_argument("--only", nargs="*", default=[], help="rows whose label holds one of these words")
    parser.add_argument("--plan", action="append", default=[], metavar="LABEL=FILE")
    parser.add_argument("--checkpoint", action="append", default=[], metavar="SCHEME METHOD=DIRECTORY")
    parser.add_argument("--budgets", nargs="*", type=float, default=[], help="bits per weight of plans")
    parser.add_argument(
        "--schemes", nargs="+", help="what plans mix; as `tiercel quantize plan` unless given"
    )
    parser.add_argument("--tries", type=int, default=12, help="plans that are measured for each budget")
    parser.add_argument(
        "--controls", nargs="*", choices=controls.KINDS, default=["ends", "random"], help="at each budget"
    )
    parser.add_argument("--slow", action="store_true", help="AWQ and AutoRound as well")
    parser.add_argument("--groups", type=int, default=0, metavar="N", help="single groups to measure")
    parser.add_argument("--calibration", type=int, default=64, help="conversations")
    parser.add_argument("--make", action="store_true", help="make parts and estimates, start no engine")
    parser.add_argument("--list", action="store_true", help="print the rows and end")
    parser.add_argument("--python", type=Path, default=Path(".venv-engine/bin/python"))
    return parser.parse_args()


def main() -> None:
    options = arguments()
    directory = real_data.real_model(options.model)
    texts = real_data.texts(directory, WORK / "texts.json")
    session = PlanningSession(
        WORK / "planning",
        open_checkpoint(directory),
        texts.calibration(options.calibration),
        target(detect()),
        methods=(BEST,),
        schemes=options.schemes,
        choosing=texts.chosen,
    )
    modules, where = session.modules, session.target
    rows = rows_at_8_bits(modules, where, options.slow) | rows_at_4_bits(modules, where, options.slow)
    if options.only:
        rows = {label: one for label, one in rows.items() if any(word in label for word in options.only)}
    rows |= given_plans(options.plan)
    made_elsewhere = checkpoints(options.checkpoint, modules)
    if options.list:
        for label, one in rows.items():
            print(f"{one.plan.weight_bytes(modules) / 1e6:8.1f} MB  {label}")
        return
    stages = Stages(WORK / "stages.jsonl")
    estimates: Sequence[Estimate] = ()
    if rows or options.make or options.budgets or options.groups:  # not for what was made elsewhere alone
        with stages("parts"):
            session.parts.make(choices(session, rows), label="parts")
    if options.make or options.budgets or options.groups:
        with stages("estimates"):
            known = session.directory / "rows.jsonl"
            estimates = analyse(session.parts, session.choices(), session.choosing, known)
    if options.make:
        return
    with Bench(options.python, WORK / "engine.log", site=Path("deploy/engine_site")) as bench:
        reported = PairedKl(directory, bench, texts.reported, WORK / "reported", session.parts.link)
        with stages(f"{len(rows)} rows on the engine"):
            measured(rows, modules, reported)
            for label, (one, folder) in made_elsewhere.items():
                reported.take(one.plan, folder)
                rows[label] = one
        served = ServedKl(session.parts, bench, session.choosing, session.directory / "served")
        with stages(f"{options.groups} single groups on the engine"):
            singles = single_groups(estimates, served, options.groups) if options.groups else []
        for bits in options.budgets:
            with stages(f"plan at {bits:g} bits"):
                rows |= dict(rows_at(session, bench, [bits], options.tries, options.controls))
        with stages("plans on the engine"):
            rows = remembered(WORK / "result.json") | rows
            write(measured(rows, modules, reported), reported, singles)
    print((WORK / "result.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
