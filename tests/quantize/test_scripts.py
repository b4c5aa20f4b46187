"""Calibration in another writing than what is asked is noticed; another mixture of the same is not."""

from quantize.evaluate.scripts import main_script, unlike

LATIN, CYRILLIC = ["when is the bill due?"], ["когда нужно платить?"]


def test_the_script_of_most_letters() -> None:
    assert main_script([*LATIN * 2, *CYRILLIC])[0] == "Latin"
    assert main_script(["請求書はいつですか"])[0] == "Japanese"
    assert main_script(["12 + 3 = 15"]) == ("", 0.0)


def test_calibration_in_another_script_is_said() -> None:
    assert unlike(CYRILLIC, LATIN) == "Cyrillic (100% of its letters), these in Latin (100%)"
    assert not unlike([*LATIN, *CYRILLIC], CYRILLIC)
    assert not unlike(LATIN, ["über Größe"])
    assert not unlike(["1 2 3"], LATIN)
