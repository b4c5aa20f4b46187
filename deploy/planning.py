"""``tiercel quantize sensitivity`` and ``plan``: the workshop, set up from the YAML."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from deploy.engine import SITE
from gateway.config import Config
from quantize.calibration import read_calibration
from quantize.card import Card
from quantize.check import estimate, refuse_short, refuse_unfit
from quantize.checkpoint import open_checkpoint
from quantize.compare import align, kl_text, megabytes
from quantize.evaluate.bench import Bench
from quantize.modules import read_modules
from quantize.plan import Plan
from quantize.planner import Candidate, PlanError
from quantize.registry import Registry
from quantize.sensitivity import Sensitivity
from quantize.target import detect, target
from quantize.workshop import METHODS, Workshop

Say = Callable[[str], None]


def open_workshop(
    config: Config,
    target_name: str | None,
    methods: Sequence[str] = METHODS,
    schemes: Sequence[str] | None = None,
) -> Workshop:
    """The workshop for the configured model; everything it makes lies in ``variants_dir/.workshop``."""
    checkpoint = open_checkpoint(config.model.path)
    refuse_unfit(checkpoint)
    where = target(target_name or detect())
    calibration = read_calibration(config.calibration, checkpoint)
    tokens = [len(sequence) for sequence in calibration.sequences]
    for method in methods:
        cost = estimate(checkpoint, read_modules(checkpoint), sum(tokens), max(tokens), method)
        refuse_short(cost, config.variants_dir)
    directory = config.variants_dir / ".workshop"
    return Workshop(directory, checkpoint, calibration, where, methods=methods, schemes=schemes)


@contextlib.contextmanager
def open_bench(config: Config) -> Iterator[Bench]:
    """A bench engine in the configured engine environment."""
    if config.engine.python is None:
        raise PlanError("engine.python is not set; planning measures on the engine, run `make setup`")
    with Bench(
        config.engine.python,
        config.variants_dir / ".logs" / "bench.log",
        max_model_len=config.engine.max_model_len,
        env=config.engine.env,
        site=SITE,
    ) as bench:
        yield bench


def sensitivity(config: Config, target_name: str | None) -> tuple[Sensitivity, Path]:
    """Analyse the configured model; returns the rows and where they were written."""
    workshop = open_workshop(config, target_name)
    with open_bench(config) as bench:
        found = workshop.sensitivity(bench)
    return found, workshop.directory / "sensitivity.json"


def known_sensitivity(config: Config) -> Sensitivity | None:
    """The newest finished analysis of the configured model, if there is one."""
    paths = (config.variants_dir / ".workshop").glob("*/sensitivity.json")
    newest = max(paths, key=lambda path: path.stat().st_mtime, default=None)
    return Sensitivity.model_validate_json(newest.read_text(encoding="utf-8")) if newest else None


def plan(
    config: Config,
    name: str,
    say: Say,
    *,
    target_name: str | None = None,
    bits: float | None = None,
    budget: int | None = None,
    loss: float | None = None,
    kv: Sequence[str] = ("auto",),
    kv_tokens: int = 0,
    tries: int = 200,
    methods: Sequence[str] = METHODS,
    schemes: Sequence[str] | None = None,
    tuned: bool = True,
) -> tuple[Card, list[Candidate]]:
    """Find the best plan, make it, and register it as variant ``name``; evaluation comes after.

    One of ``bits`` (per weight of the linear modules), ``budget`` (bytes of weights and ``kv_tokens`` tokens
    of cache) and ``loss`` (nats per token) says what is wanted. Raises PlanError.
    """
    if loss is not None and tuple(kv) != ("auto",):
        raise PlanError(f"--kv {' '.join(kv)} has no meaning with --loss, which is of the weights; drop one")
    if kv_tokens and budget is None:
        raise PlanError("--concurrency and --context count in a budget of bytes; give it with --bytes")
    workshop = open_workshop(config, target_name, methods, schemes)
    for problem in (p for one in kv for p in workshop.target.kv_problems(one, workshop.checkpoint.head_dim)):
        raise PlanError(str(problem))
    with open_bench(config) as bench:
        if loss is not None:
            candidates = [workshop.for_loss(bench, loss)]
        else:
            if budget is None:
                weights = sum(group.weights for group in workshop.modules)
                budget = workshop.modules.other_bytes + int((bits or 4.5) * weights / 8)
            candidates = workshop.within(bench, budget, kv_tokens, kv, tries)
    best = candidates[0]
    wanted = best.plan.model_copy(update={"tuned": tuned})
    say(format_candidates(candidates))

    def make(chosen: Plan, out: Path) -> None:
        if (after := workshop.make(chosen, out)) is not None:
            say(f"tuned: KL in torch {after.before:.5f} -> {after.after:.5f} on the choosing conversations")

    registry = Registry(config.variants_dir, config.model.name, config.reference)
    card = registry.add(
        workshop.checkpoint,
        name,
        wanted,
        workshop.calibration,
        make=lambda out: make(wanted, out),
        target=workshop.target.name,
        predicted_kl=best.predicted_kl,
    )
    return card, candidates


def format_candidates(candidates: Sequence[Candidate]) -> str:
    """The plans that were measured on the engine, best first."""
    rows = [["plan", "weights", "predicted", "in torch", "on the engine"]]
    for number, one in enumerate(candidates, 1):
        figures = (one.predicted_kl, one.fake_kl, one.served_kl)
        rows.append([str(number), megabytes(one.weight_bytes), *map(kl_text, figures)])
    return align(rows) + "\nMean KL, nats per token, on the conversations that plans are chosen on."


def format_sensitivity(found: Sensitivity) -> str:
    """The rows as a table, the most sensitive groups first."""
    worst: dict[str, float] = {}
    for row in found.rows:
        worst[row.group] = max(worst.get(row.group, 0.0), row.loss)
    rows = sorted(found.rows, key=lambda row: (-worst[row.group], row.group, row.bytes))
    header = ["group", "scheme", "method", "bytes", "SQNR dB", "Fisher", "KL", "KL engine"]
    table = [header]
    for row in rows:
        served = "" if row.kl_served is None else f"{1000 * row.kl_served:.3f}"
        figures = [f"{row.sqnr_db:.1f}", f"{1000 * row.fisher:.3f}", f"{1000 * row.kl:.3f}", served]
        table.append([row.group, row.scheme, row.method, str(row.bytes), *figures])
    text = align(table)
    differing = [f"{name} x {ratio:.2f}" for name, ratio in found.fidelity.items() if not 0.8 < ratio < 1.25]
    note = f"\nOn the engine, uniform variants lose differently from torch: {', '.join(differing)}."
    return text + "\nFisher and KL in 1/1000 nat per token." + (note if differing else "")
