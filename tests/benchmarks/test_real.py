"""The benchmark on the real model: disjoint sets, calibration of any size, rows that an engine takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from benchmarks.quantization import real, real_data
from benchmarks.quantization.stages import Stages
from quantize.card import write_card
from quantize.core.checkpoint import open_checkpoint
from quantize.core.modules import read_modules
from quantize.core.plan import Plan
from quantize.core.targets import target
from quantize.plan.paired_kl import PairedKl, Ratio
from quantize.plan.sensitivity import Row
from quantize.plan.served import ServedKl
from tests.quantize.test_report import make_card
from tests.quantize.tiny import make_checkpoint


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
    assert real.given_plans([f"mine={tmp_path}/plan.json"])["mine"].plan.groups == {"a": "w8a8"}
    with pytest.raises(SystemExit, match="LABEL=FILE"):
        real.given_plans(["mine"])
    with pytest.raises(SystemExit, match="No such file"):
        real.given_plans([f"mine={tmp_path}/none.json"])


def row(label: str, kind: str, scheme: str, megabytes: float, kl: float) -> real.Row:
    plan = Plan(groups={"a": scheme}, method=label.rpartition(" ")[2])
    return real.Row(label, kind, plan, megabytes, 8 * megabytes, kl, kl / 10)


class Known:
    """Stands for PairedKl: ratios of the figures that rows have, by plan."""

    def __init__(self, rows: list[real.Row]) -> None:
        self.kl = {PairedKl.key(one.plan): one.kl for one in rows}
        self.lengths = np.array([3, 4])

    def ratio(self, plan: Plan, other: Plan) -> Ratio:
        found = self.kl[PairedKl.key(plan)] / self.kl[PairedKl.key(other)]
        return Ratio(found, found / 2, found * 2)


ROWS = [
    row("w4a16-g32 rtn", "uniform", "w4a16-g32", 2.0, 0.4),
    row("w4a16-g32 smooth+imatrix+gptq", "uniform", "w4a16-g32", 2.0, 0.2),
    row("w4a16-g64 smooth+imatrix+gptq", "uniform", "w4a16-g64", 1.9, 0.25),
    row("w8a8 gptq", "uniform", "w8a8", 4.0, 0.01),
    row("planned at 4.5 bits", "planned", "bf16", 2.0, 0.1),
]


def test_plans_are_compared_with_the_best_that_is_no_larger_and_methods_with_the_best() -> None:
    found = real.ratios(ROWS, cast(PairedKl, Known(ROWS)))
    assert [(one["label"], one["over"], one["ratio"]) for one in found] == [
        ("w4a16-g32 rtn", "w4a16-g32 smooth+imatrix+gptq", 2.0),
        ("planned at 4.5 bits", "w4a16-g32 smooth+imatrix+gptq", 0.5),
    ]


def test_what_was_measured_is_written_drawn_and_known_to_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real, "WORK", tmp_path)
    singles = [
        {"group": name, "estimate": e, "kl": kl} for name, e, kl in [("a", 1, 2), ("b", 2, 5), ("c", 3, 4)]
    ]
    real.write(ROWS, cast(PairedKl, Known(ROWS)), singles)
    text = (tmp_path / "result.md").read_text(encoding="utf-8")
    assert "| planned at 4.5 bits | 2.0 | 16.000 | 100.0 ± 10.0 |" in text
    assert "| planned at 4.5 bits | w4a16-g32 smooth+imatrix+gptq | 0.50 (0.25–1.00) |" in text
    assert "3 single groups on the engine: rank correlation 0.50" in text
    assert (tmp_path / "real-model.png").stat().st_size > 1000
    known = real.remembered(tmp_path / "result.json")
    assert {label: (one.kind, one.plan) for label, one in known.items()} == {
        one.label: (one.kind, one.plan) for one in ROWS
    }


def test_rows_are_such_as_the_target_loads_and_all_parts_are_asked_for_once(tmp_path: Path) -> None:
    modules = read_modules(open_checkpoint(make_checkpoint(tmp_path / "model", hidden_size=192, head_dim=64)))
    rows = real.rows_at_4_bits(modules, target("vllm-cpu-vnni"))
    assert "w4a16-g64 gptq" in rows
    assert "w4a16-g32-asym imatrix+gptq" in rows
    assert not any("g128" in label for label in rows)  # 192 inputs
    assert rows["down_proj bf16, else w4a16-g64"].kind == "heuristic"
    ends = rows["first and last layer w8a8, else w4a16-g64"].plan
    assert {ends.method_of(name) for name, scheme in ends.groups.items() if scheme == "w8a8"} == {
        "smooth+rtn"
    }


def test_a_variant_is_measured_as_its_card_says(tmp_path: Path) -> None:
    modules = read_modules(open_checkpoint(make_checkpoint(tmp_path / "model", hidden_size=192, head_dim=64)))
    schemes = {group.name: "w8a8" for group in modules}
    card = make_card("planned", "mixed", 4, 1, schemes=schemes, method="smooth+imatrix+gptq")
    made, elsewhere = tmp_path / "made", tmp_path / "elsewhere"
    for directory in (made, elsewhere):
        directory.mkdir()
        (directory / "config.json").write_text("{}")
    write_card(card, made)
    found = real.checkpoints([f"planned, tuned={made}", f"w4a16-g64 awq={elsewhere}"], modules)
    (one, where), (other, there) = found["planned, tuned"], found["w4a16-g64 awq"]
    assert (one.kind, one.plan.groups, where) == ("given", schemes, made)
    assert PairedKl.key(one.plan) != PairedKl.key(one.plan.model_copy(update={"method": card.method}))
    assert (other.kind, set(other.plan.groups.values()), there) == ("uniform", {"w4a16-g64"}, elsewhere)
    for wrong in (f"planned={elsewhere}", "planned", f"w4a16-g64 awq={tmp_path}"):
        with pytest.raises(SystemExit, match="write LABEL=DIRECTORY of a variant with its card"):
            real.checkpoints([wrong], modules)


def test_single_groups_are_spread_over_the_estimates() -> None:
    estimates = [
        Row(
            group=f"g{n}", kind="mlp", layer=n, scheme=scheme, method="imatrix+gptq", bytes=1, sqnr_db=20,
            fisher=float(9 - n),
        )
        for n in range(9)
        for scheme in ("w4a16-g64", "w4a16-g32")
    ]  # fmt: skip
    asked: list[Mapping[str, tuple[str, str]]] = []

    def served(choices: Mapping[str, tuple[str, str]]) -> float:
        asked.append(choices)
        return float(len(asked))

    found = real.single_groups(estimates, cast(ServedKl, served), 3)
    assert [one["group"] for one in found] == ["g8", "g4", "g0"]
    assert asked[0] == {"g8": ("w4a16-g64", "imatrix+gptq")}
    assert real.rank_correlation(found)[0] == pytest.approx(1.0)


def test_a_stage_counts_its_own_time_and_memory(tmp_path: Path) -> None:
    stages = Stages(tmp_path / "stages.jsonl")
    with stages("large"):
        held = np.ones(40_000_000)
    held = held[:1].copy()
    with stages("small"):
        sum(range(1000))
    large, small = (json.loads(line) for line in (tmp_path / "stages.jsonl").read_text().splitlines())
    assert large["peak_mb"] - small["peak_mb"] > 200
    assert large["cpu_s"] >= small["cpu_s"] >= 0
    assert held.shape == (1,)
