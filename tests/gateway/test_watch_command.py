"""``tiercel watch`` against a running gateway."""

from __future__ import annotations

import asyncio
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from gateway_stack import Stack, running_gateway, settings, write_variants

from deploy.cli import main
from deploy.watch_page import Mark, Share, gathered, over_time


class Command:
    def __init__(self, path: Path, stack: Stack) -> None:
        self._options = ["--config", str(path), "--url", stack.url]

    async def __call__(self, *words: str) -> None:
        await asyncio.to_thread(main, ["watch", *words, *self._options])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_variants(tmp_path / "variants")
    path = tmp_path / "tiercel.yaml"
    path.write_text(settings(tmp_path / "variants", {}))
    return path


async def test_a_person_looks_and_acts(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running_gateway(watch={"rate": 1.0}) as stack:
        tiercel = Command(path, stack)
        for _ in range(3):
            async with stack.post(headers={"x-agent-role": "intent_classifier"}) as response:
                assert response.status == 200
        await tiercel("demote", "int4-kv8", "intent_classifier", "--why", "looks odd")
        assert "int4-kv8 as intent_classifier: demoted: looks odd" in capsys.readouterr().err
        await tiercel("show")
        shown = capsys.readouterr().out
        assert "int4-kv8  intent_classifier  demoted" in shown
        assert "looks odd" in shown
        await tiercel("pin", "int4-kv8", "intent_classifier", "--out")
        await tiercel("unpin", "int4-kv8", "intent_classifier")
        await tiercel("restore", "int4-kv8", "intent_classifier")
        capsys.readouterr()
        await tiercel("show", "--json")
        found = json.loads(capsys.readouterr().out)
        assert [event["kind"] for event in found["events"]] == ["restored", "unpinned", "pinned", "demoted"]
        await tiercel("report", "--out", str(tmp_path / "watch.html"))
    page = (tmp_path / "watch.html").read_text(encoding="utf-8")
    assert "looks odd" in page
    assert "<script" not in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["demote", "int9", "core"], "no watched variant 'int9'"),
        (["show", "--url", "http://127.0.0.1:9"], "does not answer"),
        (["judge", "no-such-file.jsonl"], "watch.judge is not set"),
    ],
)
async def test_what_cannot_be_done_is_said(
    path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    async with running_gateway() as stack:
        options = [] if "--url" in words else ["--url", stack.url]
        with pytest.raises(SystemExit) as ended:
            await asyncio.to_thread(main, ["watch", *words, "--config", str(path), *options])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


async def test_a_judge_is_measured(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judging: dict[str, Any] = {"judge": {"model": "assistant:bf16"}}
    text = settings(tmp_path / "variants", {}, watch={"store": "sqlite://", **judging})
    labelled = tmp_path / "labelled.jsonl"
    rows = [
        {"context": "The sky is blue.", "answer": f"It is so {n}.", "supported": n % 2 == 0} for n in range(4)
    ]
    for place, content in ((path, text), (labelled, "\n".join(map(json.dumps, rows)))):
        await asyncio.to_thread(place.write_text, content)
    async with running_gateway(watch=judging) as stack:
        stack.engines["bf16"].script.replies = [
            '{"1": "supported"}',
            '{"1": "unsupported"}',
            '{"1": "contradictory"}',
            "what?",
        ]
        await Command(path, stack)("judge", str(labelled))
        said = capsys.readouterr().err
        assert "calls 1 of 2 bad answers bad and 1 of 2 good ones good; 1 of its answers" in said
        assert "no better than chance" in said
        async with stack.http.get(stack.url + "/admin/watch") as response:
            judge = (await response.json())["judge"]
        assert (judge["sensitivity"], judge["specificity"]) == (0.5, 0.5)
    wrong = '{"context": "x", "answer": "y", "supported": true}\n{"context": 3}'
    await asyncio.to_thread(labelled.write_text, wrong)
    with pytest.raises(SystemExit):
        main(["watch", "judge", str(labelled), "--config", str(path)])
    assert "labelled.jsonl:2: context" in capsys.readouterr().err


class Nested(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_shares_over_time_are_drawn_with_their_events() -> None:
    shares = [Share(float(number), number % 3 == 0, 1) for number in range(300)]
    picture = over_time(
        {"shadow": shares, "rules": []}, [Mark(150.0, "harmed <x>"), Mark(299.0, "demoted")], "t", "seconds"
    )
    assert Nested(picture).open == []
    assert "harmed &lt;x&gt;" in picture
    assert over_time({"rules": []}, [], "t", "seconds") == ""
    some = gathered(shares)
    assert len(some) <= 60
    assert sum(one.whole for one in some) == 300
    assert sum(one.part for one in some) == 100
