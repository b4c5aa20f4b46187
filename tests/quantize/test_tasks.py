"""Held-out items: what counts as right, and what a bad file says."""

from pathlib import Path

import pytest

from quantize.evaluate.tasks import Item, TaskError, read_items

ASK = ({"role": "user", "content": "hi"},)


def test_exact_and_contains() -> None:
    assert Item(messages=ASK, expected="yes").is_right(" yes\n")
    assert not Item(messages=ASK, expected="yes").is_right("yes.")
    summary = Item(messages=ASK, expected="", check="contains", facts=("$5", "Ann Bell"))
    assert summary.is_right("Ann Bell pays $5.")
    assert not summary.is_right("Ann Bell pays.")


def test_contains_looks_for_the_right_answer_where_there_are_no_facts() -> None:
    item = Item(messages=ASK, expected=" answer 7\n", check="contains")
    assert item.is_right("It is answer 7.")
    assert not item.is_right("!!!!!!!!")


def test_json_is_compared_as_values_and_by_its_schema() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    item = Item(messages=ASK, expected='{"n": 1, "m": 2}', check="json", json_schema=schema)
    assert item.is_right('{ "m": 2, "n": 1 }')
    assert not item.is_right('{"n": 1}')
    assert not item.is_right("n is 1")
    assert item.is_valid_json('{"n": 5}')
    assert not item.is_valid_json('{"n": "5"}')
    assert not item.is_valid_json('Here it is: {"n": 5}')


def test_numbers_are_no_truth_values() -> None:
    item = Item(messages=ASK, expected='{"paid": true, "of": [0, 1]}', check="json")
    assert item.is_right('{"of": [0.0, 1.0], "paid": true}')
    assert not item.is_right('{"paid": 1, "of": [0, 1]}')
    assert not item.is_right('{"paid": true, "of": [false, 1]}')
    assert not item.is_right('{"paid": true, "of": [0]}')
    assert not item.is_right('{"paid": true, "of": {"0": 0}}')


@pytest.mark.parametrize("levels", [500, 1100, 100_000])
def test_an_answer_that_is_nested_deeply_is_wrong(levels: int) -> None:
    tree = {"type": "object", "properties": {"a": {"$ref": "#"}}}
    item = Item(messages=ASK, expected='{"a": 1}', check="json", json_schema=tree)
    for answer in ("[" * levels, "[" * levels + "]" * levels, '{"a":' * levels + "1" + "}" * levels):
        assert not item.is_right(answer)
        assert not item.is_valid_json(answer)


def test_references_within_a_schema_are_followed() -> None:
    named = {"$defs": {"n": {"$id": "https://a.example/n", "type": "integer"}}}
    for reference in ("#/$defs/n", "https://a.example/n"):
        item = Item(
            messages=ASK, expected="{}", json_schema={**named, "properties": {"n": {"$ref": reference}}}
        )
        assert item.is_valid_json('{"n": 5}')
        assert not item.is_valid_json('{"n": "5"}')


def row(rest: str) -> str:
    return '{"messages": [{"role": "user", "content": "x"}], ' + rest + "}\n"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty"),
        ("{\n", ":1:"),
        ('{"messages": []}\n', "messages"),
        ('{"messages": [{"role": "user", "content": "x"}], "expected": "y", "chekc": 1}\n', "chekc"),
        (row('"expected": "y", "check": "json"'), "'y' is not JSON"),
        (row('"expected": "y", "guided": true'), "guided needs json_schema"),
        (row('"expected": "y", "json_schema": {"type": "objekt"}'), "json_schema.*is not a JSON schema"),
        (row('"expected": "y", "json_schema": {"$ref": "https://a.example/x.json"}'), "nothing is fetched"),
        (
            row('"expected": "y", "json_schema": {"$ref": "#/$defs/x"}'),
            r":1: json_schema: \$ref '#/.* nowhere",
        ),
        (row('"expected": "y", "json_schema": {"not": {"$ref": "#/title"}, "title": "t"}'), "is not a JSON"),
        (row('"expected": " ", "check": "contains"'), ":1: the line: check is 'contains' and nothing"),
        (row('"expected": "y", "check": "contains", "facts": ["a", " "]'), "facts: one is blank"),
        (row('"expected": "y"') * 2, ":2: is the item of line 1 once more"),
        (
            row('"expected": "y"') + "\n" + row('"expected": "y", "max_tokens": 8'),
            ":3: is the item of line 1",
        ),
    ],
)
def test_bad_task_file(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TaskError, match=sentence):
        read_items(path, "core")


def test_the_same_question_may_have_another_answer_or_be_asked_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    guided = '"expected": "y", "json_schema": {}, "guided": true'
    path.write_text(row('"expected": "y"') + row('"expected": "z"') + row(guided), encoding="utf-8")
    assert [item.expected for item in read_items(path, "core")] == ["y", "z", "y"]


def test_the_suite_is_the_files(tmp_path: Path) -> None:
    path = tmp_path / "far.jsonl"
    path.write_text(row('"expected": "y"'), encoding="utf-8")
    assert [item.suite for item in read_items(path, "core", "long_context")] == ["long_context"]
    with pytest.raises(TaskError, match=r"set roles\.core\.long_context"):
        read_items(tmp_path / "none.jsonl", "core", "long_context")


def test_missing_task_file_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"set roles\.core\.tasks"):
        read_items(tmp_path / "none.jsonl", "core")
