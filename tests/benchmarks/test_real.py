"""The benchmark on the real model: disjoint sets, calibration of any size, rows that an engine takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.quantization import real, real_data
from quantize.core.plan import Plan


def placed(folder: Path) -> Path:
    """Data files of the four kinds, with numbers in the texts."""
    needed = sum(real_data.SIZES.values())
    lines = [json.dumps({"knowledge": f"passage {n}", "question": f"question {n}?"}) for n in range(needed)]
    (folder / "halueval_qa.jsonl").write_text("\n".join(lines), encoding="utf-8")
    clinc = {"train": [[f"request {n}", "intent"] for n in range(needed)]}
    (folder / "clinc150.json").write_text(json.dumps(clinc), encoding="utf-8")
    calls = [
        json.dumps({"function": [], "question": [[{"role": "user", "content": f"call {n}"}]]})
        for n in range(needed)
    ]
    (folder / "bfcl_parallel.json").write_text("\n".join(calls) + "\n", encoding="utf-8")
    paragraphs = [f"paragraph {n} " + "word " * 50 for n in range(needed)]
    (folder / "wikitext2_valid.txt").write_text(
        "\n".join([" = Heading = ", "short", *paragraphs]), encoding="utf-8"
    )
    return folder


def test_no_prompt_is_in_two_sets_and_every_kind_is_in_each(tmp_path: Path) -> None:
    sets = real_data.split_prompts(real_data.prompts(placed(tmp_path)))
    assert {name: len(asked) for name, asked in sets.items()} == {
        name: 4 * size for name, size in real_data.SIZES.items()
    }
    all_prompts = [json.dumps(one) for asked in sets.values() for one in asked]
    assert len(set(all_prompts)) == len(all_prompts)
    for asked in sets.values():
        last = [one[-1]["content"] for one in asked]
        for kind in ("question ", "request ", "call ", "Summarize"):
            assert sum(kind in text for text in last) == len(last) // 4


def test_too_few_prompts_are_refused_and_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 3, and 40 are needed"):
        real_data.split_prompts([[[{"role": "user", "content": "x"}]] * 3])
    with pytest.raises(SystemExit, match=r"halueval_qa\.jsonl"):
        real_data.prompts(tmp_path)


def test_calibration_of_few_conversations_is_spread_over_the_kinds() -> None:
    spans = [([number], 1) for number in range(64)]
    texts = real_data.Texts(spans, [], [])
    few = texts.calibration(4)
    assert few.sequences == [[0], [16], [32], [48]]
    assert few.description.sha256 != texts.calibration(8).description.sha256
    with pytest.raises(ValueError, match="from 1 to 64"):
        texts.calibration(65)


def test_a_plan_that_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(Plan(groups={"a": "w8a8"}).model_dump_json(), encoding="utf-8")
    assert real.given_plans([f"mine={tmp_path}/plan.json"])["mine"].groups == {"a": "w8a8"}
    with pytest.raises(SystemExit, match="LABEL=FILE"):
        real.given_plans(["mine"])
    with pytest.raises(SystemExit, match="No such file"):
        real.given_plans([f"mine={tmp_path}/none.json"])
