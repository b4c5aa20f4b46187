"""Pictures are drawn from the figures they claim to show: right place, right order, readable labels."""

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from quantize.report.distributions import ActivationFigures, WeightFigures
from quantize.report.figures import (
    Scale,
    activations_before_and_after,
    loss_against_bytes,
    weights_before_and_after,
)
from quantize.report.tables import Point, pareto

MEASURED = (
    Point("int8", 5_280_000, 0.0004, 0.0003, 0.0005),
    Point("int4", 3_780_000, 0.0111, 0.0100, 0.0122),
    Point("worse", 5_000_000, 0.0200),
    Point("first layer high", 4_120_000, 0.0041, control=True),
)


def parse(drawing: str) -> ElementTree.Element:
    return ElementTree.fromstring(drawing)


def test_the_front_holds_what_no_other_beats() -> None:
    assert [point.name for point in pareto(MEASURED)] == ["int4", "first layer high", "int8"]
    twins = (Point("a", 5, 0.1), Point("b", 5, 0.2), Point("c", 6, 0.1))
    assert [point.name for point in pareto(twins)] == ["a"]


@pytest.mark.parametrize("width", [760, 360])
def test_points_stand_where_their_figures_put_them(width: int) -> None:
    drawing = parse(loss_against_bytes(MEASURED, ("bf16", 8_390_000), 0.0001, width))
    dots = {
        circle.find("title").text.partition(":")[0]: (float(circle.get("cx")), float(circle.get("cy")))
        for circle in drawing.iter("circle")
    }
    assert set(dots) == {"int8", "int4", "worse"}
    assert dots["int4"][0] < dots["worse"][0] < dots["int8"][0]  # more bytes to the right
    assert dots["worse"][1] < dots["int4"][1] < dots["int8"][1]  # more loss further up
    across = (dots["worse"][0] - dots["int4"][0]) / (dots["int8"][0] - dots["int4"][0])
    assert across == pytest.approx((5.0 - 3.78) / (5.28 - 3.78), abs=0.01)
    up = (dots["int8"][1] - dots["int4"][1]) / (dots["int8"][1] - dots["worse"][1])
    assert up == pytest.approx(math.log(0.0111 / 0.0004) / math.log(0.02 / 0.0004), abs=0.01)
    titles = [title.text for path in drawing.iter("path") for title in path.iter("title")]
    assert titles == ["first layer high: 4.12 MB, KL 0.0041 (control)"]
    words = [text.text for text in drawing.iter("text")]
    assert {"int8", "int4", "bf16, loss 0", "noise floor: the reference against itself"} <= set(words)
    assert drawing.get("aria-label") == drawing.find("title").text


def test_labels_do_not_cover_each_other() -> None:
    crowd = tuple(
        Point(f"variant {index}", 4_000_000 + 9_000 * index, 0.01 + 0.0001 * index) for index in range(9)
    )
    drawing = parse(loss_against_bytes(crowd, width=360))
    boxes = [
        (float(text.get("x")), float(text.get("y")), 6.4 * len(text.text))
        for text in drawing.iter("text")
        if text.text.startswith("variant")
    ]
    assert boxes
    for index, (x, y, wide) in enumerate(boxes):
        for other_x, other_y, other_wide in boxes[:index]:
            assert abs(y - other_y) >= 14.9 or x + wide <= other_x or other_x + other_wide <= x


def test_without_a_loss_there_is_no_picture() -> None:
    assert loss_against_bytes(()) == ""
    assert loss_against_bytes((Point("bf16", 8, 0.0),)) == ""


@pytest.mark.parametrize(
    ("low", "high", "logarithmic"), [(3.2, 8.9, False), (0.0, 1.0, False), (2e-5, 0.3, True)]
)
def test_ticks_are_inside_and_enough(low: float, high: float, logarithmic: bool) -> None:
    scale = Scale(low, high, 0, 100, logarithmic)
    ticks = scale.ticks()
    assert 3 <= len(ticks) <= 12
    assert all(-1e-9 <= scale(tick) <= 100 + 1e-9 for tick in ticks)


WEIGHTS = WeightFigures(
    largest=0.5,
    before=(0.1, 0.3, 0.6),
    after=(0.0, 0.4, 0.6),
    quantiles_before=(0.0,) * 7,
    quantiles_after=(0.0,) * 7,
    relative_error=0.123,
)


def test_a_histogram_shows_both_and_says_the_error() -> None:
    drawing = parse(weights_before_and_after(WEIGHTS, "layer 0 down"))
    assert drawing.get("aria-label") == "layer 0 down: weights before and after, relative error 12.3 %"
    area, outline = (re.findall(r"V([\d.]+)", path.get("d")) for path in drawing.iter("path"))
    before, after = list(map(float, area[:-1])), list(map(float, outline))
    assert before[2] < before[1] < before[0]  # larger shares stand higher
    assert after[2] == before[2]
    assert after[1] < before[1]
    assert after[0] == max(after)  # an empty bin lies on the axis


def test_channels_go_from_the_largest_to_the_smallest() -> None:
    figures = ActivationFigures(
        channels=256,
        before=(80.0, 4.0, 1.0),
        after=(8.0, 4.0, 1.0),
        outliers_before=(17,),
        outliers_after=(),
        outlier_count_before=1,
        outlier_count_after=0,
    )
    drawing = parse(activations_before_and_after(figures, "layer 1 qkv"))
    assert "80 before, 8 after; outlier channels 1 before, 0 after" in drawing.get("aria-label")
    before, after = (re.findall(r"[\d.]+ ([\d.]+)", path.get("d")) for path in drawing.iter("path"))
    assert float(before[0]) < float(after[0])
    assert before[1:] == after[1:]
