"""The knapsack is exact, budgets are kept, and impossible wishes are said with the least that is possible."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.core.modules import Group, Linear, Modules
from quantize.core.schemes import scheme
from quantize.plan.planner import Choices, Option, PlanError, Planner, fewest_bytes, front, least_loss
from quantize.plan.search import search
from quantize.plan.sensitivity import Row, Sensitivity
from quantize.plan.served import NotFiniteError, plan_of

OPTIONS = st.lists(
    st.builds(Option, name=st.just("x"), bytes=st.integers(1, 40), loss=st.floats(0, 10, allow_nan=False)),
    min_size=1,
    max_size=4,
)
CLASSES = st.lists(OPTIONS, min_size=1, max_size=5)


def every(classes: list[list[Option]]) -> list[tuple[int, float]]:
    return [
        (sum(o.bytes for o in picked), sum(o.loss for o in picked)) for picked in itertools.product(*classes)
    ]


@settings(max_examples=200, deadline=None)
@given(CLASSES, st.integers(1, 200))
def test_the_least_loss_within_a_budget_is_what_trying_everything_finds(
    classes: list[list[Option]], budget: int
) -> None:
    fitting = [loss for size, loss in every(classes) if size <= budget]
    if not fitting:
        with pytest.raises(PlanError, match="below the least possible"):
            least_loss(classes, budget)
        return
    picks = least_loss(classes, budget)
    chosen = [options[pick] for options, pick in zip(classes, picks, strict=True)]
    assert sum(option.bytes for option in chosen) <= budget
    assert sum(option.loss for option in chosen) == pytest.approx(min(fitting))


@settings(max_examples=200, deadline=None)
@given(CLASSES, st.floats(0, 50, allow_nan=False))
def test_the_fewest_bytes_for_a_loss_are_what_trying_everything_finds(
    classes: list[list[Option]], loss: float
) -> None:
    fitting = [size for size, lost in every(classes) if lost <= loss - 1e-9]
    if not fitting:
        return
    chosen = [options[pick] for options, pick in zip(classes, fewest_bytes(classes, loss), strict=True)]
    assert sum(option.bytes for option in chosen) <= min(fitting)
    assert sum(option.loss for option in chosen) <= loss + 1e-9


@settings(max_examples=100, deadline=None)
@given(CLASSES)
def test_no_point_of_the_front_is_beaten_by_another(classes: list[list[Option]]) -> None:
    found = front(classes)
    points = list(zip(found.bytes.tolist(), found.loss.tolist(), strict=True))
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(points))
    for state, (size, loss) in enumerate(points):
        chosen = [options[pick] for options, pick in zip(classes, found.picks(state), strict=True)]
        assert sum(option.bytes for option in chosen) == size
        assert sum(option.loss for option in chosen) == pytest.approx(loss)


SCHEMES = ("w4a16-g128", "w4a16-g32", "w8a8")


def planner_of(layers: int = 3, losses: tuple[float, float, float] = (1.0, 0.7, 0.02)) -> Planner:
    """A model of three kinds of groups whose first layer loses most; ``losses`` are by scheme."""
    kinds = {"self_attn.qkv_proj": 512, "mlp.gate_up_proj": 1536, "mlp.down_proj": 256}
    groups = tuple(
        Group(f"model.layers.{layer}.{kind}", kind, layer, (Linear(f"model.layers.{layer}.{kind}", n, 256),))
        for layer in range(layers)
        for kind, n in kinds.items()
    )
    rows = tuple(
        Row(
            group=group.name,
            kind=group.kind,
            layer=group.layer,
            scheme=name,
            method="gptq",
            bytes=group.stored_bytes(scheme(name)),
            sqnr_db=20.0,
            fisher=lost / (1 + group.layer) / (1 + number),
        )
        for number, group in enumerate(groups)
        for name, lost in zip(SCHEMES, losses, strict=True)
    )
    return Planner(Modules(groups, other_bytes=1000), Sensitivity(rows=rows, tokens=1))


@settings(max_examples=60, deadline=None)
@given(st.floats(4.2, 16.0))
def test_a_plan_stays_within_its_budget_and_gets_better_with_it(bits: float) -> None:
    planner = planner_of()
    weights = sum(group.weights for group in planner.modules)
    budget = 1000 + int(bits * weights / 8)
    choices = planner.within(budget)
    assert planner.weight_bytes(choices) <= budget
    assert planner.weight_bytes(choices) == plan_of(choices).weight_bytes(planner.modules)
    wider = planner.within(budget + 50_000)
    assert planner.predicted(wider) <= planner.predicted(choices)


def test_a_budget_below_the_least_says_the_least() -> None:
    planner = planner_of()
    least = planner.weight_bytes(planner.smallest())
    assert planner.weight_bytes(planner.within(least)) == least
    with pytest.raises(PlanError, match=f"below the least possible, {least} bytes, of which 1000"):
        planner.within(least - 1)


class Served:
    """Losses as an engine would measure them: two groups at 4 bits at once hurt more than the sum says."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self.bad = [group.name for group in planner.modules][:2]
        self.asked: list[dict[str, tuple[str, str]]] = []

    def __call__(self, choices: dict[str, tuple[str, str]], kv: str = "auto") -> float:
        self.asked.append(dict(choices))
        return self.planner.predicted(choices) + (1.0 if self.hurts(choices) else 0.0)

    def hurts(self, choices: Choices) -> bool:
        return all(choices[name][0].startswith("w4") for name in self.bad)


def test_the_search_stays_in_the_budget_and_finds_what_adding_up_losses_misses() -> None:
    planner = planner_of()
    served = Served(planner)
    weights = sum(group.weights for group in planner.modules)
    budget = 1000 + int(5.0 * weights / 8)
    first = planner.within(budget)
    found = search(planner, served, budget, tries=20)  # type: ignore[arg-type]
    assert all(planner.weight_bytes(choices) <= budget for choices in served.asked)
    assert len(served.asked) == len({repr(sorted(choices.items())) for choices in served.asked}) <= 20
    assert served.asked[0] == first, "what predictions alone give is always measured"
    kls = [candidate.served_kl or 0.0 for candidate in found]
    assert kls == sorted(kls)
    assert found[0].served_kl is not None
    assert found[0].served_kl < planner.predicted(first) + 1.0


def test_factors_of_groups_move_bytes_to_them() -> None:
    planner = planner_of()
    weights = sum(group.weights for group in planner.modules)
    budget = 1000 + int(5.0 * weights / 8)
    last = planner.modules.groups[-1].name
    assert planner.within(budget)[last][0] != "bf16"
    assert planner.within(budget, {last: 1000.0})[last][0] == "bf16"


class Overflowing(Served):
    """No numbers where both have 4 bits."""

    def __call__(self, choices: dict[str, tuple[str, str]], kv: str = "auto") -> float:
        kl = super().__call__(choices, kv)
        if self.hurts(choices):
            raise NotFiniteError("the engine answers it with numbers that are not finite")
        return kl


def test_plans_that_the_engine_answers_with_no_numbers_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    planner = planner_of()
    budget = 1000 + int(5.0 * sum(group.weights for group in planner.modules) / 8)
    served = Overflowing(planner)
    served.bad = [name for name, (one, _) in planner.within(budget).items() if one.startswith("w4")]
    found = search(planner, served, budget, tries=20)  # type: ignore[arg-type]
    assert 0 < len(found) < len(served.asked) <= 20
    plans = [{name: (one, "gptq") for name, one in candidate.plan.groups.items()} for candidate in found]
    assert not any(map(served.hurts, plans))
    assert "a plan is left out: the engine answers it with numbers" in capsys.readouterr().err
    with pytest.raises(PlanError, match="the engine answers no plan with finite numbers"):
        search(planner, served, budget, tries=1)  # type: ignore[arg-type]


def test_a_choice_without_a_known_loss_is_none() -> None:
    planner = planner_of(losses=(math.nan, 0.7, 0.02))
    for group in planner.modules:
        assert {name for name, _ in planner.choices_of(group.name)} == {*SCHEMES[1:], "bf16"}
