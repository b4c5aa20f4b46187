"""``tiercel quantize sensitivity`` and ``plan``: the session, set up from the YAML."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.engine import SITE, attention_heads
from deploy.machine import look
from deploy.making import all_items
from deploy.models import checkpoint_of, registry_of
from deploy.placement import Machine, Need, place, share_options
from deploy.unlabelled import calibration_for, version_in_use
from gateway.config import ModelConfig
from gateway.config.engine import cache_for
from quantize.card import Card
from quantize.check import kept_rows, refuse_pattern, refuse_short, refuse_unfit
from quantize.core.checkpoint import Checkpoint, weight_bytes
from quantize.core.files import locked, write_whole
from quantize.core.methods import parse_method
from quantize.core.modules import read_modules
from quantize.core.plan import Plan
from quantize.core.schemes import BF16_BYTES, scheme
from quantize.core.targets import Target, detect, target
from quantize.core.tensors import refuse_not_finite
from quantize.evaluate.bench import Bench, Span
from quantize.evaluate.tasks import by_first_role
from quantize.make.blocks import best_device, free_memory
from quantize.make.calibration import CalibrationSet, load_tokenizer
from quantize.plan import controls
from quantize.plan.controls import Controls, Kind
from quantize.plan.cost import estimate_planning
from quantize.plan.paired_kl import PairedKl
from quantize.plan.planner import Candidate, PlanError
from quantize.plan.sensitivity import Sensitivity
from quantize.plan.session import DEFAULT_BITS, METHODS, TRIES, PlanningSession
from quantize.plan.tune import STEPS, untunable
from quantize.report.tables import align, kl_text, megabytes

Say = Callable[[str], None]

BENCH_S = 300.0
"""Without a sign of life of planning's engine, beside what a model of its size takes to load."""
LEAST_CACHE = 256 << 20
"""Bytes of a bench engine's KV cache on a GPU, at least."""
BENCH_CONTEXT = 1024
"""Tokens of a conversation that planning measures, where engine.max_model_len says nothing else."""
TUNING_S = 600.0
"""Seconds that tuning may take."""
REPORTED_CONVERSATIONS = 240
"""Held-out conversations, of all roles together, on which a plan is compared with its controls."""


def open_session(
    model: ModelConfig,
    target_name: str | None,
    methods: Sequence[str] = METHODS,
    schemes: Sequence[str] | None = None,
) -> PlanningSession:
    """The session for the configured model; everything it makes lies in ``variants_dir/.planning``."""
    checkpoint = checkpoint_of(model, _say_aside)
    refuse_pattern(model.variants_dir)
    refuse_pattern(checkpoint.path, f"models.{model.name}.path")
    refuse_unfit(checkpoint)
    refuse_not_finite(checkpoint.path)
    where = target(target_name or detect())
    calibration = calibration_for(model, checkpoint, version_in_use(model))
    directory = model.variants_dir / ".planning"
    context = bench_context(model)
    session = PlanningSession(directory, checkpoint, calibration, where, methods, schemes, context=context)
    refuse_short(estimate_planning(session), model.variants_dir)
    return session


@contextlib.contextmanager
def open_bench(model: ModelConfig) -> Iterator[Bench]:
    """A bench engine in the configured engine environment.

    One process at a time plans in a variants directory: candidates are put together in the same place.
    """
    if model.engine.python is None:
        raise PlanError("engine.python is not set; planning measures on the engine, run `make setup`")
    env, options = bench_place(model, look())
    with (
        locked(model.variants_dir / ".planning" / ".lock", "planning", _say_aside),
        Bench(
            model.engine.python,
            model.variants_dir / ".logs" / "bench.log",
            max_model_len=bench_context(model),
            env={**model.engine.env, **env},
            site=SITE,
            options=options,
            timeout_s=model.engine.patience_s(weight_bytes(checkpoint_of(model, _say_aside).path)) + BENCH_S,
        ) as bench,
    ):
        yield bench


def bench_place(model: ModelConfig, machine: Machine) -> tuple[Mapping[str, str], dict[str, Any]]:
    """Environment and options of a bench engine: on a GPU those by which it takes what the 16-bit model needs
    and no more, since parts are made there too; on a CPU a KV cache for its context. Raises
    PlacementError."""
    checkpoint = checkpoint_of(model, _say_aside)
    per_token = checkpoint.kv_bytes_per_token(BF16_BYTES)
    if not machine.gpus:
        return {"VLLM_CPU_KVCACHE_SPACE": str(cache_for(bench_context(model), per_token) >> 30)}, {}
    modules = read_modules(checkpoint)
    cache = max(LEAST_CACHE, 2 * bench_context(model) * per_token)
    need = Need(
        name=f"planning {model.name}",
        weight_bytes=modules.other_bytes + BF16_BYTES * sum(group.weights for group in modules),
        kv_bytes=cache,
        heads=attention_heads(checkpoint.path),
        env=model.engine.env,
        arguments=model.engine.extra_args,
    )
    placed = place(machine, need, (), 1)
    if placed is None:
        return {}, {}
    return placed.env, share_options(placed.arguments or model.engine.extra_args)


def bench_context(model: ModelConfig) -> int:
    """Tokens of a conversation that the bench engine takes: no more than the model does."""
    return min(model.engine.max_model_len or BENCH_CONTEXT, checkpoint_of(model, _say_aside).max_model_len)


def _say_aside(text: str) -> None:
    print(text, file=sys.stderr)


def sensitivity(model: ModelConfig, target_name: str | None) -> tuple[Sensitivity, Path]:
    """Analyse the configured model; returns the rows and where they were written."""
    session = open_session(model, target_name)
    with open_bench(model) as bench:
        found = session.sensitivity(bench)
    return found, session.directory / "sensitivity.json"


def known_sensitivity(model: ModelConfig) -> Sensitivity | None:
    """The newest finished analysis of the configured model, if there is one."""
    newest = _newest(model, "sensitivity.json")
    return Sensitivity.model_validate_json(newest.read_text(encoding="utf-8")) if newest else None


def plan(
    model: ModelConfig,
    name: str,
    say: Say,
    *,
    target_name: str | None = None,
    bits: float | None = None,
    budget: int | None = None,
    loss: float | None = None,
    kv: Sequence[str] = ("auto",),
    kv_tokens: int = 0,
    tries: int = TRIES,
    methods: Sequence[str] | None = None,
    schemes: Sequence[str] | None = None,
    tuned: bool = True,
    compare_with: Sequence[Kind] = (),
    before: Callable[[], None] | None = None,
) -> tuple[Card, list[Candidate]]:
    """Find the best plan, make it, and register it as variant ``name``; evaluation comes after.

    One of ``bits`` (per weight of the blocks' matrices, all else being at 16), ``budget`` (bytes of weights
    and ``kv_tokens`` tokens of cache) and ``loss`` (nats per token) says what is wanted. ``compare_with``
    names kinds of controls, which are measured on held-out conversations beside the variant. ``before`` is
    what else is looked at before work. Raises PlanError.
    """
    if loss is not None and tuple(kv) != ("auto",):
        raise PlanError(f"--kv {' '.join(kv)} has no meaning with --loss, which is of the weights; drop one")
    if kv_tokens and budget is None:
        raise PlanError("--concurrency and --context count in a budget of bytes; give it with --bytes")
    _refuse_tries(tries)
    if before is not None:
        before()
    session = open_session(model, target_name, methods or METHODS, schemes)
    for problem in (p for one in kv for p in session.target.kv_problems(one, session.checkpoint.head_dim)):
        raise PlanError(str(problem))
    for row in kept_rows(session.blocks, session.target, session.least_bytes()):
        say(str(row))
    within = 0 if loss is not None else _budget(session, bits, budget, kv_tokens, kv)
    steps = _tuning_steps(session, say) if tuned else 0
    with open_bench(model) as bench:
        if loss is not None:
            candidates = [session.for_loss(bench, loss)]
        else:
            candidates = session.within(bench, within, kv_tokens, kv, tries)
    best = candidates[0]
    wanted = best.plan.model_copy(update={"tuned": steps > 0})
    steps, begun = _steps_begun(session, wanted, steps)
    say(format_candidates(candidates))

    def make(chosen: Plan, out: Path) -> None:
        if (after := session.make(chosen, out, steps)) is not None:
            say(
                f"tuned in {steps} steps: KL in torch {after.before:.5f} -> {after.after:.5f} on the "
                "choosing conversations"
            )

    registry = registry_of(model)
    card = registry.add(
        session.checkpoint,
        name,
        wanted,
        session.calibration,
        make=lambda out: make(wanted, out),
        target=session.target.name,
        predicted_kl=best.predicted_kl,
    )
    begun.unlink(missing_ok=True)
    if compare_with:
        compared = compare(model, session, card, wanted, registry.path(name), compare_with, say)
        say(format_controls(compared))
        say(f"written to {compared.write(session.directory)}; `tiercel variants report` draws it")
    return card, candidates


def planning_before(
    checkpoint: Checkpoint,
    where: Target,
    calibration: CalibrationSet,
    schemes: Sequence[str] | None = None,
) -> PlanningSession:
    """What planning a model would be, for a look before there is one: ``checkpoint`` has its shapes. Raises
    SchemeError, PlanError for schemes that the target serves nowhere, QuantizeError for too few
    conversations."""
    for name in schemes or ():
        scheme(name)
    session = PlanningSession(Path(), checkpoint, calibration, where, schemes=schemes)
    session.choices()
    return session


def refuse_wanted(session: PlanningSession, bits: float | None, tries: int) -> None:
    """Raise PlanError where no plan takes so few bits per weight, and for tries that find none."""
    _refuse_tries(tries)
    _budget(session, bits, None, 0, ("auto",))


def _refuse_tries(tries: int) -> None:
    if tries < 1:
        raise PlanError(f"--tries {tries}: plans that are measured on the engine; give 1 or more")


def _budget(
    session: PlanningSession, bits: float | None, budget: int | None, kv_tokens: int, kv: Sequence[str]
) -> int:
    """The bytes that are wanted. Raises PlanError where no plan takes so few."""
    if bits is not None and not 0 < bits <= 16:
        raise PlanError(f"--bits {bits:g}: bits of a weight lie above 0 and are 16 at most, such as 4.5")
    weights, other = sum(group.weights for group in session.blocks), session.blocks.other_bytes
    if budget is None:
        budget = other + int((DEFAULT_BITS if bits is None else bits) * weights / 8)
    if budget < (least := session.least_bytes(kv_tokens, kv)):
        raise PlanError(
            f"a budget of {budget} bytes is below the least possible, {least} bytes "
            f"(--bits {8 * (least - other) / weights:.3f}, with all but the blocks at 16 bits: {other} bytes "
            "of embeddings, head and norms); raise it"
        )
    return budget


def _tuning_steps(session: PlanningSession, say: Say) -> int:
    """As many as there are memory and ``TUNING_S`` for; says so where there are none."""
    if why := untunable(session.checkpoint, session.modules):
        say(f"scales are not tuned: {why}")
        return 0
    free = free_memory(best_device())
    for steps in STEPS:
        memory, seconds = session.tuning_cost(steps)
        if memory <= free and seconds <= TUNING_S:
            return steps
    say(
        f"scales are not tuned: {STEPS[-1]} steps would take about {memory / 1e9:.1f} GB (free "
        f"{free / 1e9:.1f} GB) and {seconds / 60:.0f} minutes (at most {TUNING_S / 60:.0f} are spent on it)"
    )
    return 0


def _steps_begun(session: PlanningSession, plan: Plan, steps: int) -> tuple[int, Path]:
    """The steps that tuning a plan was begun with, so that a run that was killed ends as it would have, and
    the file that keeps them until it is done."""
    digest = hashlib.sha256(plan.model_dump_json().encode()).hexdigest()[:12]
    begun = session.directory / f"tuning-{digest}"
    if steps and begun.is_file():
        return int(begun.read_text(encoding="utf-8")), begun
    if steps:
        write_whole(begun, f"{steps}\n")
    return steps, begun


def compare(
    model: ModelConfig,
    session: PlanningSession,
    card: Card,
    plan: Plan,
    directory: Path,
    kinds: Sequence[Kind],
    say: Say,
) -> Controls:
    """The variant that was made of ``plan`` beside controls of at most its bytes, on the roles' held-out
    conversations; without tasks, on those that plans are chosen on."""
    spans: Sequence[Span]
    spans, what = held_out(model), "held-out conversations of the roles"
    if not spans:
        spans, what = session.choosing, "the conversations that the plan was chosen on, which favours it"
    with open_bench(model) as bench:
        key = hashlib.sha256(repr((bench.identity, spans)).encode()).hexdigest()[:12]
        work = session.directory / f"compared-{key}"
        paired = PairedKl(session.checkpoint.path, bench, spans, work, session.make)
        paired.take(plan, directory)
        budget = plan.weight_bytes(session.modules)
        ordered = any(parse_method(plan.method_of(name)).asymmetric for name in plan.groups)
        rivals = list(controls.plans(session, session.planner(bench), budget, kinds, say, ordered=ordered))
        rows = controls.measure(session, paired, card.variant, plan, rivals)
    return Controls(
        variant=card.variant,
        version=card.version,
        measured_on=what,
        conversations=len(spans),
        tokens=int(paired.lengths.sum()),
        rows=rows,
    )


def held_out(model: ModelConfig) -> list[Span]:
    """The roles' items with their right answers as token ids, as many of each role; all but the first token
    is scored. Those that an engine's context does not hold are left out."""
    tokenizer: Any = load_tokenizer(model.path)
    tasks = all_items(model)
    once = dict.fromkeys(by_first_role(tasks).values())
    taken = itertools.zip_longest(*([item for item in tasks[role] if item.suite == "task"] for role in once))
    spans: list[Span] = []
    context = bench_context(model)
    for item in itertools.chain.from_iterable(taken):
        if item is not None and len(spans) < REPORTED_CONVERSATIONS:
            messages = [*item.messages, {"role": "assistant", "content": item.expected}]
            encoded = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
            if 1 < len(encoded["input_ids"]) < context:
                spans.append((list(encoded["input_ids"]), 1))
    return spans


def known_controls(model: ModelConfig, cards: Sequence[Card]) -> Controls | None:
    """The newest comparison, if it is of one of ``cards``."""
    path = _newest(model, controls.FILE)
    if path is None:
        return None
    found = Controls.model_validate_json(path.read_text(encoding="utf-8"))
    return found if any((c.variant, c.version) == (found.variant, found.version) for c in cards) else None


def _newest(model: ModelConfig, name: str) -> Path | None:
    paths = (model.variants_dir / ".planning").glob(f"*/{name}")
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)


def format_controls(found: Controls) -> str:
    """The variant and its controls by bytes."""
    rows = [["plan", "kind", "bits", "weights", "KL", f"{found.variant} / it"]]
    for one in found.rows:
        ratio = "" if one.ratio is None else f"{one.ratio:.2f} ({one.low:.2f} to {one.high:.2f})"
        kl = f"{kl_text(one.kl)} ± {kl_text(one.half)}"
        rows.append([one.label, one.kind, f"{one.bits:.3f}", megabytes(one.bytes), kl, ratio])
    return (
        align(rows)
        + f"\nMean KL, nats per token, on {found.conversations} {found.measured_on} ({found.tokens} tokens); "
        "95 % intervals, of ratios on the same conversations."
    )


def format_candidates(candidates: Sequence[Candidate]) -> str:
    """The plans that were measured on the engine, best first."""
    rows = [["plan", "weights", "predicted", "on the engine"]]
    for number, one in enumerate(candidates, 1):
        figures = (one.predicted_kl, one.served_kl)
        rows.append([str(number), megabytes(one.weight_bytes), *map(kl_text, figures)])
    return align(rows) + "\nMean KL, nats per token, on the conversations that plans are chosen on."


def format_sensitivity(found: Sensitivity) -> str:
    """The rows as a table, the most sensitive groups first."""
    worst: dict[str, float] = {}
    for row in found.rows:
        worst[row.group] = max(worst.get(row.group, 0.0), row.loss)
    rows = sorted(found.rows, key=lambda row: (-worst[row.group], row.group, row.bytes))
    table = [["group", "scheme", "method", "bytes", "SQNR dB", "Fisher", "loss"]]
    for row in rows:
        figures = [f"{row.sqnr_db:.1f}", f"{1000 * row.fisher:.3f}", f"{1000 * row.loss:.3f}"]
        table.append([row.group, row.scheme, row.method, str(row.bytes), *figures])
    uniform = ", ".join(f"{name} {kl_text(kl)}" for name, kl in found.uniform.items())
    note = f"\nUniform variants on the engine: {uniform}." if uniform else ""
    return align(table) + "\nFisher and loss in 1/1000 nat per token; the loss is scaled by scheme." + note
