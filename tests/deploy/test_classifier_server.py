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
from quantize.account import account_of_workers
from quantize.core.checkpoint import open_checkpoint
from quantize.export.classifier import train_classifier
from quantize.export.encoder import FLOAT, open_encoder
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
    transport = httpx.ASGITransport(make_app(classifier, "intents", "1.32"))
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
        ("/v1/completions", {"prompt": "once upon a time", "max_tokens": 20}, "prompt"),
    ],
)
async def test_what_is_not_served_is_refused_by_its_name(
    path: str, body: dict[str, Any], field: str, http: httpx.AsyncClient
) -> None:
    reply = await http.post(path, json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == field


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
        raise classifier_module.FullError("1024 texts wait already")

    monkeypatch.setattr(Classifier, "log_probabilities", full)
    reply = await chat(http, "open the door")
    assert reply.status_code == 503
    assert reply.headers["retry-after"] == "1"
