"""Items asked otherwise: the same change every time, the right answer untouched, and the drop paired."""

from __future__ import annotations

from pathlib import Path

import pytest
from aiohttp import web

from quantize.evaluate.client import EngineClient, EngineError
from quantize.evaluate.journal import Journal
from quantize.evaluate.perturb import KINDS, LONG, perturbed
from quantize.evaluate.robustness import (
    PLAIN,
    ask_all,
    asked,
    chosen_items,
    compare,
    is_gibberish,
    mean_interval,
)
from quantize.evaluate.tasks import Item
from tests.quantize.scripted_engine import ScriptedEngine
from tests.quantize.test_measure import ask

TEXT = "Please transfer 250 euros to account NL91ABNA0417164300 before the 3rd of May, whatever it costs."


def content(item: Item) -> str:
    return item.messages[-1]["content"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_is_the_same_every_time_and_another_with_another_seed(kind: str) -> None:
    item = ask(TEXT, "done")
    assert perturbed(item, kind) == perturbed(item, kind)  # type: ignore[arg-type]
    seeds = {content(perturbed(item, kind, seed)) for seed in range(12)}  # type: ignore[arg-type]
    assert len(seeds) > 1
    assert TEXT not in seeds


def test_typos_leave_numbers_and_identifiers_alone() -> None:
    for seed in range(50):
        text = content(perturbed(ask(TEXT, "done"), "typos", seed))
        assert text != TEXT
        assert {"250", "NL91ABNA0417164300", "3rd"} <= set(text.replace(",", "").split())
        assert abs(len(text) - len(TEXT)) <= 3


def test_noise_keeps_every_letter() -> None:
    for seed in range(20):
        text = content(perturbed(ask(TEXT, "done"), "noise", seed))
        letters = [letter.lower() for letter in text if letter.isalnum()]
        assert letters == [letter.lower() for letter in TEXT if letter.isalnum()]


def test_another_domain_stands_before_what_is_asked() -> None:
    text = content(perturbed(ask(TEXT, "done"), "domain"))
    assert text.endswith(f"\n\n{TEXT}")
    assert len(text) > len(TEXT) + 100


def test_only_the_last_message_of_the_user_changes() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Is the invoice overdue already?"},
        {"role": "assistant", "content": "Which one?"},
        {"role": "user", "content": TEXT},
    ]
    item = Item.model_validate({"messages": messages, "expected": "no"})
    for kind in KINDS:
        changed = perturbed(item, kind)
        assert changed.messages[:3] == item.messages[:3]
        assert changed.model_copy(update={"messages": item.messages}) == item


def test_empty_is_empty_and_extreme_is_bounded() -> None:
    for seed in range(20):
        assert len(content(perturbed(ask(TEXT, "done"), "empty", seed)).strip()) <= 1
        assert len(content(perturbed(ask(TEXT, "done"), "extreme", seed))) <= 2 * LONG


def test_gibberish_is_known() -> None:
    assert is_gibberish(None)
    assert is_gibberish(" \n")
    assert is_gibberish("the " * 40)
    assert is_gibberish("and so it goes on and on, " * 40)
    assert not is_gibberish("transfer")
    assert not is_gibberish("The due date of invoice 17 is 3 May, and it comes to 250 euros.")


def test_items_are_taken_evenly() -> None:
    items = [ask(f"question {i}", str(i)) for i in range(100)]
    assert [item.expected for item in chosen_items(items, 4)] == ["0", "25", "50", "75"]
    assert chosen_items(items, 1000) == items


def test_an_interval_holds_its_mean_and_has_a_width_where_all_agree() -> None:
    mean, (low, high) = mean_interval([0] * 60)
    assert mean == 0
    assert low == pytest.approx(-high)
    assert 0.03 < high < 0.06  # three in sixty are not ruled out by sixty without any
    mean, (low, high) = mean_interval([0, 1] * 100)
    assert low < mean == 0.5 < high
    assert high - low < 0.16


def robust(text: str) -> str:
    """Whatever surrounds it."""
    return "yes"


def brittle(text: str) -> str:
    """Right as long as nothing has changed."""
    return "yes" if text.startswith("question ") and text.endswith("?") else "no"


async def answers(engine: ScriptedEngine, path: Path, kinds: list[str]) -> tuple[dict[str, list[Item]], dict]:  # type: ignore[type-arg]
    tasks = {"core": [ask(f"question about invoice number {i} ?", "yes") for i in range(30)]}
    what = asked(tasks, kinds, 0)  # type: ignore[arg-type]
    async with engine.serve() as url, EngineClient(url, "assistant") as client:
        return tasks, dict(await ask_all(client, what, "int8", Journal(path)))


async def test_what_a_variant_loses_more_than_the_reference_is_told_with_an_interval(tmp_path: Path) -> None:
    kinds = ["domain", "empty"]
    tasks, reference = await answers(ScriptedEngine(robust), tmp_path / "a", kinds)
    _, variant = await answers(ScriptedEngine(brittle), tmp_path / "b", kinds)
    same = compare(tasks, kinds, "bf16", reference, reference)  # type: ignore[arg-type]
    assert same[0].more_lost == 0
    assert same[0].interval is not None
    assert same[0].interval[0] < 0 < same[0].interval[1]
    domain, empty = compare(tasks, kinds, "int8", reference, variant)  # type: ignore[arg-type]
    assert (domain.plain, domain.reference_plain) == (30, 30)
    assert domain.changed is not None
    assert (domain.changed.good, domain.changed.reference_good, domain.changed.flips_to_bad) == (0, 30, 30)
    assert domain.more_lost == 1
    assert domain.changed.mcnemar_p < 1e-6
    assert (empty.answered, empty.same_answer, empty.changed) == (30, 0, None)


def test_without_labels_the_references_answers_to_the_same_questions_are_what_is_right() -> None:
    items = [ask(f"question {i}", "its answer, once", check="reference") for i in range(4)]
    theirs = {(how, "core", i): f"{how} answer {i}" for how in (PLAIN, "typos") for i in range(4)}
    ours = theirs | {("typos", "core", i): "something else" for i in range(3)}
    (row,) = compare({"core": items}, ["typos"], "int8", theirs, ours)
    assert (row.plain, row.reference_plain) == (4, 4)
    assert row.changed is not None
    assert (row.changed.good, row.changed.reference_good) == (1, 4)
    assert row.more_lost == 0.75


async def test_what_was_asked_is_not_asked_again(tmp_path: Path) -> None:
    engine = ScriptedEngine(robust)
    await answers(engine, tmp_path / "a", ["typos"])
    assert len(engine.asked) == 60
    again = ScriptedEngine(robust)
    _, found = await answers(again, tmp_path / "a", ["typos"])
    assert again.asked == []
    assert len(found) == 60
    assert {kind for kind, _, _ in found} == {PLAIN, "typos"}


class Strict(ScriptedEngine):
    """Refuses an empty message, as some chat templates do."""

    status = 400

    async def _chat(self, request: web.Request) -> web.Response:
        if not (await request.json())["messages"][-1]["content"].strip(" .\n"):
            return web.Response(status=self.status, text="nothing was asked")
        return await super()._chat(request)


async def test_a_refusal_is_an_answer_that_did_not_come(tmp_path: Path) -> None:
    tasks, found = await answers(Strict(robust), tmp_path / "a", ["empty"])
    (row,) = compare(tasks, ["empty"], "int8", found, found)
    assert (row.items, row.answered, row.same_answer) == (30, 0, 30)


async def test_an_engine_that_is_unwell_is_no_refusal(tmp_path: Path) -> None:
    engine = Strict(robust)
    engine.status = 500
    with pytest.raises(ExceptionGroup) as raised:
        await answers(engine, tmp_path / "a", ["empty"])
    assert raised.group_contains(EngineError, match="500")
