"""JSON Lines as people and tools write them are read whole."""

import json
from pathlib import Path

import pytest

from quantize.core.jsonl import read_json, read_kept, read_lines
from quantize.evaluate.tasks import TaskError, read_items
from quantize.train.data import DataError, read_examples


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c"])
def test_only_a_line_feed_ends_a_line(tmp_path: Path, inside: str) -> None:
    path = tmp_path / "tasks.jsonl"
    row = {"messages": [{"role": "user", "content": f"a{inside}b"}], "expected": "y"}
    text = json.dumps(row, ensure_ascii=inside < " ")
    other = json.dumps({**row, "expected": "z"}, ensure_ascii=inside < " ")
    path.write_bytes(b"\xef\xbb\xbf" + f"{text}\r\n\r\n{other}\n \n\n".encode())
    assert [number for number, _ in read_lines(path)] == [1, 3]
    assert [item.messages[0]["content"] for item in read_items(path, "core")] == [f"a{inside}b"] * 2


def test_the_line_of_a_mistake_is_the_files(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n\n{\n", encoding="utf-8")
    with pytest.raises(TaskError, match=r"tasks\.jsonl:3:"):
        read_items(path, "core")
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(TaskError, match=r"cannot be read .*; set roles\.core\.tasks"):
        read_items(path, "core")


def test_what_a_killed_process_left_is_cut_off_and_the_next_entry_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl"
    assert read_kept(file) == []
    file.write_bytes(b'["a", 1.5]\n\x00\x00\n["b\xe2\x80\xa8", 2]\n["torn", 3.')
    assert read_kept(file) == [["a", 1.5], ["b\u2028", 2]]
    with file.open("a", encoding="utf-8") as opened:
        opened.write('["c", 3]\n')
    assert read_kept(file) == [["a", 1.5], ["b\u2028", 2], ["c", 3]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"messages": [], "messages": [1]}', "the key 'messages' is given twice"),
        ('{"a": [{"role": "user", "content": "a", "content": "b"}]}', "the key 'content' is given twice"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ("[" * 100_000, "nested too deeply"),
        ("{", "Expecting property name"),
    ],
)
def test_what_nobody_means_is_no_json(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        read_json(text)
    path = tmp_path / "tasks.jsonl"
    path.write_text(f"{text}\n", encoding="utf-8")
    with pytest.raises(TaskError, match=rf"tasks\.jsonl:1: is not JSON \(.*{said}"):
        read_items(path, "core")
    with pytest.raises(DataError, match=rf"tasks\.jsonl:1: is not JSON \(.*{said}"):
        read_examples(path)
