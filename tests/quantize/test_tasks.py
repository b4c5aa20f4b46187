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


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty"),
        ("{\n", ":1:"),
        ('{"messages": []}\n', "messages"),
        ('{"messages": [{"role": "user", "content": "x"}], "expected": "y", "chekc": 1}\n', "chekc"),
    ],
)
def test_bad_task_file(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TaskError, match=sentence):
        read_items(path, "core")


def test_missing_task_file_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"set roles\.core\.tasks"):
        read_items(tmp_path / "none.jsonl", "core")
