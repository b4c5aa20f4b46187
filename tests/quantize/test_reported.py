"""What is reported beside the gates, against values that are known by hand or by their definition."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from quantize.evaluate import reported as module
from quantize.evaluate.reported import (
    are_texts,
    beside,
    js_distance,
    text_scores,
    token_f1,
    wasserstein,
)
from quantize.evaluate.tasks import Item
from quantize.gate.budget import QualityBudget
from quantize.gate.limit import NOT_FINITE
from quantize.gate.limits import limit_tests
from quantize.report.reported import reported_rows
from tests.quantize.scripted_engine import ScriptedEngine
from tests.quantize.test_measure import ask, echo, evaluation
from tests.quantize.test_report import make_card


def test_f1_counts_words_as_often_as_they_stand() -> None:
    assert token_f1("the due date is 3 May", "the due date is 3 May") == 1
    assert token_f1("the cat sat", "a dog ran") == 0
    # 2 of 4 words right, of 3 wanted: 2 * 2 / (4 + 3).
    assert token_f1("the cat sat", "the the cat ran") == pytest.approx(4 / 7)
    assert token_f1("", "") == 1
    assert token_f1("something", "") == 0


def test_rouge_and_bleu_are_the_libraries_own() -> None:
    if importlib.util.find_spec("rouge_score") is None:
        pytest.skip("rouge-score is not installed")
    scores = text_scores()
    assert list(scores) == ["rouge1", "rouge2", "rougeL", "f1"]
    assert scores["rouge1"]("the cat sat down", "the cat sat") == pytest.approx(6 / 7)
    assert scores["rouge2"]("the cat sat down", "the cat sat") == pytest.approx(4 / 5)
    assert scores["rougeL"]("the cat sat down", "down the cat") == pytest.approx(4 / 7)


@pytest.mark.parametrize(
    "text",
    [
        "Счёт оплачен до пятого мая",
        "चालान का भुगतान हो गया",
        "الفاتورة مدفوعة حتى مايو",
        "Überweisung fällig, café",
    ],
)
def test_rouge_knows_letters_of_every_script(text: str) -> None:
    if importlib.util.find_spec("rouge_score") is None:
        pytest.skip("rouge-score is not installed")
    scores = text_scores()
    less = " ".join(text.split()[:-1])
    count = len(text.split())
    assert scores["rouge1"](text, text) == scores["rougeL"](text, text) == 1
    assert scores["rouge1"](text, less) == pytest.approx(2 * (count - 1) / (2 * count - 1))


def test_without_the_libraries_f1_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    assert list(text_scores()) == ["f1"]


def test_labels_are_no_texts() -> None:
    assert not are_texts([ask("which?", "transfer")])
    assert are_texts([ask("when?", "It is due on 3 May.")])
    assert not are_texts([Item.model_validate({**ask("what?", '{"a": 1}').model_dump(), "check": "json"})])


def test_jensen_shannon_is_between_nothing_in_common_and_alike() -> None:
    assert js_distance({"a": 2, "b": 2}, {"a": 5, "b": 5}) == 0
    assert js_distance({"a": 1}, {"b": 1}) == pytest.approx(1)
    # p = (1/2, 1/2), q = (1, 0): the mean is (3/4, 1/4).
    half = 0.5 * (0.5 * math.log2(0.5 / 0.75) + 0.5 * math.log2(0.5 / 0.25) + math.log2(1 / 0.75))
    assert js_distance({"a": 1, "b": 1}, {"a": 2}) == pytest.approx(math.sqrt(half))
    assert js_distance(Counter(), Counter()) == 0
    assert js_distance(Counter("a"), Counter()) == 1


def test_wasserstein_is_how_far_the_mass_moves() -> None:
    assert wasserstein(np.array([0.0, 1.0]), np.array([2.0, 3.0])) == pytest.approx(2)
    assert wasserstein(np.array([0.0, 4.0]), np.array([0.0])) == pytest.approx(2)


def test_the_tests_see_a_shift_and_no_difference() -> None:
    draw = np.random.default_rng(0)
    theirs = draw.normal(size=80)
    shifted = beside(list(theirs + 0.3 + draw.normal(scale=0.4, size=80)), list(theirs))
    assert shifted.wilcoxon_p is not None
    assert shifted.t_p is not None
    assert max(shifted.wilcoxon_p, shifted.t_p) < 1e-3
    same = beside([0.5, 0.7], [0.5, 0.7])
    assert (same.wilcoxon_p, same.t_p) == (1, 1)
    constant = beside([1.0] * 6, [0.0] * 6)  # a t-test has no spread to go by
    assert constant.t_p is None
    assert constant.wilcoxon_p == pytest.approx(2 / 2**6)


async def test_a_measurement_is_reported_beside_the_reference(tmp_path: Path) -> None:
    def worse(text: str) -> str:
        return echo(text).replace("May", "June")

    same = (await evaluation(tmp_path, ScriptedEngine(echo))).roles["core"].reported
    (tmp_path / "other").mkdir()
    other = (await evaluation(tmp_path / "other", ScriptedEngine(worse, shift=0.4))).roles["core"].reported
    assert same is not None
    assert other is not None
    assert (same.js_answers, same.wasserstein_scores, same.wasserstein_words) == (0, pytest.approx(0), 0)
    assert same.texts["f1"].variant == same.texts["f1"].reference > 0.98
    assert other.texts["f1"].variant < other.texts["f1"].reference
    assert other.texts["f1"].wilcoxon_p is not None
    assert other.texts["f1"].wilcoxon_p < 1e-6
    assert 0 < other.js_answers < 1
    assert other.wasserstein_scores > 0.01
    assert other.scores.wilcoxon_p is not None


async def test_a_comparison_shows_what_is_reported(tmp_path: Path) -> None:
    found = await evaluation(tmp_path, ScriptedEngine(echo, shift=0.4))
    reference = make_card("bf16", "bf16", 16, 100, evaluation=found)
    variant = make_card("int8", "w8a8", 8, 50, evaluation=found)
    rows = {head: cells for head, *cells in reported_rows([reference, variant], "core")}
    assert rows["core: McNemar p"] == ["-", "1"]
    assert rows["core: distances"][0] == "-"
    assert rows["core: distances"][1].startswith("answers JS 0.000, scores W ")
    assert rows["core: f1"][1].startswith("0.983, reference 0.983 (p: Wilcoxon 1, t 1)")
    assert rows["core: log-probability"][0].count(".") == 1


async def test_scores_that_are_not_finite_are_reported_as_numbers(tmp_path: Path) -> None:
    """Of such an engine everything is still said, so that the gate can fail it and judge others."""

    class Overflowing(ScriptedEngine):
        def row(self, token_before: int) -> list[float]:
            row = super().row(token_before)
            return [math.nan] * len(row) if token_before == ord("y") % len(row) else row

    figures = await evaluation(tmp_path, Overflowing(echo))
    core = figures.roles["core"]
    assert core.text.kl_mean == figures.text.kl_mean == NOT_FINITE
    assert core.reported is not None
    assert core.reported.scores.variant < -1000 < core.reported.scores.reference
    assert type(figures).model_validate_json(figures.model_dump_json()) == figures
    (broken,) = limit_tests(core, QualityBudget())
    assert broken.beyond
