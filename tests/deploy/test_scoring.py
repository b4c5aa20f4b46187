"""``tiercel watch score``: answers that waited are put before the reference, and the watch acts on them."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from deploy import placement, unlabelled
from deploy.cli import main
from deploy.machine import look
from deploy.scheduled import Scheduled
from deploy.scoring import WAITS
from gateway.config import load_config
from gateway.kept.store import About, Row
from gateway.quality.cells import CellKey, Outcome
from gateway.quality.records import AnswerRecord, encode
from gateway.quality.store import Store
from gateway.quality.watch import store_url
from quantize.card import write_card
from quantize.core.files import point
from tests.deploy.kept import changed, fill, opened, tiercel, write_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gateway"))

from gateway_stack import Stack, eventually, make_card, make_cards, running_gateway, write_variants

BATCH: dict[str, Any] = {"reference": "batch", "rate": 1.0}
ROLES: dict[str, Any] = {"intents": {}, "core": {}}


def write_int8(path: Path) -> None:
    """Its card alone."""
    card = make_card("int8", passes=("intents",), weight_bits=8, weight_bytes=5_000_000)
    place = load_config(path).of("assistant").variants_dir / "int8" / card.version
    place.mkdir(parents=True)
    write_card(card, place)
    point(place.parent / "current", card.version)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Its reference disputes words with a z."""
    found = write_config(tmp_path, disputes="z", watch=BATCH, roles=ROLES)
    write_int8(found)
    return found


def answer(text: str, version: str, **more: Any) -> Row:
    tokens = [{"token": word, "logprob": -0.1} for word in text.split()]
    event = {"choices": [{"index": 0, "message": {"content": text}, "logprobs": {"content": tokens}}]}
    body = {"messages": [{"role": "user", "content": "say something"}], "temperature": 0}
    about = About("answer", more.pop("role", "intents"), "assistant:int8", version, time.time(), **more)
    return Row(about, encode(AnswerRecord(json.dumps(body).encode(), [json.dumps(event).encode()])))


def outcomes(path: Path) -> list[Outcome]:
    store = Store(store_url(load_config(path)), "test")
    rows, _ = store.unfolded()
    store.close()
    return [outcome for _, outcome in rows]


def left(path: Path) -> int:
    store = opened(load_config(path))
    found = len(store.ids("answer"))
    store.close()
    return found


def test_answers_are_scored_by_the_reference_that_is_started_and_then_gone(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version = load_version(path)
    fill(
        path,
        [
            answer("all is well", version),
            answer("zebra zebra", version),
            answer("zebra again", version, probation=True),
            answer("of a version before", "0" * 12),
            answer("of a role that is gone", version, role="nobody"),
        ],
    )
    main(["watch", "score", "--config", str(path)])
    shown = capsys.readouterr()
    assert "assistant:int8 as intents: 2 of 3 answers disputed" in shown.out
    assert "2 answers were dropped: of versions that are served no more" in shown.out
    assert "starting engine assistant:bf16" in shown.err
    key = CellKey(variant="assistant:int8", version=version, role="intents")
    shadow = {(one.bad, one.probation) for one in outcomes(path) if one.check == "shadow"}
    assert shadow == {(False, False), (True, False), (True, True)}
    assert {one.key for one in outcomes(path)} == {key}
    assert left(path) == 0
    before = len(outcomes(path))
    main(["watch", "score", "--json", "--config", str(path)])
    found = capsys.readouterr()
    assert json.loads(found.out) == {"answers": [], "replaced": 0, "damaged": 0}
    assert "starting engine" not in found.err, "nothing waits, and nothing is started"
    assert len(outcomes(path)) == before


def load_version(path: Path) -> str:
    directory = load_config(path).of("assistant").variants_dir / "int8"
    return (directory / "current").resolve().name


def test_where_it_is_suspicious_the_reference_answers_too(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version = load_version(path)
    fill(path, [answer(f"zebra {number}", version) for number in range(30)])
    main(["watch", "score", "--json", "--config", str(path)])
    (found,) = json.loads(capsys.readouterr().out)["answers"]
    assert (found["scored"], found["disputed"]) == (30, 30)
    assert 10 < found["otherwise"] == found["regenerated"] < 30


async def test_a_running_gateway_folds_what_was_scored_and_demotes(tmp_path: Path) -> None:
    """The whole way: it keeps, the command scores, the gateway acts."""
    write_variants(tmp_path / "variants")
    roles: dict[str, Any] = {"intent_classifier": {}}
    watch = BATCH | {"store": f"sqlite:///{tmp_path / 'run' / 'watch.db'}"}
    async with running_gateway(
        serve=("int8", "int4-kv8"),
        cards={name: card for name, card in make_cards().items() if card.variant != "bf16"},
        roles=roles,
        default_role="intent_classifier",
        watch=watch,
        kept={},
        run_dir=tmp_path / "run",
    ) as stack:
        path = write_config(
            tmp_path,
            disputes="z",
            models={
                "assistant": {
                    "path": str(Path(__file__).parents[2] / "deploy/assistant/model"),
                    "serve": ["int8", "int4-kv8"],
                }
            },
            roles=roles,
            default_role="intent_classifier",
            watch=watch,
        )
        stack.engines["int4-kv8"].script.text = "zebra " * 12 + "zebra"
        for _ in range(8):
            assert await variants(stack, 5) == {"assistant:int4-kv8"}
        await eventually(lambda: kept(stack) == 40)
        status, found, said = await tiercel(path, "watch", "score")
        assert status == 0, said
        assert "assistant:int4-kv8 as intent_classifier: 40 of 40 answers disputed" in found
        await eventually(lambda: demoted(stack))
        assert await variants(stack, 3) == {"assistant:int8"}


def kept(stack: Stack) -> float:
    labels = {"role": "intent_classifier", "kind": "answer", "outcome": "kept"}
    return stack.sample("tiercel_kept_conversations_total", **labels)


def demoted(stack: Stack) -> bool:
    return stack.sample("tiercel_variant_demoted", role="intent_classifier", variant="int4-kv8") == 1


async def variants(stack: Stack, times: int) -> set[str]:
    async def one() -> str:
        async with stack.post(headers={"x-agent-role": "intent_classifier"}) as response:
            assert response.status == 200, await response.text()
            await response.read()
            return str(response.headers["x-tiercel-variant"])

    return set(await asyncio.gather(*(one() for _ in range(times))))


def test_an_engine_that_dies_leaves_what_it_did_not_score(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    version = load_version(path)
    fill(path, [answer(f"all is well {number}", version) for number in range(12)])
    text = (path.parent / "python").read_text()
    dies = text.replace("asyncio.run(serve())", DIES)
    (path.parent / "python").write_text(dies)
    with pytest.raises(SystemExit) as ended:
        main(["watch", "score", "--config", str(path)])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    # Several questions are under way: whichever meets the dead engine first is named.
    assert re.search(rf"tiercel: http://\S+: \w+: .+; {WAITS}", said), said
    counted = sum(one.check == "shadow" for one in outcomes(path))
    assert 0 < counted < 12
    assert left(path) == 12 - counted
    (path.parent / "python").write_text(text)
    main(["watch", "score", "--config", str(path)])
    assert "12 answers" not in capsys.readouterr().out
    assert sum(one.check == "shadow" for one in outcomes(path)) == 12
    assert left(path) == 0


DIES = """
import gateway.upstream.fake.engine as engine
scores, asked = engine.score, []

def score(body, disputes):
    asked.append(body)
    if len(asked) > 5:
        import os
        os._exit(1)
    return scores(body, disputes)

engine.score = score
asyncio.run(serve())
"""


def test_where_nothing_was_kept_nothing_waits(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["watch", "score", "--config", str(path)])
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "no answer waits for the reference\n")


def test_what_cannot_be_scored_is_said(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(path, [answer("all is well", load_version(path))])
    small = placement.Machine({0: (0,)}, 1 << 20)
    monkeypatch.setattr(unlabelled, "look", lambda: small)
    assert look() != small
    with pytest.raises(SystemExit) as ended:
        main(["watch", "score", "--config", str(path)])
    assert ended.value.code == 2
    assert "assistant:bf16 needs about" in capsys.readouterr().err
    assert left(path) == 1, "it waits"
    changed(path, lambda settings: settings.update(watch={"reference": "none"}))
    with pytest.raises(SystemExit):
        main(["watch", "score", "--config", str(path)])
    assert "watch.reference: is none, and nothing waits" in capsys.readouterr().err


# by schedule


def scheduled(tmp_path: Path, code: str, said: list[str]) -> Scheduled:
    return Scheduled((sys.executable, "-c", code), 3600, 5, said.append)


async def test_what_keeps_it_from_scoring_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    state = tmp_path / "state"
    state.write_text("no room")
    code = f"""
import sys
text = open({str(state)!r}).read()
if text: sys.exit("progress\\r\\n" + "tiercel: " + text)
print("assistant:int8 as core: 3 of 9 answers disputed")
"""
    one = scheduled(tmp_path, code, said)
    await one.once()
    await one.once()
    assert said == ["watch: what waits for the reference is not scored, and tried again: tiercel: no room"]
    state.write_text("")
    await one.once()
    assert said[1:] == ["watch: assistant:int8 as core: 3 of 9 answers disputed"]
    state.write_text("no room")
    await one.once()
    assert len(said) == 3


async def test_it_is_ended_with_whoever_scheduled_it(tmp_path: Path) -> None:
    began = tmp_path / "began"
    code = f"import pathlib, time; pathlib.Path({str(began)!r}).touch(); time.sleep(600)"
    task = asyncio.create_task(scheduled(tmp_path, code, []).once())
    await eventually(began.exists)
    task.cancel()
    async with asyncio.timeout(30):
        with pytest.raises(asyncio.CancelledError):
            await task


def test_a_schedule_is_the_configurations(tmp_path: Path) -> None:
    path = write_config(tmp_path, watch=BATCH)
    assert Scheduled.of(load_config(path), path, print) is None
    changed(path, lambda settings: settings["watch"].update(batch={"every_s": 60}))
    assert Scheduled.of(load_config(path), path, print) is not None
    changed(path, lambda settings: settings["watch"].update(enabled=False))
    assert Scheduled.of(load_config(path), path, print) is None
