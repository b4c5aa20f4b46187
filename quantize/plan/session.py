"""From a checkpoint and calibration data to the best plan within a budget, step by step and resumable.

planning_dir/<key>/    the key is of the checkpoint, the calibration data, the target and how parts are made
  parts/               parts of variants (:mod:`quantize.make.parts`)
  rows.jsonl           sensitivity, a line per finished row; rows-511.jsonl where what plans are chosen on was
                       cut at so many tokens, for an engine with a short context
  served/              what was measured on the engine; the same
  sensitivity.json     the whole analysis
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from quantize.core.checkpoint import Checkpoint, base_sha256
from quantize.core.files import write_whole
from quantize.core.methods import SMOOTH, in_order, independent, parse_method
from quantize.core.modules import Modules, read_modules
from quantize.core.plan import Plan
from quantize.core.schemes import BF16_BYTES, kv_scheme, scheme
from quantize.core.targets import Target
from quantize.cost import PASS
from quantize.evaluate.bench import Bench, Span
from quantize.make.blocks import best_device
from quantize.make.calibration import MORE, CalibrationSet
from quantize.make.compress import QuantizeError
from quantize.make.parts import NUMERICS, PartStore
from quantize.make.rate import machine_rates
from quantize.make.streaming import streams
from quantize.plan.planner import Candidate, PlanError, Planner
from quantize.plan.search import search
from quantize.plan.sensitivity import Sensitivity, analyse, calibrated
from quantize.plan.served import KEPT, Choice, NotFiniteError, ServedKl, plan_of
from quantize.plan.simulated import SimulatedModel
from quantize.plan.tune import SEQUENCES, STEPS, TOGETHER, Tuned, labelled, tune, write_tuned

METHODS = ("smooth+imatrix+gptq",)
"""Whose parts below 8 bits a plan may mix, unless told otherwise; all parts are of the smoothed model."""
CHOOSING_SHARE = 4
"""One conversation in so many is kept from calibration, and plans are chosen on it."""
MIN_CHOOSING, MOST_CHOOSING = 8, 40
"""Every plan is measured on these; more of them take its time, and calibration's text."""
LOSS_ROUNDS = 6
NEAR = 2.0
"""Times a wanted loss from which making a plan's groups in order may get there."""
DEFAULT_BITS = 4.5
"""Bits per weight of the linear modules, where no budget is given."""
TRIES = 12
"""Plans that are measured on the engine, unless told otherwise."""
SHORTLIST = (
    *("w4a16-g128", "w4a16-g64", "w4a16-g64-asym", "w4a16-g32", "w4a16-g32-asym", "w4a16-g16-asym"),
    *("w8a8-r7", "w8a8", "fp8-dynamic", "w8a16-g128"),
)
"""Schemes that are planned with where the target has them; each costs a quantization of the whole model."""
BETTER = {"w4a16-g32": "w4a16-g32-asym"}
"""Schemes that are not looked at where a group may have the other: mixtures of that and smaller ones lose
less at the same bytes (docs/benchmarks/quantization.md)."""


def shortlist(where: Target, modules: Modules, tensor_parallel: int = 1) -> tuple[str, ...]:
    """The schemes of ``SHORTLIST`` that at least one group can have on the target, without a better one."""
    legal = [set(where.candidates(group, tensor_parallel)) for group in modules]
    return tuple(
        name for name in SHORTLIST if any(name in mine and BETTER.get(name) not in mine for mine in legal)
    )


def with_served_head(
    where: Target, modules: Modules, schemes: Sequence[str], tensor_parallel: int = 1
) -> Modules:
    """The modules that a planner has choices for: the head too, where it has a matrix of its own and the
    target serves that in one of ``schemes``."""
    head = modules.head
    if head is None or not set(schemes) & set(where.candidates(head, tensor_parallel)):
        return modules
    return modules.with_head()


def choices_on(
    where: Target,
    modules: Modules,
    schemes: Sequence[str],
    methods: Sequence[str] = METHODS,
    tensor_parallel: int = 1,
) -> dict[str, Sequence[Choice]]:
    """What a planner may give each group: ``schemes`` that are legal, those below 8 bits by ``methods``,
    others by ranges alone, after the same transforms. Raises PlanError where there is none."""
    for method in methods:
        if parse_method(method).asymmetric:
            raise PlanError(
                f"--methods {method}: is made when a plan is known, and is tried on the best one; plans mix "
                f"parts that do not depend on each other: {independent(method)}"
            )
    plain = "+".join((*parse_method(methods[0]).transforms, "rtn"))
    found: dict[str, Sequence[Choice]] = {}
    for group in modules:
        legal = where.candidates(group, tensor_parallel)
        found[group.name] = [
            (name, method)
            for name in schemes
            if name in legal
            for method in (methods if scheme(name).weight_bits < 8 else (plain,))
            if SMOOTH not in parse_method(method).transforms or streams((name, method))
        ]
    if not any(found.values()):
        raise PlanError(f"{where.name} loads no quantized scheme for any module of this model")
    return found


class PlanningSession:
    """The parts, the analysis and the search for one checkpoint on one target.

    ``modules`` is what plans are of, ``blocks`` the same without the head.
    """

    def __init__(
        self,
        directory: Path,
        checkpoint: Checkpoint,
        calibration: CalibrationSet,
        where: Target,
        methods: Sequence[str] = METHODS,
        schemes: Sequence[str] | None = None,
        tensor_parallel: int = 1,
        choosing: Sequence[Span] | None = None,
        context: int | None = None,
    ) -> None:
        """``context``: tokens that the engine takes on which plans are measured, no more than the model does;
        conversations that plans are chosen on are cut so that it takes them."""
        self.checkpoint, self.target, self.methods = checkpoint, where, tuple(methods)
        self.blocks = read_modules(checkpoint)
        self.schemes = tuple(schemes or shortlist(where, self.blocks, tensor_parallel))
        self.modules = with_served_head(where, self.blocks, self.schemes, tensor_parallel)
        calibrating = calibration
        if choosing is None:
            calibrating, choosing = split(calibration)
        decides = (
            base_sha256(checkpoint),
            calibration.description.sha256,
            where.name,
            len(choosing),
            NUMERICS,
        )
        self.directory = directory / hashlib.sha256(repr(decides).encode()).hexdigest()[:12]
        self.calibration, self.choosing = calibrating, choosing
        # An engine refuses prompts of its whole context: they leave no room for an answer.
        most = min(context or checkpoint.max_model_len, checkpoint.max_model_len) - 1
        self._cut = ""
        if any(len(tokens) > most for tokens, _ in choosing):
            self._cut = f"-{most}"
            self.choosing = [(tokens[:most], start) for tokens, start in choosing]
        self.parts = PartStore(self.directory / "parts", checkpoint, self.modules, calibrating)
        self._ranks = tensor_parallel
        self._simulated: SimulatedModel | None = None

    @property
    def simulated(self) -> SimulatedModel:
        """The model in torch, loaded when first needed."""
        if self._simulated is None:
            self._simulated = SimulatedModel(self.parts, self.choosing)
        return self._simulated

    def choices(self) -> dict[str, Sequence[Choice]]:
        """What the planner may give each group: legal schemes, each by the methods that suit it."""
        return choices_on(self.target, self.modules, self.schemes, self.methods, self._ranks)

    def least_bytes(self, kv_tokens: int = 0, kv: Sequence[str] = ("auto",)) -> int:
        """The smallest budget that a plan can be found for; known before any work."""
        sizes = {group.name: group.weights * BF16_BYTES for group in self.modules}
        for group in self.modules:
            for name, _ in self.choices()[group.name]:
                sizes[group.name] = min(sizes[group.name], group.stored_bytes(scheme(name)))
        cache = min(kv_tokens * self._kv_bytes(name) + self._kv_scale_bytes(name) for name in kv)
        return self.modules.other_bytes + sum(sizes.values()) + cache

    def sensitivity(self, bench: Bench) -> Sensitivity:
        """The whole analysis; what was finished before is kept."""
        rows = analyse(self.parts, self.choices(), self.choosing, self.directory / f"rows{self._cut}.jsonl")
        found = calibrated(rows, self._served(bench))
        write_whole(self.directory / "sensitivity.json", found.model_dump_json(indent=1))
        return found

    def planner(self, bench: Bench) -> Planner:
        """The planner over that analysis."""
        return Planner(self.modules, self.sensitivity(bench))

    def within(
        self,
        bench: Bench,
        budget: int,
        kv_tokens: int = 0,
        kv: Sequence[str] = ("auto",),
        tries: int = TRIES,
    ) -> list[Candidate]:
        """Plans of at most ``budget`` bytes, weights and ``kv_tokens`` tokens of cache; best first.

        Raises PlanError with the least possible budget when it is below that.
        """
        planner = self.planner(bench)
        served = self._served(bench)
        losses: dict[str, float] = {}
        per_token = {name: self._kv_bytes(name) for name in kv}
        fitting: dict[str, float] = {}
        errors = []
        for name in kv:
            left = budget - kv_tokens * per_token[name] - self._kv_scale_bytes(name)
            try:
                losses[name] = self._kv_loss(served, name)
                fitting[name] = planner.predicted(planner.within(left)) + losses[name]
            except PlanError as error:
                errors.append(f"with KV cache {name}: {error}")
        if not fitting:
            raise PlanError("; ".join(errors))
        chosen = min(fitting, key=lambda name: fitting[name])
        left = budget - kv_tokens * per_token[chosen] - self._kv_scale_bytes(chosen)
        found = search(planner, served, left, tries=tries)
        found = sorted([*found, *self._in_order(found[0], served)], key=lambda one: one.by_kl)
        return self._with_kv(found, chosen, losses[chosen], served)

    def for_loss(self, bench: Bench, loss: float) -> Candidate:
        """The fewest bytes whose KL, measured on the engine, is at most ``loss`` nats per token."""
        planner = self.planner(bench)
        served = self._served(bench)
        wanted = loss
        for _ in range(LOSS_ROUNDS):
            choices = planner.for_loss(wanted)
            try:
                measured = served(choices)
            except NotFiniteError:
                wanted /= 2  # that overflows, another plan need not
                continue
            found = Candidate(
                plan=planner.plan(choices),
                weight_bytes=planner.weight_bytes(choices),
                predicted_kl=planner.predicted(choices),
                served_kl=measured,
            )
            if measured <= loss:
                return found
            near = measured <= NEAR * loss
            for better in self._in_order(found, served) if near else ():
                measured = min(measured, better.served_kl or measured)
                if measured <= loss:
                    return better
            wanted *= min(0.95, loss / measured)
        raise PlanError(
            f"no plan was measured at a loss of {loss:g} or less after {LOSS_ROUNDS} attempts; raise --loss"
        )

    def make(self, plan: Plan, out: Path, steps: int = STEPS[0]) -> Tuned | None:
        """Write the checkpoint of ``plan`` into ``out``; a plan that says so is tuned, in so many steps."""
        self.parts.assemble(plan, out)
        if not plan.tuned:
            return None
        tuned = tune(self.simulated, plan, out, self._tuned_on(), steps)
        write_tuned(tuned, out)
        self._simulated = None  # an engine may need its memory
        return tuned

    def tuning_cost(self, steps: int) -> tuple[int, float]:
        """Bytes of memory, of the accelerator where there is one, and seconds that tuning takes: the model in
        32 bits with the gradients of a pass, the reference's log-probabilities of the tokens; forward and
        backward passes of every step, matrix products and what goes on between them, all being idle."""
        weights = sum(group.weights for group in self.modules)
        all_weights = weights + self.modules.other_bytes // BF16_BYTES
        sequences = self._tuned_on()
        tokens = sum(map(len, sequences))
        of_one = tokens / len(sequences)
        vocabulary = int(self.checkpoint.text_config["vocab_size"])
        labels = tokens + sum(len(chosen) for chosen, _ in self.choosing)
        memory = 4 * (3 * all_weights + int(labels + 3 * TOGETHER * of_one) * vocabulary)
        operations = 6.0 * all_weights * SEQUENCES * of_one * steps + 2.0 * all_weights * tokens
        rates = machine_rates()
        return memory, PASS * operations / (rates.wide * (1 if rates.accelerator else rates.cores))

    def _tuned_on(self) -> list[list[int]]:
        """Conversations of calibration, as many as the reference's log-probabilities have room for."""
        vocabulary = int(self.checkpoint.text_config["vocab_size"])
        return labelled(self.calibration.sequences, vocabulary, best_device().type != "cpu")

    def _served(self, bench: Bench) -> ServedKl:
        return ServedKl(self.parts, bench, self.choosing, self.directory / f"served{self._cut}")

    def _kv_loss(self, served: ServedKl, kv: str) -> float:
        return 0.0 if kv == "auto" else served({group.name: KEPT for group in self.modules}, kv)

    def _kv_bytes(self, kv: str) -> int:
        config = self.checkpoint.text_config
        heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        return kv_scheme(kv).bytes_per_token(
            config["num_hidden_layers"], int(heads), self.checkpoint.head_dim
        )

    def _kv_scale_bytes(self, kv: str) -> int:
        return 4 * self.modules.layers if kv_scheme(kv).calibrated else 0

    def _in_order(self, candidate: Candidate, served: ServedKl) -> list[Candidate]:
        """The plan with its groups made one behind the other, measured; none where that changes nothing, or
        the engine answers it with numbers that are not finite."""
        plan = made_in_order(candidate.plan)
        if plan == candidate.plan:
            return []
        choices = {name: (one, plan.method_of(name)) for name, one in plan.groups.items()}
        try:
            changed = {"plan": plan_of(choices, plan.kv), "served_kl": served(choices, plan.kv)}
        except NotFiniteError:
            return []
        return [candidate.model_copy(update=changed)]

    def _with_kv(
        self, candidates: Sequence[Candidate], kv: str, loss: float, served: ServedKl
    ) -> list[Candidate]:
        """The same with a scheme of the KV cache, measured; those left out that overflow then. Raises
        PlanError where all do."""
        if kv == "auto":
            return list(candidates)
        found, error = list[Candidate](), PlanError(f"no plan for a KV cache {kv}")
        for candidate in candidates:
            plan = candidate.plan.model_copy(update={"kv": kv})
            choices = {
                group.name: (plan.groups[group.name], plan.method_of(group.name)) for group in self.modules
            }
            try:
                kl = served(choices, kv)
            except NotFiniteError as its:
                error = its
                continue
            size, predicted = plan.weight_bytes(self.modules), candidate.predicted_kl + loss
            found.append(Candidate(plan=plan, weight_bytes=size, predicted_kl=predicted, served_kl=kl))
        if not found:
            raise error
        return found


def made_in_order(plan: Plan) -> Plan:
    """The same with what is by ``gptq`` made one group behind the other."""
    methods = {name: in_order(method) for name, method in plan.methods.items()}
    return plan.model_copy(update={"method": in_order(plan.method), "methods": methods})


def choosing_places(count: int) -> range:
    """Which of so many conversations are kept from calibration."""
    return range(0, count, max(CHOOSING_SHARE, -(-count // MOST_CHOOSING)))


def split(calibration: CalibrationSet) -> tuple[CalibrationSet, list[Span]]:
    """Keep a quarter of the conversations from calibration, but not many, to choose plans on. Raises
    QuantizeError."""
    everything = calibration.sequences
    places = choosing_places(len(everything))
    chosen = [(everything[number], 1) for number in places if len(everything[number]) > 1]
    left = [sequence for number, sequence in enumerate(everything) if number not in places]
    if len(chosen) < MIN_CHOOSING:
        raise QuantizeError(
            f"{calibration.description.source} has {len(everything)} conversations; planning needs "
            f"{CHOOSING_SHARE * MIN_CHOOSING} or more, a quarter of which plans are chosen on: {MORE}"
        )
    described = calibration.description.model_copy(
        update={"samples": len(left), "tokens": sum(len(sequence) for sequence in left)}
    )
    return CalibrationSet(left, described), list(chosen)
