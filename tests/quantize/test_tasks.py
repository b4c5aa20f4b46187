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


def test_json_is_compared_as_values_and_by_its_schema() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    item = Item(messages=ASK, expected='{"n": 1, "m": 2}', check="json", json_schema=schema)
    assert item.is_right('{ "m": 2, "n": 1 }')
    assert not item.is_right('{"n": 1}')
    assert not item.is_right("n is 1")
    assert item.is_valid_json('{"n": 5}')
    assert not item.is_valid_json('{"n": "5"}')
    assert not item.is_valid_json('Here it is: {"n": 5}')


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
    ],
)
def test_bad_task_file(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TaskError, match=sentence):
        read_items(path, "core")


def test_the_suite_is_the_files(tmp_path: Path) -> None:
    path = tmp_path / "far.jsonl"
    path.write_text(row('"expected": "y"'), encoding="utf-8")
    assert [item.suite for item in read_items(path, "core", "long_context")] == ["long_context"]
    with pytest.raises(TaskError, match=r"set roles\.core\.long_context"):
        read_items(tmp_path / "none.jsonl", "core", "long_context")


def test_missing_task_file_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"set roles\.core\.tasks"):
        read_items(tmp_path / "none.jsonl", "core")
