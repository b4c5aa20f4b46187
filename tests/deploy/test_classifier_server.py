"""A classifier's engine: vLLM's ``/classify``, chat that answers the label, and what the evaluator asks."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from deploy.encoder import classifier as classifier_module
from deploy.encoder.api import make_app
from deploy.encoder.classifier import Classifier
from deploy.engine_server import MOST_BYTES, FullError
from gateway.quality.examiner import Examiner
from gateway.quality.shadow import compare
from quantize.account import account_of_workers
from quantize.core.checkpoint import open_checkpoint
from quantize.export.classifier import train_classifier
from quantize.export.encoder import FLOAT, Session, open_encoder
from quantize.export.encoder_variant import add_classifier
from quantize.registry import Registry
from tests.deploy.test_llama_server import InProcess
from tests.quantize.small_encoder import ROWS, make_encoder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("classifier")
    train_classifier(open_encoder(make_encoder(place / "encoder")), ROWS, place / "model")
    registry = Registry(place / "variants", "intents", "fp32")
    add_classifier(registry, open_checkpoint(place / "model"), "fp32", FLOAT)
    return registry.path("fp32")


@pytest.fixture
async def http(exported: Path) -> AsyncIterator[httpx.AsyncClient]:
    classifier = Classifier(exported, threads=1)
    classifier.start()
    transport = httpx.ASGITransport(make_app(classifier, "intents", "1.32"), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=60) as client:
        yield client
    await classifier.stop()


async def chat(http: httpx.AsyncClient, text: str, **more: Any) -> httpx.Response:
    messages = [{"role": "system", "content": "paint"}, {"role": "user", "content": text}]
    return await http.post("/v1/chat/completions", json={"messages": messages, **more})


async def test_texts_are_classified_in_vllm_s_form(http: httpx.AsyncClient) -> None:
    texts = [text for text, _ in ROWS]
    reply = (await http.post("/classify", json={"model": "intents", "input": texts})).json()
    assert [one["label"] for one in reply["data"]] == [label for _, label in ROWS]
    assert sum(reply["data"][0]["probs"]) == pytest.approx(1)
    assert reply["data"][0]["num_classes"] == 4
    assert reply["usage"]["prompt_tokens"] > len(texts)


async def test_a_chat_is_answered_with_the_label_whole_and_streamed(http: httpx.AsyncClient) -> None:
    reply = (await chat(http, "sell the gate now", logprobs=True, top_logprobs=2)).json()
    choice = reply["choices"][0]
    assert choice["message"]["content"] == "sell"
    assert choice["logprobs"]["content"][0]["top_logprobs"][0]["token"] == "sell"
    assert reply["usage"]["completion_tokens"] == 1
    options = {"include_usage": True}
    text = (await chat(http, "open the door soon", stream=True, stream_options=options)).text
    events = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-2]]
    assert events[0]["choices"][0]["delta"]["content"] == "open"
    assert events[-1]["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ("/classify", {"input": []}, "input"),
        ("/classify", {"input": ["a"] * 257}, "input"),
        ("/classify", {"input": {"a": 1}}, "input"),
        ("/v1/completions", {"prompt": "once upon a time", "max_tokens": 20}, "prompt"),
        ("/v1/completions", {"prompt": [1, -7], "max_tokens": 1}, "tokens"),
        ("/v1/completions", {"prompt": [10**30], "max_tokens": 1}, "tokens"),
        ("/v1/completions", {"prompt": [1], "max_tokens": 9}, "max_tokens"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"messages": ["a"]}, "messages"),
        ("/tiercel/score", {"tokens": [1, 2, 3]}, "start"),
        ("/tiercel/score", {"tokens": [1, 2, 3], "start": 1}, "tokens"),
        ("/tiercel/score", {"tokens": ["a", "b"], "start": 1}, "tokens"),
    ],
)
async def test_what_is_not_served_is_refused_by_its_name(
    path: str, body: dict[str, Any], field: str, http: httpx.AsyncClient
) -> None:
    reply = await http.post(path, json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == field


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"role": "user", "content": {"text": "a"}}]}, "messages"),
        ({"stream": "perhaps"}, "stream"),
        ({"stream": True, "stream_options": "usage"}, "stream_options"),
        ({"logprobs": True, "top_logprobs": "all"}, "top_logprobs"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": {}}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ],
)
async def test_nonsense_is_refused_by_its_name(
    more: dict[str, Any], field: str, http: httpx.AsyncClient
) -> None:
    reply = await chat(http, "open the door", **more)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, field)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"[]", 400),
        (b'"text"', 400),
        (b'{"messages": ', 400),
        (b"[" * 200_000, 400),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', 400),
        (b" " * (MOST_BYTES + 1), 413),
    ],
)
async def test_bodies_that_are_none_are_refused_and_the_next_is_answered(
    body: bytes, status: int, http: httpx.AsyncClient
) -> None:
    for path in ("/v1/chat/completions", "/classify", "/tokenize", "/tiercel/score"):
        reply = await http.post(path, content=body)
        assert (reply.status_code, reply.json()["error"]["type"]) == (status, "invalid_request_error"), path
    assert (await chat(http, "sell the gate")).json()["choices"][0]["message"]["content"] == "sell"


async def test_of_several_types_the_fault_of_the_one_that_came_is_told(http: httpx.AsyncClient) -> None:
    """And not that a list is no text."""
    for texts, said in ((["a"] * 257, "input: List should have at most 256 items"), (["a", 5], "input.1: ")):
        error = (await http.post("/classify", json={"input": texts})).json()["error"]
        assert (error["message"].startswith(said), error["param"]) == (True, "input"), error
    error = (await http.post("/v1/completions", json={"prompt": "once", "max_tokens": 9})).json()["error"]
    assert error["message"] == "prompt: a classifier completes no text; ask /v1/classify, or a chat"


async def test_paths_and_methods_that_there_are_not_are_told_in_openai_s_form(
    http: httpx.AsyncClient,
) -> None:
    assert (
        (await http.post("/v1/embeddings", json={})).json()["error"]["message"].startswith("/v1/embeddings")
    )
    reply = await http.get("/v1/chat/completions")
    assert (reply.status_code, reply.headers["allow"]) == (405, "POST")
    assert "GET" in reply.json()["error"]["message"]


async def test_of_a_text_without_end_the_beginning_is_read(http: httpx.AsyncClient) -> None:
    reply = await chat(http, "close the window " + "now " * 1_000_000)
    assert reply.json()["usage"]["prompt_tokens"] == 64, "the encoder's longest"


async def test_a_pass_of_long_texts_holds_few_of_them(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 of 512 tokens would take 1.1 GiB, more than the engine is placed with."""
    run, sizes = Session.run, list[tuple[int, int]]()

    def seen(session: Session, ids: Any) -> Any:
        sizes.append((len(ids), max(map(len, ids))))
        return run(session, ids)

    monkeypatch.setattr(Session, "run", seen)
    monkeypatch.setattr(classifier_module, "TOKENS", 256)
    texts = ["open the door " + "now " * 100, *["close the window"] * 8] * 5
    reply = (await http.post("/classify", json={"input": texts})).json()
    assert [one["label"] for one in reply["data"][1:9]] == ["close"] * 8
    assert len(reply["data"]) == len(texts) == sum(count for count, _ in sizes)
    assert max(count * longest for count, longest in sizes) == 256, "four of the longest, 64"
    assert max(count for count, _ in sizes) >= 4, "together all the same"


async def test_an_engine_that_fails_fails_one_request_and_says_so(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(Session, "run", fails)
        reply = await chat(http, "open the door")
        assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")
        assert "RuntimeError" in reply.json()["error"]["message"]
    assert (await chat(http, "open the door")).status_code == 200
    assert (await http.get("/health")).status_code == 200


async def test_the_watch_is_told_what_it_thinks_of_a_label(http: httpx.AsyncClient) -> None:
    """As the gateway asks a reference about a variant's answer (``gateway/quality/examiner.py``)."""

    async def ask(_: str, path: str, body: bytes) -> bytes:
        reply = await http.post(path, content=body)
        assert reply.status_code == 200, reply.text
        return reply.content

    request = {"messages": [{"role": "user", "content": "paint the gate soon"}]}
    said = (await chat(http, "paint the gate soon", logprobs=True)).json()["choices"][0]["logprobs"]
    own = [(said["content"][0]["token"], said["content"][0]["logprob"])]
    agreed = compare(own, await Examiner(ask).rows("", request, "paint"))
    disputed = compare([("sell", -0.01)], await Examiner(ask).rows("", request, "sell"))
    assert agreed is not None
    assert disputed is not None
    assert (agreed.result, agreed.divergence) == ("agreed", pytest.approx(0))
    assert (disputed.result, disputed.disagreement) == ("disputed", 1)


async def test_the_evaluator_gets_an_exact_kl_over_the_labels(http: httpx.AsyncClient) -> None:
    client = InProcess(http)
    user = {"role": "user", "content": "paint the window later"}
    prompt = await client.tokenize([user], True)
    whole = await client.tokenize([user, {"role": "assistant", "content": "paint"}])
    assert len(whole) == len(prompt) + 1
    scored, kept = await client.score_and_keep(whole, len(prompt))
    assert scored.vocabulary == 4
    assert np.exp(scored.came[0]) > 0.5
    again = await client.score_against(whole, len(prompt), kept)
    assert again.kl is not None
    assert again.kl[0] == pytest.approx(0, abs=1e-9)
    with pytest.raises(Exception, match="none of the 4 labels"):
        await client.tokenize([user, {"role": "assistant", "content": "demolish"}])


async def test_its_account_says_whether_its_weights_are_integers(http: httpx.AsyncClient) -> None:
    account = account_of_workers((await http.get("/tiercel/account")).json())
    assert (account.quantization, account.engine) == ("none", "onnxruntime 1.32")


async def test_a_full_line_is_said(http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*_: Any) -> Any:
        raise FullError("1024 texts wait already")

    monkeypatch.setattr(Classifier, "of_texts", full)
    reply = await chat(http, "open the door")
    assert reply.status_code == 503
    assert reply.headers["retry-after"] == "1"
