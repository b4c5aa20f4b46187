"""What an engine answered is kept, survives a kill, and is paired item by item and token by token."""

from __future__ import annotations

import math
import resource
from pathlib import Path
from typing import Any

import pytest

from quantize.card import Evaluation
from quantize.evaluate.client import EngineClient, EngineError
from quantize.evaluate.journal import BATCH, Journal
from quantize.evaluate.measure import (
    SCORED_TOKENS,
    Measurement,
    _chosen,
    measure,
    measurement_key,
    read_measurement,
    reference_path,
    tasks_sha256,
)
from quantize.evaluate.pairing import compare
from quantize.evaluate.reference import ReferenceFile
from quantize.evaluate.tasks import Item, TaskError
from tests.quantize.scripted_engine import VOCABULARY, ScriptedEngine

SCHEMA = {"type": "object", "properties": {"total": {"type": "integer"}}, "required": ["total"]}


def ask(text: str, expected: str, **more: object) -> Item:
    return Item.model_validate(
        {"messages": [{"role": "user", "content": text}], "expected": expected, **more}
    )


def tasks(items: int = 60) -> dict[str, list[Item]]:
    core = [
        ask(f"question {i}", f"The due date is {i} May.", grounds=[f"due: {i} May"]) for i in range(items)
    ]
    far = [ask(f"record {i} " * 20, f"value {i}", suite="long_context") for i in range(12)]
    return {"core": [*core, *far]}


def echo(text: str) -> str:
    """Right answers, but for every tenth question."""
    number = int(text.split()[1])
    return f"value {number}" if "record" in text else f"The due date is {number + (number % 10 == 3)} May."


async def measured(
    engine: ScriptedEngine,
    path: Path,
    what: dict[str, list[Item]],
    *,
    reference: Path | None = None,
    backwards: bool = False,
) -> Measurement:
    """With ``reference``, the journal of the reference."""
    behind = reference_path(Journal(reference)) if reference else None
    async with engine.serve() as url, EngineClient(url, "assistant") as client:
        return await measure(
            client, what, {"machine": "test"}, "int8", Journal(path), reference=behind, backwards=backwards
        )


async def evaluation(
    tmp_path: Path, variant: ScriptedEngine, what: dict[str, list[Item]] | None = None
) -> Evaluation:
    what = what or tasks()
    plain: dict[str, Any] = {"vocabulary": variant.vocabulary, "by_ids": variant.by_ids, "most": variant.most}
    first = tmp_path / "a"
    reference = await measured(ScriptedEngine(echo, **plain), first, what)
    again = await measured(
        ScriptedEngine(echo, **plain), tmp_path / "b", what, reference=first, backwards=True
    )
    return compare(reference, await measured(variant, tmp_path / "c", what, reference=first), what, again)


async def test_the_reference_against_itself_is_the_noise_floor(tmp_path: Path) -> None:
    figures = await evaluation(tmp_path, ScriptedEngine(echo))
    core = figures.roles["core"]
    assert (core.items, core.correct, core.reference_correct, core.same_answer) == (60, 54, 54, 60)
    assert core.text.kl_mean == pytest.approx(0, abs=1e-9)
    assert core.text.kl_exact
    assert core.text.kl_upper == core.text.kl_mean
    assert core.text.kl_vocabulary == VOCABULARY
    assert figures.noise is not None
    assert (figures.noise.items, figures.noise.flips) == (60, 0)
    assert figures.noise.kl_mean == pytest.approx(0, abs=1e-9)
    assert figures.engine == {"machine": "test", "vllm": "scripted"}


async def test_a_variant_that_loses_shows_it_everywhere(tmp_path: Path) -> None:
    def worse(text: str) -> str:
        return "value 0" if "record" in text else echo(text).replace("May", "June")

    figures = await evaluation(tmp_path, ScriptedEngine(worse, shift=0.4))
    core = figures.roles["core"]
    assert (core.correct, core.flips_to_wrong, core.flips_to_right) == (0, 54, 0)
    assert core.grounded is not None
    assert (core.grounded.good, core.grounded.reference_good) == (0, 54)
    assert core.text.kl_mean > 0.01
    # A thousand letters of right answers of about 24 each, spread over all; long contexts not among them.
    assert core.text.sequences == 60
    assert 900 < core.text.tokens <= 1000
    assert core.text.kl_interval is not None
    assert core.text.kl_interval[0] < core.text.kl_mean < core.text.kl_interval[1]
    assert core.text.top1_agreement < 1
    assert core.long_context is not None
    assert (core.long_context.retrieval.good, core.long_context.retrieval.reference_good) == (1, 12)
    assert core.long_context.text.sequences == 12
    assert core.long_context.noise_kl == pytest.approx(0, abs=1e-9)
    assert core.noise is not None
    assert core.noise.flips == 0
    assert core.long_context.prompt_tokens > 190


@pytest.mark.parametrize(("by_ids", "most"), [(True, 64), (False, 64), (False, 20)])
async def test_a_stock_server_bounds_the_kl_from_below_alone(tmp_path: Path, by_ids: bool, most: int) -> None:
    whole = await evaluation(tmp_path / "whole", ScriptedEngine(echo, shift=0.4))
    engine = ScriptedEngine(echo, shift=0.4, vocabulary=None, by_ids=by_ids, most=most)
    stock = await evaluation(tmp_path / "stock", engine)
    assert not stock.text.kl_exact
    assert most <= stock.text.kl_vocabulary <= most + 1
    assert 0 < stock.text.kl_mean < whole.text.kl_mean
    assert stock.text.kl_upper == math.inf
    assert stock.text.perplexity == pytest.approx(whole.text.perplexity, rel=1e-5)
    assert stock.text.top1_agreement == whole.text.top1_agreement


@pytest.mark.parametrize("by_ids", [True, False])
async def test_a_cap_on_logits_bounds_a_stock_server_s_kl_from_above(by_ids: bool) -> None:
    tokens = list(range(40, 60))
    reference, variant = ScriptedEngine(echo, vocabulary=None), ScriptedEngine(echo, 0.4, None, by_ids)
    exact = ScriptedEngine(echo, 0.4)
    async with ScriptedEngine(echo).serve() as url, EngineClient(url, "assistant") as client:
        _, kept = await client.score_and_keep(tokens, 3)
    async with exact.serve() as url, EngineClient(url, "assistant") as client:
        truth = (await client.score_against(tokens, 3, kept)).kl
    async with reference.serve() as url, EngineClient(url, "assistant") as client:
        _, some = await client.score_and_keep(tokens, 3)
    async with variant.serve() as url, EngineClient(url, "assistant", softcap=12.0) as client:
        bounded = await client.score_against(tokens, 3, some)
    assert truth is not None
    assert bounded.kl is not None
    assert bounded.kl_upper is not None
    assert (bounded.kl <= truth + 1e-6).all()
    assert (truth <= bounded.kl_upper + 1e-6).all()
    assert bounded.kl_upper.max() < math.inf


async def test_a_reference_of_another_kind_of_engine_is_refused() -> None:
    tokens = list(range(40, 60))
    async with ScriptedEngine(echo).serve() as url, EngineClient(url, "assistant") as client:
        _, hidden = await client.score_and_keep(tokens, 3)
    async with (
        ScriptedEngine(echo, vocabulary=None).serve() as url,
        EngineClient(url, "assistant") as client,
    ):
        _, likeliest = await client.score_and_keep(tokens, 3)
        with pytest.raises(EngineError, match="has no /tiercel/score and the reference's engine had one"):
            await client.score_against(tokens, 3, hidden)
    async with ScriptedEngine(echo).serve() as url, EngineClient(url, "assistant") as client:
        with pytest.raises(EngineError, match="has a /tiercel/score and the reference's engine had none"):
            await client.score_against(tokens, 3, likeliest)


async def test_a_killed_evaluation_goes_on_where_it_was(tmp_path: Path) -> None:
    path, what = tmp_path / "journal", tasks(100)
    dying = ScriptedEngine(echo)
    dying.fail_after = 70
    with pytest.raises(ExceptionGroup) as caught:
        await measured(dying, path, what)
    assert caught.group_contains(EngineError, match="answered 500")
    with path.open("ab") as file:  # killed while it wrote
        file.write(path.read_bytes()[:40])
    kept = read_measurement(Journal(path))
    assert not kept.done
    answered = sum(map(len, kept.answers.values()))
    assert 70 - BATCH <= answered <= 70
    engine = ScriptedEngine(echo)
    result = await measured(engine, path, what)
    assert result.done
    assert len(engine.asked) == 112 - answered
    fresh = await measured(ScriptedEngine(echo), tmp_path / "fresh", what)
    assert result.answers == fresh.answers
    for index in range(100):
        assert ReferenceFile(reference_path(Journal(path))).digest("core", index) == ReferenceFile(
            reference_path(Journal(tmp_path / "fresh"))
        ).digest("core", index)
    idle = ScriptedEngine(echo)
    assert (await measured(idle, path, what)).answers == fresh.answers
    assert idle.asked == []
    assert idle.scored == 0


async def test_a_killed_variant_goes_on_where_it_was(tmp_path: Path) -> None:
    path, first, what = tmp_path / "journal", tmp_path / "reference", tasks(100)
    await measured(ScriptedEngine(echo), first, what)
    dying = ScriptedEngine(echo, shift=0.4)
    dying.fail_after = 70
    with pytest.raises(ExceptionGroup):
        await measured(dying, path, what, reference=first)
    result = await measured(ScriptedEngine(echo, shift=0.4), path, what, reference=first)
    fresh = await measured(ScriptedEngine(echo, shift=0.4), tmp_path / "fresh", what, reference=first)
    reference = read_measurement(Journal(first))
    assert compare(reference, result, what).text == compare(reference, fresh, what).text


async def test_figures_to_a_lost_reference_are_taken_anew(tmp_path: Path) -> None:
    """Whoever deletes the reference's file, or measures another reference, gets no KL to the old one."""
    path, first, what = tmp_path / "journal", tmp_path / "reference", tasks(12)
    await measured(ScriptedEngine(echo), first, what)
    before = await measured(ScriptedEngine(echo, shift=0.4), path, what, reference=first)
    reference_path(Journal(first)).unlink()
    with pytest.raises(TaskError, match="holds nothing of its right answer; measure the reference first"):
        await measured(ScriptedEngine(echo, shift=0.4), path, what, reference=first)
    other = ScriptedEngine(echo, shift=0.2)
    await measured(other, first, what)
    assert other.asked == []  # its answers are there
    assert other.scored == 24
    after = await measured(ScriptedEngine(echo, shift=0.4), path, what, reference=first)
    kls = [one.scored["core"][0].scored.kl for one in (before, after)]
    assert kls[0] is not None
    assert kls[1] is not None
    assert 0 < kls[1].mean() < kls[0].mean()


async def test_a_torn_record_of_the_reference_is_made_again(tmp_path: Path) -> None:
    first, what = tmp_path / "reference", tasks(4)
    await measured(ScriptedEngine(echo), first, what)
    path = reference_path(Journal(first))
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1]), b"", b"TRF1"):
        path.write_bytes(damaged)
        engine = ScriptedEngine(echo)
        await measured(engine, first, what)
        assert engine.scored >= 1
        kept = ReferenceFile(path)
        assert all(kept.digest("core", index) for index in range(16))
        assert len(path.read_bytes()) == len(whole)


def test_a_journal_with_a_torn_end_is_read_and_written_on(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "deep" / "journal")
    assert journal.read() == []
    journal.append([{"n": 1}, {"n": 2}])
    whole = journal.path.stat().st_size
    journal.append([{"n": 3}])
    raw = journal.path.read_bytes()
    for torn in range(whole + 1, len(raw)):
        journal.path.write_bytes(raw[:torn])
        assert journal.read() == [{"n": 1}, {"n": 2}]
        assert journal.path.read_bytes() == raw[:torn], (
            "it may be another process's that is just being written"
        )
    Journal(journal.path).append([{"n": 4}])
    assert [entry["n"] for entry in journal.read()] == [1, 2, 4]


def test_a_full_disk_tears_no_hole_into_a_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.append([{"n": 1}])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (journal.path.stat().st_size + 10, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            journal.append([{"n": 2}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    journal.append([{"n": 3}])
    assert [entry["n"] for entry in journal.read()] == [1, 3]


def test_measurements_of_other_items_or_machines_are_not_mixed() -> None:
    what = tasks(2)
    other = {"core": what["core"][:-1]}
    assert tasks_sha256(what) != tasks_sha256(other)
    assert measurement_key(what, {"cpu": "a"}) == measurement_key(tasks(2), {"cpu": "a"})
    assert len({measurement_key(w, {"cpu": cpu}) for w in (what, other) for cpu in "ab"}) == 4


async def test_structured_output_is_measured_with_and_without_guidance(tmp_path: Path) -> None:
    items = [ask(f"total {i}", f'{{"total": {i}}}', check="json", json_schema=SCHEMA) for i in range(20)]
    guided = [ask(f"guided {i}", f'{{"total": {i}}}', json_schema=SCHEMA, guided=True) for i in range(2)]

    def good(text: str) -> str:
        return f'{{ "total" : {text.split()[1]} }}'

    def sloppy(text: str) -> str:
        number = int(text.split()[1])
        return good(text) if number % 4 else f"The total is {number}."

    what = {"core": [*items, *guided]}
    reference = await measured(ScriptedEngine(good), tmp_path / "a", what)
    engine = ScriptedEngine(sloppy)
    variant = await measured(engine, tmp_path / "b", what, reference=tmp_path / "a")
    core = compare(reference, variant, what).roles["core"]
    assert core.valid_json is not None
    assert (core.valid_json.items, core.valid_json.good, core.valid_json.reference_good) == (22, 16, 22)
    assert core.correct == 15  # as values, whatever the spaces; guided ones are compared as text
    schemas = [form["json_schema"]["schema"] for form in engine.formats if form]
    assert schemas == [SCHEMA] * 2


async def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    what = tasks(12)
    await measured(ScriptedEngine(echo), tmp_path / "a", what)
    changed = {"core": [what["core"][0].model_copy(update={"expected": "other"}), *what["core"][1:]]}
    engine = ScriptedEngine(echo)
    with pytest.raises(TaskError, match=r"role core, item 1: the variant's tokenizer"):
        await measured(engine, tmp_path / "b", changed, reference=tmp_path / "a")
    assert engine.asked == []  # before any work


async def test_a_short_answer_of_the_route_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async with ScriptedEngine(echo).serve() as url, EngineClient(url, "assistant") as client:
        request = EngineClient._request

        async def cut(self: EngineClient, *arguments: object) -> bytes:
            return (await request(self, *arguments))[:-8]  # type: ignore[arg-type]

        await client.account()
        monkeypatch.setattr(EngineClient, "_request", cut)
        with pytest.raises(EngineError, match=r"answered \d+ bytes for 2 tokens"):
            await client.score_and_keep([1, 2, 3], 1)


async def chosen(items: list[Item]) -> list[tuple[int, list[int], int]]:
    async with ScriptedEngine(echo).serve() as url, EngineClient(url, "assistant") as client:
        return await _chosen(client, items, "core")


async def test_long_answers_do_not_take_the_tokens_of_others() -> None:
    """Of 30 answers of 150 letters a stretch each is scored, at a place that differs."""
    items = [ask(f"question {i}", f"{i:03d}" + "x" * 147) for i in range(30)]
    found = await chosen(items)
    assert [index for index, _, _ in found] == list(range(30))
    assert {len(tokens) - start for _, tokens, start in found} == {SCORED_TOKENS // 30}
    assert len({start for _, _, start in found}) > 10
    assert found == await chosen(items)


async def test_short_answers_leave_their_tokens_to_long_ones() -> None:
    items = [ask(f"question {i}", "x" * (4 if i % 2 else 400)) for i in range(20)]
    parts = [len(tokens) - start for _, tokens, start in await chosen(items)]
    short, long = parts[1], parts[0]
    assert short < 10
    assert set(parts) == {short, long}
    assert SCORED_TOKENS - 10 < sum(parts) <= SCORED_TOKENS


async def test_every_conversation_is_scored_where_there_are_more_than_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("quantize.evaluate.measure.SCORED_TOKENS", 7)
    found = await chosen([ask(f"question {i}", "x" * 9) for i in range(12)])
    assert [len(tokens) - start for _, tokens, start in found] == [1] * 12
