"""What can never pass is said before engines are started, with the number of items that could."""

import pytest

from quantize.evaluate.pairing import count_items
from quantize.evaluate.tasks import Item
from quantize.gate.budget import QualityBudget
from quantize.gate.evidence import ItemCounts, hopeless
from quantize.gate.paired import ALPHA, fewest_items, flips_p
from quantize.gate.shares import fewest_answers, share_p


def reasons(counts: ItemCounts, budget: QualityBudget, variants: int = 1) -> tuple[str, ...]:
    return hopeless({"core": counts}, {"core": budget}, variants).get("core", ())


def test_thirty_items_never_show_a_drop_of_two_percent() -> None:
    (why,) = reasons(ItemCounts(task=30), QualityBudget(max_accuracy_drop=0.02))
    assert why == ("max_accuracy_drop: faultless answers to 30 items do not pass; at least 149 are needed")
    assert reasons(ItemCounts(task=149), QualityBudget(max_accuracy_drop=0.02)) == ()


def test_gates_that_are_judged_together_need_more() -> None:
    budget = QualityBudget(max_accuracy_drop=0.02)
    (why,) = reasons(ItemCounts(task=149), budget, variants=3)
    assert "among 3 gates; at least 219 are needed" in why
    assert reasons(ItemCounts(task=219), budget, variants=3) == ()


def test_a_rich_role_does_not_make_a_poor_one_hopeless() -> None:
    """Holm's last step is the whole 5 %: a role is hopeless only if it would fail after all others passed."""
    items = {"poor": ItemCounts(task=160), "rich": ItemCounts(task=2000)}
    budgets = dict.fromkeys(items, QualityBudget(max_accuracy_drop=0.02))
    assert hopeless(items, budgets, [8]) == {}
    assert list(hopeless(items, budgets, [8, 4])) == ["poor"]


def test_every_limit_says_what_it_lacks() -> None:
    budget = QualityBudget(
        max_accuracy_drop=None,
        min_accuracy=0.9,
        max_grounded_drop=0.05,
        min_valid_json=0.95,
        max_long_context_loss=0.01,
    )
    found = reasons(ItemCounts(task=12, structured=40, long_context=3), budget)
    assert [why.split(":")[0] for why in found] == [
        "max_grounded_drop",
        "min_accuracy",
        "min_valid_json",
        "max_kl",
        "max_long_context_loss",
    ]
    assert "0 items with grounds" in found[0]
    assert "at least 59 are needed" in found[2]
    assert "3 long_context items" in found[4]
    assert "at least 20 are needed" in found[4]


def test_what_no_number_of_items_shows_is_said_so() -> None:
    (why,) = reasons(ItemCounts(task=500), QualityBudget(max_accuracy_drop=0.0))
    assert why.endswith("and no number would; change the limit, or set it to null")
    (why,) = reasons(ItemCounts(task=500, structured=500), QualityBudget(min_valid_json=1.0))
    assert why.startswith("min_valid_json: faultless answers to 500")


def test_what_policy_refuses_needs_no_items() -> None:
    assert reasons(ItemCounts(task=5), QualityBudget(min_weight_bits=16)) == ()
    assert reasons(ItemCounts(task=5), QualityBudget(min_weight_bits=8)) != ()
    assert hopeless({"other": ItemCounts(task=5)}, {}, [4]) == {}


@pytest.mark.parametrize("margin", [0.01, 0.02, 0.05, 0.1])
@pytest.mark.parametrize("level", [ALPHA, ALPHA / 12])
def test_the_fewest_items_are_the_fewest(margin: float, level: float) -> None:
    fewest = fewest_items(margin, level)
    assert fewest is not None
    assert flips_p(fewest, 0, 0, margin) <= level < flips_p(fewest - 1, 0, 0, margin)
    answers = fewest_answers(1 - margin, level)
    assert answers is not None
    assert share_p(answers, answers, 1 - margin) <= level < share_p(answers - 1, answers - 1, 1 - margin)


def test_items_are_counted_by_what_they_can_show() -> None:
    asked = [{"role": "user", "content": "when?"}]
    items = [
        Item.model_validate({"messages": asked, "expected": "May"}),
        Item.model_validate({"messages": asked, "expected": "May", "grounds": ["In May."]}),
        Item.model_validate({"messages": asked, "expected": "{}", "json_schema": {"type": "object"}}),
        Item.model_validate({"messages": asked, "expected": "May", "suite": "long_context"}),
    ]
    assert count_items(items) == ItemCounts(task=3, grounded=1, structured=1, long_context=1)
