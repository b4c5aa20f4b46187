"""What bits do, looked at from inside: a small real model, every step of it, and the page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from quantize.core.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from quantize.core.modules import read_modules
from quantize.evaluate.tasks import Item, TaskError, read_items
from quantize.explore import run as running
from quantize.explore.asked import Questions, answers, log_probabilities
from quantize.explore.found import Exploration
from quantize.explore.layers import TOKENS, first_tokens
from quantize.explore.rounded import RoundedModel
from quantize.explore.run import Wanted, explore, refuse_large
from quantize.report.curves import Axis, Line, curves
from quantize.report.explored import more_invented, render_exploration, write_exploration
from tests.quantize.tiny import MODEL, make_checkpoint

DATA = MODEL.parent / "data"
BITS = (8, 4, 1)


def items(role: str, count: int) -> list[Item]:
    return read_items(DATA / f"{role}.jsonl", role)[:count]


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    return open_checkpoint(MODEL)


@pytest.fixture(scope="module")
def rounded(demo: Checkpoint) -> RoundedModel:
    return RoundedModel(demo, read_modules(demo))


@pytest.fixture(scope="module")
def found(demo: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Exploration:
    journal = tmp_path_factory.mktemp("explore") / "demo.jsonl"
    return explore(
        demo, Wanted(BITS, {"summarizer": items("summarizer", 3), "core": items("core", 3)}, journal)
    )


def test_fewer_bits_lose_more_whatever_is_rounded(found: Exploration) -> None:
    reference = found.reference()
    assert (reference.kl, reference.agreement) == (0.0, 1.0)
    assert sum(reference.roles["summarizer"].right) >= 2
    for what in ("weights", "inputs", "kv"):
        eight, four, one = found.of(what)  # type: ignore[arg-type]
        assert (eight.bits, four.bits, one.bits) == BITS
        assert 0 < eight.kl < four.kl < one.kl
        assert eight.agreement > one.agreement
        assert all(len(point.depth) == 4 for point in (eight, four, one))
        assert all(a < b for a, b in zip(eight.depth, one.depth, strict=True))


def test_eight_bits_change_no_answer_of_the_demo_and_one_bit_ruins_them(found: Exploration) -> None:
    reference, (eight, _, one) = found.reference(), found.of("weights")
    for role in ("summarizer", "core"):
        assert sum(eight.roles[role].right) >= sum(reference.roles[role].right) - 1
        assert sum(one.roles[role].right) <= 1


def test_layers_are_all_there_with_their_errors(found: Exploration) -> None:
    groups = 4 * 4
    assert len(found.layers.groups) == groups
    weights = {(row.group, row.quantizer): row.error for row in found.layers.errors if row.what == "weights"}
    for group in {name for name, _ in weights}:
        assert weights[group, "int8-g64"] < weights[group, "int4-g64"] < weights[group, "int2-g64-mse"]
        assert weights[group, "int4-g64-mse"] <= weights[group, "int4-g64"]
        assert weights[group, "nf4"] < weights[group, "log4-g64"]
    assert {row.what for row in found.layers.scales} == {"weights", "inputs"}


def test_a_second_run_reads_what_the_first_has_kept(
    demo: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = Wanted((8,), {"core": items("core", 2)}, tmp_path / "kept.jsonl")
    first = explore(demo, wanted)
    whole = wanted.journal.read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(whole) == 1 + 4

    # Killed while it wrote its fourth line.
    wanted.journal.write_text("".join(whole[:3]) + whole[3][:40], encoding="utf-8")
    assert explore(demo, wanted).points == first.points
    assert len(wanted.journal.read_text(encoding="utf-8").splitlines()) == 1 + 4

    def none(*_: Any) -> None:
        raise AssertionError("everything was known")

    monkeypatch.setattr(running, "RoundedModel", none)
    again = explore(demo, wanted)
    assert (again.points, again.layers) == (first.points, first.layers)


def test_other_items_are_another_exploration(demo: Checkpoint, tmp_path: Path) -> None:
    journal = tmp_path / "kept.jsonl"
    explore(demo, Wanted((8,), {"core": items("core", 2)}, journal))
    before = len(journal.read_text(encoding="utf-8").splitlines())
    explore(demo, Wanted((8,), {"core": items("core", 3)}, journal))
    assert len(journal.read_text(encoding="utf-8").splitlines()) == 2 * before


def test_a_model_without_roles_is_looked_at_by_layer_only_where_there_are_words(
    demo: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(TaskError, match="no role with items"):
        explore(demo, Wanted((8,), {}, tmp_path / "kept.jsonl"))


def test_weights_are_what_they_were_after_a_point_even_if_it_fails(rounded: RoundedModel) -> None:
    before = {name: place.weight.clone() for name, place in rounded.places.items()}

    def fail() -> None:
        with rounded.rounded("weights", 2):
            assert any(not torch.equal(place.weight, before[name]) for name, place in rounded.places.items())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(torch.equal(place.weight, before[name]) for name, place in rounded.places.items())


def test_answers_side_by_side_are_those_of_transformers_one_by_one(
    demo: Checkpoint, rounded: RoundedModel
) -> None:
    questions = Questions(demo, {"core": items("core", 5)})
    asked = questions.roles["core"]
    mine = answers(rounded, asked, questions.ends, lambda _count: None)
    for prompt, item, written in zip(asked.prompts, asked.items, mine, strict=True):
        whole = rounded.model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=item.max_tokens, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert written == [token for token in whole if token not in questions.ends]


def test_right_answers_are_scored_in_their_conversations(demo: Checkpoint, rounded: RoundedModel) -> None:
    questions = Questions(demo, {"core": items("core", 3)})
    (tokens, start), *_ = questions.spans
    assert questions.tokenizer.decode(tokens[start:]).startswith(items("core", 1)[0].expected)
    rows = log_probabilities(rounded, questions.spans)
    alone = torch.log_softmax(rounded.model(torch.tensor([tokens])).logits[0].float(), -1)
    assert torch.allclose(rows[0], alone[start - 1 : -1], atol=1e-4)


def test_only_the_cache_is_rounded_where_that_is_asked_for(demo: Checkpoint, rounded: RoundedModel) -> None:
    questions = Questions(demo, {"core": items("core", 2)})
    clean = log_probabilities(rounded, questions.spans)
    with rounded.rounded("kv", 4):
        four = log_probabilities(rounded, questions.spans)
    again = log_probabilities(rounded, questions.spans)
    assert torch.equal(clean[0], again[0])
    assert not torch.allclose(clean[0], four[0], atol=1e-3)


def test_a_model_that_does_not_fit_is_refused_with_the_bytes(demo: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=r"takes [\d,]+ bytes of memory.* 1,000 are available"):
        refuse_large(demo, read_modules(demo), available=1000)


def test_an_answer_that_does_not_fit_is_refused(demo: Checkpoint) -> None:
    long = items("core", 1)[0].model_copy(update={"max_tokens": 4096})
    with pytest.raises(TaskError, match="do not fit the model's 1024; leave the role out"):
        Questions(demo, {"core": [long]})


def test_experts_are_rounded_and_restored_as_well(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "moe", "qwen3_moe"))
    wanted = Wanted((4,), {"core": items("core", 1)}, tmp_path / "kept.jsonl")
    found = explore(checkpoint, wanted)
    assert found.of("weights")[0].kl > 0
    assert any(row.kind.endswith("experts") for row in found.layers.errors)


def test_first_tokens_are_as_many_as_wanted() -> None:
    assert first_tokens([[1, 2, 3], [4, 5, 6]], 5) == [[1, 2, 3], [4, 5]]
    assert sum(map(len, first_tokens([list(range(400))] * 3, TOKENS))) == TOKENS


def test_the_page_shows_all_of_it_and_asks_for_nothing(found: Exploration, tmp_path: Path) -> None:
    write_exploration(found, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for words in (
        "Simulated in 32-bit arithmetic", "accepts nothing", "What bits do", "Does it invent more?",
        "How error travels through depth", "Error of weights by layer and format", "Scales",
        "Before and after",
    ):  # fmt: skip
        assert words in page
    assert "<script" not in page
    assert not re.search(r"(?:src|href)=\"(?!#)", page)
    assert page.count("<svg") > 12


def test_answers_that_were_written_cannot_break_the_page(found: Exploration) -> None:
    point = found.points[0]
    role = point.roles["core"].model_copy(update={"samples": ("<script>alert(1)</script>",)})
    harmed = point.model_copy(update={"roles": {**point.roles, "core": role}})
    page = render_exploration(found.model_copy(update={"points": (harmed, *found.points[1:])}))
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_more_inventions_are_paired_with_what_16_bits_invent(found: Exploration) -> None:
    before = found.reference().roles["core"].model_copy(update={"values": (False,) * 8 + (True,) * 2})
    after = before.model_copy(update={"values": (True,) * 8 + (False,) * 2})
    assert more_invented(before, after)[:2] == (8, 2)
    assert more_invented(before, before) == (0, 0, 1.0)


def place(drawing: str, name: str) -> list[float]:
    found = re.findall(rf'cy="([\d.]+)" r="4"[^>]*><title>{name}, ', drawing)
    return [float(one) for one in found]


def test_curves_rise_where_values_do_and_say_their_figures() -> None:
    drawing = curves(
        ["8", "4", "1"], [Line("weights", [0.001, 0.1, 10.0]), Line("KV", [0.1, None, 1.0])],
        Axis("KL", logarithmic=True), "bits", level=("16 bits", 0.01),
    )  # fmt: skip
    ys = place(drawing, "weights")
    assert ys[0] > ys[1] > ys[2]
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)
    assert len(place(drawing, "KV")) == 2
    assert "weights: 0.001, 0.1, 10" in drawing
    assert curves(["8"], [Line("none", [None])], Axis("KL"), "bits") == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bits", "9"], "--bits: 9 is not between 1 and 8"),
        (["--bits", "four"], "not a list of numbers"),
        (["--items", "0"], "give 1 or more"),
        (["--roles", "poet"], "no role with tasks; known:"),
    ],
)
def test_bad_input_is_refused_before_work(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from deploy.cli import main

    with pytest.raises(SystemExit) as status:
        main(["quantize", "explore", str(MODEL), *options])
    assert status.value.code == 2
    assert words in capsys.readouterr().err


def test_files_that_lie_beside_the_page_are_not_written_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from deploy.cli import main

    items = tmp_path / "core.jsonl"
    items.write_text('{"messages": []}\n{"messages": []}', encoding="utf-8")
    for name, said in (("core.html", "holds something else"), ("other.jsonl", "name the page, other.html")):
        with pytest.raises(SystemExit):
            main(["quantize", "explore", str(MODEL), "--out", str(tmp_path / name), "--items", "1"])
        assert said in capsys.readouterr().err
    assert items.read_text(encoding="utf-8") == '{"messages": []}\n{"messages": []}'
    assert [one.name for one in tmp_path.iterdir()] == ["core.jsonl"]


def test_without_a_configuration_the_demos_items_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from deploy.cli import main

    monkeypatch.chdir(tmp_path)
    main(["quantize", "explore", str(MODEL), "--items", "1", "--bits", "8", "--json"])
    found = Exploration.model_validate_json(capsys.readouterr().out)
    assert found.items == {"summarizer": 1, "core": 1}
    assert (tmp_path / "var/explore/model.html").is_file()
