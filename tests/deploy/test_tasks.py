"""``tiercel tasks``: kept conversations become items that a gate takes, and are deleted on demand."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from deploy import reference as reference_module
from deploy.cli import main
from deploy.making import labelled_items
from deploy.recording import record, write_items
from gateway.config import load_config
from quantize.evaluate.client import EngineError
from quantize.evaluate.pairing import count_items
from quantize.evaluate.tasks import Item, read_items
from tests.deploy.kept import as_engine, changed, fill, opened, question, tiercel, write_config
from tests.quantize.scripted_engine import ScriptedEngine

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gateway"))

from gateway_stack import running_gateway

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_config(tmp_path)


@pytest.fixture
async def scripted(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ScriptedEngine]:
    """What answers in place of the reference's engine."""
    engine = ScriptedEngine(lambda text: f"answer to {text}")
    async with engine.serve() as url:
        monkeypatch.setattr(
            reference_module, "variant_engine", lambda model, card, say: as_engine(url, model, card)
        )
        yield engine


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_is_kept_becomes_items_and_is_deleted(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the reference's engine, which is started for it."""
    fill(path, [question("be brief", "when is my bill due"), question("hello", role="core")])
    out = tmp_path / "out" / "items.jsonl"
    main(["tasks", "record", "intents", "--out", str(out), "--config", str(path)])
    assert lines(out) == [
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "when is my bill due"},
            ],
            "expected": "what the reference says",
            "check": "reference",
        }
    ]
    assert out.stat().st_mode & 0o077 == 0
    assert "1 items are in" in capsys.readouterr().err
    main(["tasks", "--config", str(path)])
    shown = capsys.readouterr().out
    assert [line.split()[:3] for line in shown.splitlines()[1:]] == [
        ["core", "for", "tasks"],
        ["intents", "for", "tasks"],
    ]
    assert "bill" not in shown
    main(["tasks", "forget", "intents", "--config", str(path)])
    main(["tasks", "show", "--json", "--config", str(path)])
    (left,) = json.loads(capsys.readouterr().out)
    assert (left["role"], left["number"], left["variant"]) == ("core", 1, "assistant:int8")
    main(["tasks", "forget", "--all", "--config", str(path)])
    main(["tasks", "--config", str(path)])
    assert "nothing is kept" in capsys.readouterr().err


async def test_nothing_is_asked_twice_whatever_stops_it(
    path: Path, tmp_path: Path, scripted: ScriptedEngine
) -> None:
    fill(path, [question(f"number {number}") for number in range(12)])
    scripted.fail_after = 5
    with pytest.raises(ExceptionGroup) as failed:
        await record(load_config(path), "intents", None, None, lambda _: None)
    assert failed.group_contains(EngineError)
    store = opened(load_config(path))
    known = {
        one.asked.messages[0]["content"]
        for one in map(store.question, store.ids("request"))
        if one and one.given
    }
    store.close()
    assert 0 < len(known) <= 5
    scripted.fail_after, scripted.asked = None, []
    recorded = await record(load_config(path), "intents", None, None, lambda _: None)
    assert len(recorded.items) == 12
    assert {*scripted.asked, *known} == {f"number {number}" for number in range(12)}
    assert len(scripted.asked) == 12 - len(known)
    scripted.asked = []
    again = await record(load_config(path), "intents", 5, None, lambda _: None)
    assert [item.expected for item in again.items] == [f"answer to number {n}" for n in range(7, 12)]
    assert scripted.asked == []
    # Another question to the same conversation: it is asked anew.
    changed(path, lambda settings: settings["roles"]["intents"].update(max_tokens=20))
    longer = await record(load_config(path), "intents", 5, None, lambda _: None)
    assert {item.max_tokens for item in longer.items} == {20}
    assert len(scripted.asked) == 5


async def test_what_can_be_no_item_is_left_out_and_counted(path: Path, scripted: ScriptedEngine) -> None:
    fill(
        path,
        [
            question("a question", max_tokens=30),
            question("a question", max_tokens=40),
            question("[email] [phone]"),
            question("word " * 5000),
            question("as JSON", json_schema=SCHEMA, template={"enable_thinking": False}),
            question("as nonsense", json_schema={"type": "no such type"}),
        ],
    )
    recorded = await record(load_config(path), "intents", None, None, lambda _: None)
    assert recorded.skipped == {
        "are there twice": 1,
        "had nothing left but what was taken out": 1,
        "are too long for the model's context": 1,
        "ask for a schema that cannot be checked": 1,
    }
    plain, guided = recorded.items
    assert plain == Item(
        messages=({"role": "user", "content": "a question"},),
        expected="answer to a question",
        check="reference",
        max_tokens=40,
    )
    assert (guided.json_schema, guided.guided) == (SCHEMA, True)
    assert scripted.formats[scripted.asked.index("as JSON")]["json_schema"]["schema"] == SCHEMA
    assert scripted.templates[scripted.asked.index("as JSON")] == {"enable_thinking": False}


async def test_the_file_is_judged_without_labels_and_with_them_once_edited(
    path: Path, tmp_path: Path, scripted: ScriptedEngine
) -> None:
    fill(path, [question(f"number {number}") for number in range(4)])
    out = tmp_path / "items.jsonl"
    write_items(out, (await record(load_config(path), "intents", None, None, lambda _: None)).items)
    changed(path, lambda settings: settings["roles"]["intents"].update(tasks=str(out)))
    items = labelled_items(load_config(path).of("assistant"))["intents"]
    assert len(items) == 4
    assert count_items(items).evidence == "reference"
    edited = [line | {"expected": "billing", "check": "exact"} for line in lines(out)]
    out.write_text("".join(json.dumps(line) + "\n" for line in edited), encoding="utf-8")
    assert count_items(read_items(out, "intents")).evidence == "labels"


async def test_a_reference_that_is_served_is_asked_through_the_gateway(
    tmp_path: Path,
) -> None:
    roles: dict[str, Any] = {"intents": {"record": {"rate": 1.0}}, "core": {}}
    async with running_gateway(roles=roles, run_dir=tmp_path / "run", kept={}) as stack:
        models = {
            "assistant": {
                "path": str(Path(__file__).parents[2] / "deploy/assistant/model"),
                "serve": ["bf16", "int8"],
            }
        }
        path = write_config(tmp_path, models=models, roles=roles)
        fill(path, [question("when is my bill due")])
        out = tmp_path / "items.jsonl"
        status, _, said = await tiercel(
            path, "tasks", "record", "intents", "--out", str(out), "--url", stack.url
        )
        assert status == 0, said
        assert [line["expected"] for line in lines(out)] == ["The total is $277."]
        assert len(stack.asked("bf16")) == 1
        assert "is asked through the gateway" in said
        # Which is nobody's traffic, and not kept again.
        assert stack.sample("tiercel_kept_conversations_total", role="core", kind="request") == 0
        store = opened(load_config(path))
        assert len(store.ids("request")) == 1
        store.close()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["show"], "kept.db does not exist: nothing is kept yet; the section kept and roles.ROLE.record"),
        (["record", "intent", "--out", "x"], "'intent' is not a role; known: core, intents"),
        (["record", "core", "--out", "x"], "nothing is kept yet"),
        (["record", "intents", "--out", "x", "--most", "0"], "--most: 0 is no number of conversations"),
        (["forget"], "give the role whose conversations are to be deleted, or --all"),
        (["forget", "core", "--all"], "give the role whose conversations are to be deleted, or --all"),
    ],
)
def test_what_cannot_be_done_is_said(
    path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["tasks", *words, "--config", str(path)])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_key_that_is_lost_is_said(path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    fill(path, [question("x")])
    (tmp_path / "run" / "kept.key").unlink()
    with pytest.raises(SystemExit):
        main(["tasks", "record", "intents", "--out", "x", "--config", str(path)])
    assert "kept.key does not exist: without its key what was kept cannot be read" in capsys.readouterr().err
    main(["tasks", "forget", "--all", "--config", str(path)])
    assert "1 conversations were deleted" in capsys.readouterr().err
