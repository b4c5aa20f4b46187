"""What an engine answered is kept, survives a kill, and is paired item by item and token by token."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantize.card import Evaluation
from quantize.evaluate.client import TOP, TOP_IN_JSON, EngineClient, EngineError
from quantize.evaluate.journal import Journal
from quantize.evaluate.measure import (
    BATCH,
    SCORED_TOKENS,
    Measurement,
    _chosen,
    measure,
    measurement_key,
    read_measurement,
    tasks_sha256,
)
from quantize.evaluate.pairing import compare
from quantize.evaluate.statistics import compare_tokens
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
    engine: ScriptedEngine, path: Path, what: dict[str, list[Item]], **more: bool
) -> Measurement:
    async with engine.serve() as url, EngineClient(url, "assistant") as client:
        return await measure(client, what, {"machine": "test"}, "int8", Journal(path), **more)


async def evaluation(
    tmp_path: Path, variant: ScriptedEngine, what: dict[str, list[Item]] | None = None
) -> Evaluation:
    what = what or tasks()
    reference = await measured(ScriptedEngine(echo, vocabulary=variant.vocabulary), tmp_path / "a", what)
    again = await measured(
        ScriptedEngine(echo, vocabulary=variant.vocabulary), tmp_path / "b", what, backwards=True
    )
    return compare(reference, await measured(variant, tmp_path / "c", what), what, again)


async def test_the_reference_against_itself_is_the_noise_floor(tmp_path: Path) -> None:
    figures = await evaluation(tmp_path, ScriptedEngine(echo))
    core = figures.roles["core"]
    assert (core.items, core.correct, core.reference_correct, core.same_answer) == (60, 54, 54, 60)
    assert core.text.kl_mean == 0
    assert core.text.kl_exact
    assert core.text.kl_vocabulary == VOCABULARY
    assert figures.noise is not None
    assert (figures.noise.items, figures.noise.flips, figures.noise.kl_mean) == (60, 0, 0)
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
    assert core.long_context.noise_kl == 0
    assert core.noise is not None
    assert core.noise.flips == 0
    assert core.long_context.prompt_tokens > 190


async def test_a_stock_server_gives_a_lower_bound_and_says_so(tmp_path: Path) -> None:
    whole = await evaluation(tmp_path / "whole", ScriptedEngine(echo, shift=0.4))
    stock = await evaluation(tmp_path / "stock", ScriptedEngine(echo, shift=0.4, vocabulary=None))
    assert not stock.text.kl_exact
    assert TOP_IN_JSON <= stock.text.kl_vocabulary < VOCABULARY
    assert 0 < stock.text.kl_mean < whole.text.kl_mean
    assert stock.text.perplexity == pytest.approx(whole.text.perplexity, rel=1e-5)


async def test_the_likeliest_of_a_large_vocabulary_come_by_the_route(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantize.evaluate.client.WHOLE_VOCABULARY", 10)
    monkeypatch.setattr("quantize.evaluate.client.TOP", 20)
    tokens = list(range(40, 60))
    async with ScriptedEngine(echo).serve() as url, EngineClient(url, "assistant") as client:
        some = await client.score(tokens, 3, await client.vocabulary())
        monkeypatch.setattr("quantize.evaluate.client.WHOLE_VOCABULARY", 1000)
        every = await client.score(tokens, 3, await client.vocabulary())
    assert len(some) == len(every) == 17
    assert some.came == pytest.approx(every.came)
    assert (some.top1() == every.top1()).all()
    for index, token in enumerate(tokens[3:]):
        row, whole = some.row(index), every.row(index)
        assert len(row) in (20, 21)
        assert row[token] == pytest.approx(whole[token])
        assert row.items() <= {token: pytest.approx(value) for token, value in whole.items()}.items()
    mixed = compare_tokens([every], [some])
    assert not mixed.kl_exact
    assert mixed.kl_mean == pytest.approx(0, abs=1e-6)
    assert TOP == 1024


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
    assert compare(fresh, result, what).text.kl_mean == 0
    idle = ScriptedEngine(echo)
    assert (await measured(idle, path, what)).answers == fresh.answers
    assert idle.asked == []
    assert idle.scored == 0


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
        assert journal.path.stat().st_size == whole
    journal.append([{"n": 4}])
    assert [entry["n"] for entry in journal.read()] == [1, 2, 4]


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
    variant = await measured(engine, tmp_path / "b", what)
    core = compare(reference, variant, what).roles["core"]
    assert core.valid_json is not None
    assert (core.valid_json.items, core.valid_json.good, core.valid_json.reference_good) == (22, 16, 22)
    assert core.correct == 15  # as values, whatever the spaces; guided ones are compared as text
    schemas = [form["json_schema"]["schema"] for form in engine.formats if form]
    assert schemas == [SCHEMA] * 2


async def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    what = tasks(12)
    reference = await measured(ScriptedEngine(echo), tmp_path / "a", what)
    changed = {"core": [what["core"][0].model_copy(update={"expected": "other"}), *what["core"][1:]]}
    variant = await measured(ScriptedEngine(echo), tmp_path / "b", changed)
    with pytest.raises(TaskError, match=r"role core, item 1: the variant's tokenizer"):
        compare(reference, variant, what)


async def test_a_short_answer_of_the_route_is_an_error() -> None:
    async with ScriptedEngine(echo).serve() as url, EngineClient(url, "assistant") as client:
        with pytest.raises(EngineError, match=r"answered \d+ bytes for 2 rows of 97"):
            await client.score_by_route([1, 2, 3], 1, VOCABULARY + 1)


async def chosen(items: list[Item]) -> list[tuple[int, list[int], int]]:
    async with ScriptedEngine(echo).serve() as url, EngineClient(url, "assistant") as client:
        return await _chosen(client, items)


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
