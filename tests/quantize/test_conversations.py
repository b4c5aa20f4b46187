"""The conversations that ship: each is there once, in one part, and says what a valid answer looks like."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from quantize.evaluate.conversations import (
    Conversation,
    ConversationError,
    chosen,
    read_conversations,
    template_kwargs,
    without_system,
)

SHIPPED = read_conversations()


def text_of(one: Conversation) -> str:
    return "\n".join(message["content"] for message in one.messages)


def words_in_threes(text: str) -> set[tuple[str, ...]]:
    """Without numbers and names, which a template could fill in."""
    words = [word for word in re.findall(r"\w+", text) if word.islower() and not word.isdigit()]
    return set(zip(words, words[1:], words[2:], strict=False))


def test_there_are_some_five_hundred_and_none_twice() -> None:
    assert 480 <= len(SHIPPED) <= 600
    assert len({one.id for one in SHIPPED}) == len(SHIPPED)
    assert len({text_of(one) for one in SHIPPED}) == len(SHIPPED)


def test_at_least_three_hundred_differ_in_wording_and_not_in_filled_in_words() -> None:
    kept: list[set[tuple[str, ...]]] = []
    for one in SHIPPED:
        last = words_in_threes(one.messages[-1]["content"])
        if not any(last and len(last & other) / len(last | other) > 0.5 for other in kept):
            kept.append(last)
    assert len(kept) >= 300


def test_lengths_are_spread_from_a_line_to_pages() -> None:
    lengths = sorted(len(text_of(one)) for one in SHIPPED)
    assert lengths[0] < 10
    assert lengths[len(lengths) // 2] < 400
    assert sum(length > 1000 for length in lengths) > 40
    assert lengths[-1] > 4500


def test_there_are_many_domains_turns_rules_and_schemas() -> None:
    domains = Counter(one.domain for one in SHIPPED)
    assert len(domains) >= 15
    assert min(domains.values()) >= 20
    assert sum(one.messages[0]["role"] == "system" for one in SHIPPED) > 100
    assert sum(len([m for m in one.messages if m["role"] == "user"]) > 1 for one in SHIPPED) > 30
    assert sum(one.json_schema is not None for one in SHIPPED) > 50


def test_messages_take_turns_and_the_user_has_the_last_word() -> None:
    for one in SHIPPED:
        roles = [message["role"] for message in one.messages]
        rest = roles[roles[0] == "system" :]
        assert rest == ["user", "assistant"] * (len(rest) // 2) + ["user"], one.id
        assert all(message["content"].strip() == message["content"] != "" for message in one.messages), one.id


def test_no_conversation_and_no_text_is_in_both_parts() -> None:
    parts = {part: chosen(SHIPPED, part) for part in ("calibration", "held_out")}
    assert {one.id for part in parts.values() for one in part} == {one.id for one in SHIPPED}
    long = {
        name: {m["content"][-500:] for one in part for m in one.messages if len(m["content"]) > 800}
        | {m["content"][:500] for one in part for m in one.messages if len(m["content"]) > 800}
        for name, part in parts.items()
    }
    assert not long["calibration"] & long["held_out"]
    systems = {
        name: {one.messages[0]["content"] for one in part if one.messages[0]["role"] == "system"}
        for name, part in parts.items()
    }
    assert not systems["calibration"] & systems["held_out"]


def test_of_every_domain_about_half_is_held_out() -> None:
    for domain, count in Counter(one.domain for one in SHIPPED).items():
        held = sum(one.domain == domain for one in chosen(SHIPPED, "held_out"))
        assert abs(held - count / 2) <= 2, domain


def test_fewer_are_the_beginning_of_more_and_of_all_domains_alike() -> None:
    some, more = chosen(SHIPPED, "held_out", 60), chosen(SHIPPED, "held_out", 96)
    assert more[:60] == some
    share = Counter(one.domain for one in some)
    whole = Counter(one.domain for one in chosen(SHIPPED, "held_out"))
    for domain, count in whole.items():
        assert abs(share[domain] - 60 * count / sum(whole.values())) <= 1.5, domain
    assert chosen(reversed(SHIPPED), "held_out", 60) == some, "whatever order they come in"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"id": "a-01", "domain": "a"}', "messages"),
        ('{"id": "a", "domain": "a", "messages": [{"role": "user", "content": "x"}]}', "is not like"),
        ('{"id": "a-1", "domain": "a", "messages": [{"role": "assistant", "content": "x"}]}', "last message"),
        (
            '{"id": "a-1", "domain": "a", "messages": [{"role": "user", "content": "x"}], '
            '"json_schema": {"type": "number "}}',
            "is not a JSON schema",
        ),
    ],
)
def test_a_line_that_is_none_is_named(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(ConversationError, match=f"mine.jsonl:1: .*{words}"):
        read_conversations(path)


def test_an_id_is_there_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    line = '{"id": "a-01", "domain": "a", "messages": [{"role": "user", "content": "x"}]}\n'
    path.write_text(2 * line, encoding="utf-8")
    with pytest.raises(ConversationError, match=r"mine\.jsonl:2: id: 'a-01' is there twice"):
        read_conversations(path)


def test_a_system_message_can_begin_the_users() -> None:
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}
    assert without_system([system, user]) == ({"role": "user", "content": "Be brief.\n\nWhy?"},)
    assert without_system([user]) == (user,)


def test_a_model_that_thinks_is_asked_to_answer_at_once() -> None:
    qwen = "{%- if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>{%- endif %}"
    assert template_kwargs(qwen) == {"enable_thinking": False}
    assert template_kwargs("{% for message in messages %}{{ message.content }}{% endfor %}") == {}
