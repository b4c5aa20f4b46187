"""Which tokens of a rendered conversation are its answer's, whatever the template; and templates that write
the date, which another day changes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from quantize.evaluate.client import EngineClient, EngineError
from quantize.evaluate.journal import Journal
from quantize.evaluate.measure import reference_path
from quantize.evaluate.pairing import compare
from quantize.evaluate.reference import ReferenceFile
from quantize.evaluate.rendered import right_answer
from quantize.evaluate.tasks import Item, TaskError
from tests.quantize.scripted_engine import VOCABULARY, ScriptedEngine
from tests.quantize.test_measure import ask, measured

Render = Callable[[Sequence[dict[str, str]], bool], str]


class Rendering(EngineClient):
    """Tokenizes what a template renders: special words, and words with the space before them."""

    def __init__(self, render: Render) -> None:
        super().__init__("http://nowhere", "m")
        self.render, self.words = render, dict[str, int]()

    async def tokenize(
        self,
        messages: Sequence[dict[str, str]],
        add_generation_prompt: bool = False,
        template: Mapping[str, Any] | None = None,
    ) -> list[int]:
        found = re.findall(r"<[^>]+>| ?\w+|\W", self.render(messages, add_generation_prompt))
        return [self.words.setdefault(word, len(self.words)) for word in found]

    def text(self, tokens: Sequence[int]) -> str:
        return "".join(list(self.words)[token] for token in tokens)


async def split(render: Render, item: Item) -> tuple[str, str]:
    """What is asked and what is scored of an item."""
    client = Rendering(render)
    index, tokens, start = await right_answer(client, item, "core", 3)
    assert index == 3
    return client.text(tokens[:start]), client.text(tokens[start:])


def plain(messages: Sequence[dict[str, str]], asking: bool) -> str:
    return "".join(f"<{one['role']}>{one['content']}<end>" for one in messages) + "<assistant>" * asking


def thinking(messages: Sequence[dict[str, str]], asking: bool) -> str:
    """As DeepSeek-R1's: asks for a thought, and leaves it out of what was said."""
    said = [{**one, "content": one["content"].split("</think>")[-1]} for one in messages]
    return plain(said, asking) + "<think>\n" * asking


def spaced(messages: Sequence[dict[str, str]], asking: bool) -> str:
    said = "".join(f"{one['role']}: {one['content']}<end>" for one in messages)
    return said + "assistant: " * asking


def system_last(messages: Sequence[dict[str, str]], asking: bool) -> str:
    """As Mistral 7B's: the system's words stand in the last message where that is the user's."""
    system, *others = messages
    last = {**others[-1], "content": f"{system['content']} {others[-1]['content']}"}
    return plain([*others[:-1], last if last["role"] == "user" else others[-1]], asking)


def wordy(messages: Sequence[dict[str, str]], asking: bool) -> str:
    if not messages[-1]["content"]:
        raise EngineError("http://nowhere/tokenize answered 400: a message is empty")
    return thinking(messages, asking)


async def test_an_answer_begins_after_the_words_that_ask() -> None:
    asked = "<user>is it<end><assistant>"
    assert await split(plain, ask("is it", "refund")) == (asked, "refund<end>")
    own = ask("is it", "refund", expected_tokens=[0, 1], check="reference")
    assert await split(plain, own) == (asked, "<user>is")


@pytest.mark.parametrize("render", [thinking, wordy])
async def test_of_a_template_that_leaves_thoughts_out_the_whole_answer_is_scored(render: Render) -> None:
    asked = "<user>is it<end><assistant>"
    assert await split(render, ask("is it", "refund")) == (asked, "refund<end>")
    thought = ask("is it", "<think>\nmoney\n</think>refund for all")
    assert await split(render, thought) == (asked, "refund for all<end>")


async def test_a_space_at_the_end_of_the_words_that_ask_hides_no_token() -> None:
    assert await split(spaced, ask("is it", "refund")) == ("user: is it<end>assistant:", " refund<end>")


async def test_an_answer_follows_what_was_really_asked() -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "is it"}]
    item = Item.model_validate({"messages": messages, "expected": "no refund"})
    assert await split(system_last, item) == ("<user>be brief is it<end><assistant>", "no refund<end>")


async def test_an_answer_of_which_nothing_is_rendered_is_refused() -> None:
    def silent(messages: Sequence[dict[str, str]], asking: bool) -> str:
        return plain([one for one in messages if one["role"] == "user"], asking)

    with pytest.raises(
        TaskError, match=r"role core, item 4: the chat template renders nothing of .*'refund'"
    ):
        await split(silent, ask("is it", "refund"))


class R1(ScriptedEngine):
    """Asks with the beginning of a thought, and refuses to score nothing as our route does."""

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        said = [1 if one["role"] == "assistant" else 2 for one in body["messages"]]
        tokens = [
            token
            for mark, one in zip(said, body["messages"], strict=True)
            for token in (mark, *(ord(c) % VOCABULARY for c in one["content"]), *([0] if mark == 1 else []))
        ]
        return web.json_response({"tokens": tokens + [1, 3, 4] * body["add_generation_prompt"]})

    async def _score(self, request: web.Request) -> web.Response:
        body = json.loads((await request.read()).partition(b"\n")[0])
        if body["start"] >= len(body["tokens"]):
            raise web.HTTPBadRequest(text=f"start is {body['start']} of {len(body['tokens'])} tokens")
        return await super()._score(request)


async def test_labels_of_one_token_are_scored_where_prompts_begin_a_thought(tmp_path: Path) -> None:
    right = {f"q {i}": "y" if i % 2 else "no" for i in range(30)}
    what = {"core": [ask(text, expected) for text, expected in right.items()]}
    reference = await measured(R1(right.__getitem__), tmp_path / "a", what)
    variant = await measured(R1(right.__getitem__, shift=0.4), tmp_path / "b", what, reference=tmp_path / "a")
    assert [len(one.tokens) for _, one in sorted(variant.scored["core"].items())] == [3, 2] * 15
    assert compare(reference, variant, what).roles["core"].text.kl_mean > 0.01


class Dated(ScriptedEngine):
    """Writes the date before all else, as Llama 3.2's template does."""

    today = "1 Mar 2026"

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        said = "".join(f"<{one['role'][0]}>{one['content']}." for one in body["messages"])
        text = f"Today: {self.today}\n{said}{'<a>' if body['add_generation_prompt'] else ''}"
        return web.json_response({"tokens": [ord(c) % VOCABULARY for c in text]})


@pytest.mark.parametrize("today", ["2 Mar 2026", "11 December 2026"])
async def test_a_variant_is_measured_on_another_day(tmp_path: Path, today: str) -> None:
    """It is scored after the reference's date, so that the tokens before every scored one are the same."""
    what = {"core": [ask(f"q {i}", f"answer {i} " + "x" * 60 * (i % 2)) for i in range(30)]}
    before = await measured(Dated(str), tmp_path / "a", what)
    engine = Dated(str, shift=0.4)
    same_day = await measured(engine, tmp_path / "b", what, reference=tmp_path / "a")
    engine = Dated(str, shift=0.4)
    engine.today = today
    later = await measured(engine, tmp_path / "c", what, reference=tmp_path / "a")
    assert compare(before, later, what).text == compare(before, same_day, what).text


async def test_other_words_for_what_was_asked_are_no_date(tmp_path: Path) -> None:
    what = {"core": [ask(f"q {i}", "yes") for i in range(30)]}
    await measured(Dated(str), tmp_path / "a", what)
    answers = Dated(str)
    other = {"core": [ask(f"q {i}", "yes" if i else "yet") for i in range(30)]}
    with pytest.raises(TaskError, match=r"item 1: the variant's tokenizer splits the right answer, or"):
        await measured(answers, tmp_path / "b", other, reference=tmp_path / "a")
    renamed = {"core": [ask(f"p {i} or {i * i}", "yes") for i in range(30)]}
    with pytest.raises(TaskError, match=r"what was asked, in another way than the reference's"):
        await measured(Dated(str), tmp_path / "c", renamed, reference=tmp_path / "a")


async def test_a_reference_s_file_of_an_older_version_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds a digest of the tokens alone, by which they are compared as before."""
    what = {"core": [ask(f"q {i}", "yes") for i in range(4)]}
    await measured(Dated(str), tmp_path / "a", what)
    path = reference_path(Journal(tmp_path / "a"))
    monkeypatch.setattr(ReferenceFile, "span", lambda *_: None)
    await measured(Dated(str), tmp_path / "b", what, reference=tmp_path / "a")
    engine = Dated(str)
    engine.today = "2 Mar 2026"
    with pytest.raises(TaskError, match=f"or remove {re.escape(str(path))}, which an older version wrote"):
        await measured(engine, tmp_path / "c", what, reference=tmp_path / "a")
