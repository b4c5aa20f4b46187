"""The demo's report: what is written can be read again, looked at offline, and trusted when torn."""

from __future__ import annotations

import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from deploy.report import format_table, write_report
from deploy.report_data import DemoReport, memory, milliseconds

PASSED = {"outcome": "passed", "reasons": ["is the reference"]}
FAILED = {"outcome": "failed", "reasons": ["4-bit weights, the role asks for 16 or more"]}


def role(**more: Any) -> dict[str, Any]:
    base = {
        "variant_counts": {"bf16": 200},
        "count": 200,
        "accuracy": 0.985,
        "accuracy_low": 0.957,
        "accuracy_high": 0.995,
        "latency_p50_s": 0.1,
        "latency_p95_s": 1.25,
        "ttft_p50_s": 0.02,
        "ttft_p95_s": 0.07,
        "tokens_per_second": 121.4,
        "hallucination_score": 0.988,
    }
    return base | more


def data(**more: Any) -> dict[str, Any]:
    base = {
        "created": "2026-11-21T00:12:00Z",
        "machine": {"cpu": "Some CPU <fast>", "cores": 2},
        "messages": 1000,
        "wall_seconds": 312.44,
        "roles": {
            "intent_classifier": role(
                variant_counts={"int4-kv8": 150, "bf16": 50},
                agreement_with_reference=0.991,
                hallucination_score=None,
            ),
            "core": role(),
        },
        "variants": {
            "bf16": {
                "scheme": "bf16",
                "weight_bytes": 8 << 20,
                "kv_bytes_per_token": 2048,
                "engine_memory_bytes": 3 << 29,
                "perplexity": 1.83,
                "gate": {"intent_classifier": PASSED, "core": PASSED},
                "accuracy": {"core": 0.988},
            },
            "int4-kv8": {
                "scheme": "w4a16-g128",
                "weight_bytes": 3 << 20,
                "kv_bytes_per_token": 1024,
                "kl_mean": 0.0214,
                "gate": {"core": FAILED},
            },
        },
    }
    return base | more


def report(**more: Any) -> DemoReport:
    return DemoReport.model_validate(data(**more))


class Page(HTMLParser):
    """Collects the text, ids and references of a page, and checks that its elements nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href"):
                self.references.append(value or "")
            self.references += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += f"{data} "


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory, missing before, that a report was written into."""
    directory = tmp_path_factory.mktemp("report") / "new" / "demo"
    write_report(report(), directory)
    return directory


def test_writes_figures_page_and_picture(written: Path) -> None:
    assert sorted(path.name for path in written.iterdir()) == ["report.html", "report.json", "report.png"]
    assert DemoReport.model_validate_json((written / "report.json").read_text()) == report()
    png = (written / "report.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20], "big") == 1920


def test_the_page_stands_alone(written: Path) -> None:
    html = (written / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []
    assert len(set(page.ids)) == len(page.ids), "drawings on one page must not share ids"
    assert page.references, "the charts refer to their own parts"
    assert {reference[1:] for reference in page.references} <= set(page.ids), "nothing outside the page"
    assert "<script" not in html
    assert "prefers-color-scheme: dark" in html
    assert "var(--ink)" in html
    assert 'name="viewport"' in html
    for shown in ("Some CPU <fast>, 2 cores", "75 %", "98.5 % (95.7–99.5)", FAILED["reasons"][0], "✕ failed"):
        assert shown in page.text


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    odd = {'<b onload="x">&': role(variant_counts={})}
    write_report(report(roles=odd), tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    assert '<b onload="x">&' in page.text


def test_a_failed_write_leaves_the_last_report(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(_: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_report(report(messages=7), tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


@pytest.mark.parametrize(("roles", "variants"), [(1, 1), (4, 7)])
def test_renders_what_was_hardly_measured_and_what_is_crowded(
    tmp_path: Path, roles: int, variants: int
) -> None:
    bare = {
        "variant_counts": {},
        "count": 0,
        "accuracy": 0.0,
        "accuracy_low": 0.0,
        "accuracy_high": 1.0,
    }
    variant = {"scheme": "bf16", "weight_bytes": 0, "kv_bytes_per_token": 0}
    sparse = report(
        messages=0,
        wall_seconds=0,
        roles={f"a_role_with_a_very_long_name_{index}": bare for index in range(roles)},
        variants={f"v{index}": variant for index in range(variants)},
    )
    write_report(sparse, tmp_path)
    assert "–" in format_table(sparse)


def test_the_terminal_shows_roles_variants_and_gates() -> None:
    text = format_table(report())
    assert text.startswith("1,000 messages in 312.4 s · Some CPU <fast>, 2 cores · 2026-11-21 00:12 UTC")
    rows = {line.split("  ")[0]: " ".join(line.split()) for line in text.splitlines() if "  " in line}
    assert rows["intent_classifier"] == (
        "intent_classifier int4-kv8 75 %, bf16 25 % 200 98.5 % (95.7–99.5) 99.1 % 100 ms / 1.25 s "
        "20/70 ms 121 –"
    )
    assert rows["core"].startswith("core bf16 200 98.5 % (95.7–99.5) – 100 ms / 1.25 s")
    assert rows["bf16"] == "bf16 bf16 1.50 GiB 8.0 MiB 2.0 KiB – 1.83"
    assert rows["int4-kv8"] == "int4-kv8 w4a16-g128 – 3.0 MiB 1.0 KiB 0.0214 –"
    assert "int4-kv8 for core: failed (4-bit weights, the role asks for 16 or more)" in text
    assert all(line == line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"roles": {"core": role(variant_counts={"int2": 1})}}, "served by 'int2'"),
        ({"roles": {"core": role(accuracy=98.5)}}, "less than or equal to 1"),
        ({"roles": {}}, "at least 1 item"),
        ({"wall_time": 3}, "Extra inputs"),
        ({"machine": {"cpu": "x", "cores": 0}}, "greater than or equal to 1"),
    ],
)
def test_a_report_that_cannot_be_right_is_refused(broken: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        report(**broken)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "–"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (900 << 20, "900 MiB"),
        (3 << 29, "1.50 GiB"),
    ],
)
def test_memory_has_a_unit(count: int | None, text: str) -> None:
    assert memory(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "–"), (0.0312, "31 ms"), (0.9999, "1.00 s"), (2.5, "2.50 s")]
)
def test_durations_have_a_unit(seconds: float | None, text: str) -> None:
    assert milliseconds(seconds) == text


INCIDENT = {
    "variant": "int4-kv8",
    "fault": "two-bits",
    "harmed_at": 60.0,
    "answers": [
        {"role": "intent_classifier", "variant": variant, "right": right, "at": float(at)}
        for at, variant, right in (
            *((second, "int4-kv8", second % 10 != 0) for second in range(60)),
            *((second, "int4-kv8", False) for second in range(61, 71)),
            *((second, "bf16", True) for second in range(71, 101)),
        )
    ],
    "demotions": [
        {
            "role": "intent_classifier",
            "answers": 10,
            "seconds": 10.5,
            "why": "signals and shadow have changed",
        }
    ],
}


def test_the_second_act_is_told_and_drawn(tmp_path: Path) -> None:
    told = report(incident=INCIDENT)
    table = format_table(told)
    assert (
        "intent_classifier: demoted after 10 answers, 10 s, because signals and shadow have changed" in table
    )
    assert "right: 90.0 % before, 0.0 % harmed, 100.0 % afterwards" in table
    write_report(told, tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []
    assert "int4-kv8 harmed" in page.text
    assert "demoted for intent_classifier" in page.text
    assert DemoReport.model_validate_json((tmp_path / "report.json").read_text()) == told


def test_a_role_that_was_not_demoted_is_said() -> None:
    told = report(incident=INCIDENT | {"demotions": []})
    assert "intent_classifier: not demoted" in format_table(told)
