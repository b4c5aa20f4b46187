"""What is trained on: labels by the chat template, and what is refused before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from quantize.core.checkpoint import Checkpoint, open_checkpoint
from quantize.core.tokenizer import load_tokenizer
from quantize.train.data import (
    DataError,
    encode,
    read_examples,
    refuse_overlap,
    split,
)
from tests.quantize.tiny import MODEL

ASKED = {"role": "user", "content": "put my name down as malik"}
SAID = {"role": "assistant", "content": "change_user_name"}
MARKED = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' ~ message['role'] ~ '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] ~ '<|end|>' }}"
    "{% endgeneration %}{% else %}{{ message['content'] ~ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def _file(directory: Path, *lines: Any) -> Path:
    path = directory / "data.jsonl"
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The demo's tokenizer and configuration, with another template where a test writes one."""
    path = tmp_path / "base"
    shutil.copytree(MODEL, path)
    return path


def _learned(path: Path, base: Path, length: int = 256) -> list[str]:
    checkpoint = open_checkpoint(base)
    tokenizer = load_tokenizer(base)
    found = encode(read_examples(path), checkpoint, length)
    return [
        tokenizer.decode([one for one, on in zip(example.ids, example.learned, strict=True) if on])
        for example in found.examples
    ]


def test_what_the_assistant_says_is_learned_up_to_the_end_of_its_turn(tmp_path: Path, base: Path) -> None:
    path = _file(tmp_path, {"messages": [ASKED, SAID]})
    assert _learned(path, base) == ["change_user_name<|end|>"]


def test_an_item_is_learned_with_its_expected_answer(tmp_path: Path, base: Path) -> None:
    item = {"messages": [ASKED], "expected": "change_user_name", "check": "exact", "max_tokens": 8}
    assert _learned(_file(tmp_path, item), base) == ["change_user_name<|end|>"]


def test_every_answer_of_a_conversation_is_learned_but_those_of_weight_0(tmp_path: Path, base: Path) -> None:
    asked = {"role": "user", "content": "and now"}
    more: list[dict[str, Any]] = [ASKED, {**SAID, "weight": 0}, asked, {**SAID, "content": "ok"}]
    assert _learned(_file(tmp_path, {"messages": more}), base) == ["ok<|end|>"]
    both = [{key: value for key, value in one.items() if key != "weight"} for one in more]
    assert _learned(_file(tmp_path, {"messages": both}), base) == ["change_user_name<|end|>ok<|end|>"]


def test_the_templates_own_marks_are_taken_and_say_the_same(tmp_path: Path, base: Path) -> None:
    path = _file(tmp_path, {"messages": [ASKED, SAID, ASKED, {**SAID, "content": "ok"}]})
    by_rendering = encode(read_examples(path), open_checkpoint(base), 256)
    (base / "chat_template.jinja").write_text(MARKED, encoding="utf-8")
    by_marks = encode(read_examples(path), open_checkpoint(base), 256)
    assert by_marks.sha256 == by_rendering.sha256


@pytest.mark.parametrize(
    ("marked", "learned"),
    [
        ("{% generation %}{{ one.content }}{% endgeneration %}<|end|>", "{}<|end|>"),
        ("{% generation %}{{ one.content }}<|end|>{% endgeneration %}<|spare_0|>", "{}<|end|>"),
        ("{% generation %}{{ one.content }}{% endgeneration %}.<|end|>.", "{}.<|end|>"),
    ],
)
def test_marks_around_the_content_alone_go_on_to_the_end_of_the_turn(
    tmp_path: Path, base: Path, marked: str, learned: str
) -> None:
    template = "{% for one in messages %}{% if one.role == 'assistant' %}" + marked
    template += "{% else %}{{ one.content }}<|end|>{% endif %}{% endfor %}"
    (base / "chat_template.jinja").write_text(template, encoding="utf-8")
    path = _file(tmp_path, {"messages": [ASKED, SAID, ASKED, {**SAID, "content": "ok"}]})
    assert _learned(path, base) == [learned.format("change_user_name") + learned.format("ok")]


def test_a_marked_answer_that_no_end_follows_is_followed_by_it(tmp_path: Path, base: Path) -> None:
    template = "{% for one in messages %}<|{{ one.role }}|>{% if one.role == 'assistant' %}{% generation %}"
    template += "{{ one.content }}{% endgeneration %}{% else %}{{ one.content }}{% endif %}{% endfor %}"
    (base / "chat_template.jinja").write_text(template, encoding="utf-8")
    path = _file(tmp_path, {"messages": [ASKED, SAID, ASKED, {**SAID, "content": "ok"}]})
    assert _learned(path, base) == ["change_user_nameok<|end|>"], "the next turn is no end of one"


def _thinking(base: Path, asks: str, content: str) -> None:
    """A template as of models that think: ``asks`` is what it asks with, ``content`` what it writes."""
    template = "{% for one in messages %}{% if one.role == 'assistant' %}{% set content = one.content %}"
    template += "<|assistant|>" + content + "<|end|>{% else %}<|user|>{{ one.content }}{% endif %}"
    template += "{% endfor %}{% if add_generation_prompt %}<|assistant|>" + asks + "{% endif %}"
    (base / "chat_template.jinja").write_text(template, encoding="utf-8")


STRIPPED = "{{ content.split('</think>')[-1].strip() }}"
THOUGHT = "<think>\nwho asks?\n</think>\n\nok"


@pytest.mark.parametrize(
    ("asks", "content", "answer", "learned"),
    [
        ("<think>\n", "{{ content }}", "ok", "ok"),
        ("<think>\n", STRIPPED, THOUGHT, "ok"),
        ("", STRIPPED, THOUGHT, "ok"),
        ("<think>\n", "{{ content }}", THOUGHT, "who asks?\n</think>\n\nok"),
        ("<|spare_0|>\n", "<|spare_0|>.{{ content }}", "ok", ".ok"),
        ("<think>\n", "{{ content }}", "<thinking>", "<thinking>"),
    ],
)
def test_what_a_template_of_a_model_that_thinks_leaves_of_an_answer_is_learned(
    tmp_path: Path, base: Path, asks: str, content: str, answer: str, learned: str
) -> None:
    _thinking(base, asks, content)
    path = _file(tmp_path, {"messages": [ASKED, {**SAID, "content": answer}]})
    assert _learned(path, base) == [f"{learned}<|end|>"]
    twice = [ASKED, {**SAID, "content": answer}, ASKED, {**SAID, "content": answer}]
    assert _learned(_file(tmp_path, {"messages": twice}), base) == [f"{learned}<|end|>" * 2]


def test_an_answer_of_which_a_template_leaves_nothing_is_refused(tmp_path: Path, base: Path) -> None:
    _thinking(base, "<think>\n", STRIPPED)
    path = _file(tmp_path, {"messages": [ASKED, {**SAID, "content": "<think>\nwho asks?\n</think>"}]})
    with pytest.raises(DataError, match=r"jsonl:1: the chat template writes nothing of the answer '<think>"):
        _learned(path, base)


def test_an_earlier_answer_that_is_written_otherwise_is_to_have_its_own_line(
    tmp_path: Path, base: Path
) -> None:
    _thinking(base, "", "{{ '' if loop.last else '.' }}{{ content }}")
    twice: list[dict[str, Any]] = [ASKED, SAID, ASKED, {**SAID, "content": "ok"}]
    with pytest.raises(DataError, match=r"writes answer 2 otherwise when more follows; give each .* a line"):
        _learned(_file(tmp_path, {"messages": twice}), base)
    twice[1] = {**SAID, "weight": 0}
    assert _learned(_file(tmp_path, {"messages": twice}), base) == ["ok<|end|>"]


def test_tokens_are_those_that_an_engine_reads_and_writes(tmp_path: Path, base: Path) -> None:
    example = encode(
        read_examples(_file(tmp_path, {"messages": [ASKED, SAID]})), open_checkpoint(base), 256
    ).examples[0]
    prompt = load_tokenizer(base).apply_chat_template(
        [ASKED], tokenize=True, return_dict=True, add_generation_prompt=True
    )["input_ids"]
    assert list(example.ids[: len(prompt)]) == list(prompt)
    assert not any(example.learned[: len(prompt)])
    assert all(example.learned[len(prompt) :])


def test_an_answer_is_followed_by_the_end_where_the_template_has_none(tmp_path: Path, base: Path) -> None:
    template = "{% for one in messages %}{{ one['role'] ~ ': ' ~ one['content'] ~ '\\n' }}{% endfor %}"
    (base / "chat_template.jinja").write_text(
        template + "{% if add_generation_prompt %}assistant: {% endif %}", encoding="utf-8"
    )
    example = encode(
        read_examples(_file(tmp_path, {"messages": [ASKED, SAID]})), open_checkpoint(base), 256
    ).examples[0]
    assert example.ids[-1] == load_tokenizer(base).eos_token_id
    assert example.learned[-1]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"messages": [ASKED]}, "there is no answer"),
        ({"messages": []}, "messages"),
        ({"messages": [ASKED, {"role": "assistant", "content": " "}]}, "an answer is empty"),
        ({"messages": [ASKED, {**SAID, "weight": 0}]}, "there is no answer"),
        ({"messages": [ASKED], "expected": ""}, "expected: there is no answer"),
        ({"messages": [ASKED, SAID], "prompt": "x"}, "prompt: Extra inputs"),
        ({"messages": [{**ASKED, "lang": "en"}, SAID]}, "lang: Extra inputs"),
        ({"messages": [ASKED], "expected": "x", "answer": "x"}, "answer: Extra inputs"),
        ({"messages": [{"role": "bot", "content": "x"}, SAID]}, r"messages\.0\.role"),
        ({"prompt": "x", "completion": "y"}, "messages: Field required"),
        ([1], "is no JSON object"),
        ("{", "is not JSON"),
    ],
)
def test_a_line_that_cannot_be_learned_is_named(tmp_path: Path, line: Any, said: str) -> None:
    path = _file(tmp_path, {"messages": [ASKED, SAID]}, line)
    with pytest.raises(DataError, match=rf"data\.jsonl:2: .*{said}"):
        read_examples(path)


def test_an_empty_file_and_none_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is empty"):
        read_examples(_file(tmp_path, "", "  "))
    with pytest.raises(DataError, match="does not exist"):
        read_examples(tmp_path / "nothing.jsonl")


def test_a_template_that_cuts_the_answer_off_is_refused(tmp_path: Path, base: Path) -> None:
    path = base / "chat_template.jinja"
    text = path.read_text(encoding="utf-8")
    cut = text.replace("message['content'] ~ '<|end|>'", "message['content'][:5] ~ '<|end|>'")
    assert cut != text
    path.write_text(cut, encoding="utf-8")
    with pytest.raises(
        DataError, match=r"data\.jsonl:1: the chat template cuts off the answer 'change_user_n"
    ):
        _learned(_file(tmp_path, {"messages": [ASKED, SAID]}), base)


def test_a_template_that_rewrites_what_came_before_is_refused(tmp_path: Path, base: Path) -> None:
    text = "{{ messages | length }}{% for one in messages %}{{ one['content'] }}{% endfor %}"
    (base / "chat_template.jinja").write_text(text, encoding="utf-8")
    with pytest.raises(
        DataError, match="before answer 2 otherwise when the answer follows; mark the answers"
    ):
        _learned(_file(tmp_path, {"messages": [ASKED, SAID]}), base)


def test_a_length_that_leaves_nothing_to_learn_is_refused(tmp_path: Path, base: Path) -> None:
    path = _file(tmp_path, {"messages": [{**ASKED, "content": "put my name down " * 9}, SAID]})
    with pytest.raises(DataError, match=r"its first 8 tokens hold none of the answer.*raise --length to"):
        _learned(path, base, length=8)


def test_an_answer_longer_than_the_length_is_cut_and_counted(tmp_path: Path, base: Path) -> None:
    path = _file(tmp_path, {"messages": [ASKED, {**SAID, "content": "change_user_name " * 30}]})
    found = encode(read_examples(path), _checkpoint(base), 40)
    assert found.cut == 1
    assert len(found.examples[0].ids) == 40
    assert not found.examples[0].is_whole


def _checkpoint(base: Path) -> Checkpoint:
    return open_checkpoint(base)


def _lines(directory: Path, count: int) -> Path:
    asked = ({"role": "user", "content": f"question {number}"} for number in range(count))
    return _file(directory, *({"messages": [one, SAID]} for one in asked))


def test_held_out_lines_stay_held_out_when_more_come(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    few = split(read_examples(_lines(tmp_path, 200)))[1]
    more = split(read_examples(_lines(tmp_path / "more", 400)))[1]
    assert {one.asked for one in few} <= {one.asked for one in more}
    assert 20 <= len(more) <= 60


def test_too_few_lines_to_hold_any_out_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="would be held out"):
        split(read_examples(_lines(tmp_path, 10)))


def test_what_judges_is_never_trained_on(tmp_path: Path) -> None:
    lines = read_examples(_lines(tmp_path, 20))
    with pytest.raises(DataError, match=r"data\.jsonl:4 asks what .*data\.jsonl:4 asks, which judges"):
        refuse_overlap(lines, lines[3:4])
    refuse_overlap(lines[:3], lines[3:4])
