"""llama.cpp's server: what clients, the gateway and the evaluator ask of it."""

from __future__ import annotations

import asyncio
import json
import queue
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from deploy.engine_server import MOST_BYTES
from deploy.llama import engine as engine_module
from deploy.llama.api import make_app
from deploy.llama.engine import Answering
from deploy.llama.sampling import Drawn, Sampler, Sampling, log_softmax
from deploy.llama.serve import arguments, make_server
from deploy.llama.server import Server
from deploy.llama.text import Text
from quantize.core.checkpoint import open_checkpoint
from quantize.evaluate.client import EngineClient
from quantize.evaluate.reference import Kept
from quantize.export.gguf import examine, export_gguf
from quantize.export.llama import LlamaContext, LlamaError, last_logits
from tests.quantize.tiny import MODEL, without_added_words

MESSAGES = [
    {"role": "system", "content": "Classify the intent of the message."},
    {"role": "user", "content": "when is my credit card bill due"},
]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, in 16 bits."""
    directory = without_added_words(shutil.copytree(MODEL, tmp_path_factory.mktemp("demo") / "model"))
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    export_gguf(examine(open_checkpoint(directory)), "f16", path)
    return path


@pytest.fixture
async def server(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    monkeypatch.setenv("TIERCEL_REFERENCE", str(MODEL))
    given = ["--model", str(gguf), "--port", "1", "--context", "512", "--cache-tokens", "1024"]
    made = make_server(arguments().parse_args([*given, "--threads", "1", "--slots", "2", "--name", "demo"]))
    made.engine.start()
    yield made
    made.engine.stop()
    made.engine.model.close()


@pytest.fixture
async def http(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(make_app(server), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=60) as client:
        yield client


async def chat(http: httpx.AsyncClient, **more: Any) -> httpx.Response:
    body = {"model": "demo", "messages": MESSAGES, "temperature": 0, "max_tokens": 12, **more}
    return await http.post("/v1/chat/completions", json=body)


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def test_an_answer_is_whole_and_counted(http: httpx.AsyncClient) -> None:
    reply = (await chat(http)).json()
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": "bill_due"}
    assert reply["choices"][0]["finish_reason"] == "stop"
    usage = reply["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 10


async def test_a_stream_says_the_same_with_usage_in_every_chunk_where_asked(http: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    found = events((await chat(http, stream=True, stream_options=options)).text)
    assert found[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(one["choices"][0]["delta"]["content"] for one in found[:-1])
    assert text == "bill_due"
    assert all("usage" in one for one in found)
    assert found[-1]["choices"] == []
    assert found[-2]["choices"][0]["finish_reason"] == "stop"


async def test_log_probabilities_are_told_of_chat_and_of_text(http: httpx.AsyncClient) -> None:
    reply = (await chat(http, logprobs=True, top_logprobs=3)).json()
    first = reply["choices"][0]["logprobs"]["content"][0]
    assert len(first["top_logprobs"]) == 3
    assert first["top_logprobs"][0]["token"] == first["token"]
    assert -1 < first["logprob"] <= 0
    body = {"model": "demo", "prompt": [1, 2, 3], "max_tokens": 1, "logprobs": 1}
    told = (await http.post("/v1/completions", json=body)).json()["choices"][0]["logprobs"]
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["top_logprobs"]) == 1


async def test_an_answer_stops_at_a_text_that_spans_tokens(http: httpx.AsyncClient) -> None:
    reply = (await chat(http, stop=["l_d"])).json()
    assert reply["choices"][0]["message"]["content"] == "bil"
    assert reply["choices"][0]["finish_reason"] == "stop"


def test_text_is_held_back_while_it_may_become_a_stop_string() -> None:
    text = Text(["END"])
    assert [text.add(part) for part in (b"a E", b"N", b"x \xe2\x82", b"\xac EN", b"D more")] == [
        "a ", "", "ENx ", "€ ", ""]  # fmt: skip
    assert text.stopped
    assert Text().add(b"\xe2\x82", last=True) == "�"


async def test_a_seed_makes_other_answers_of_one_request_and_the_same_of_the_next(
    http: httpx.AsyncClient,
) -> None:
    """The first of several is the answer of a request that wants one."""
    how = {"seed": 5, "temperature": 3.0, "ignore_eos": True}
    replies = [(await chat(http, n=n, **how)).json()["choices"] for n in (3, 3, 1)]
    several, again, one = [[each["message"]["content"] for each in reply] for reply in replies]
    assert len(set(several)) == 3
    assert several == again
    assert several[:1] == one


async def test_log_probabilities_that_would_fill_the_memory_are_refused(http: httpx.AsyncClient) -> None:
    reply = await chat(http, logprobs=True, top_logprobs=-1, max_tokens=400, n=2)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "logprobs")
    told = (await chat(http, logprobs=True, top_logprobs=-1, max_tokens=2)).json()["choices"][0]["logprobs"]
    assert len(told["content"][0]["top_logprobs"]) == 2048


async def test_what_is_too_long_is_refused_as_openai_refuses_it(http: httpx.AsyncClient) -> None:
    reply = await chat(http, max_tokens=600)
    error = reply.json()["error"]
    assert reply.status_code == 400
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length is 512" in error["message"]


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"temperature": -1}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"logit_bias": {"9999999": 1}}, "logit_bias"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}},
            "response_format",
        ),
        ({"response_format": {"type": "json_object", "schema": {"enum": [{}] * 100_000}}}, "response_format"),
        (
            {
                "response_format": {
                    "type": "json_object",
                    "schema": {"properties": {str(n): {} for n in range(900)}},
                }
            },
            "response_format",
        ),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages"),
        ({"temperature": "hot"}, "temperature"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"stop": ["a"] * 65}, "stop"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"n": 1000}, "n"),
        ({"max_tokens": 1e400}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "a" * (64 * 512 + 1)}]}, "messages"),
    ],
)
async def test_what_is_not_served_is_refused_by_its_name(
    more: dict[str, Any], field: str, http: httpx.AsyncClient
) -> None:
    body = {"model": "demo", "messages": MESSAGES, "temperature": 0, "max_tokens": 12, **more}
    reply = await http.post("/v1/chat/completions", content=json.dumps(body))  # infinities as well
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == field


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", b"", 400),
        ("/v1/chat/completions", b"[" * 200_000, 400),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        ("/v1/chat/completions", b" " * (MOST_BYTES + 1), 413),
        ("/v1/completions", b'{"prompt": []}', 400),
        ("/v1/completions", b'{"prompt": [[]]}', 400),
        ("/v1/completions", b'{"prompt": [-1]}', 400),
        ("/v1/completions", b'{"prompt": [1, "a"]}', 400),
        ("/v1/completions", b'{"prompt": %b}' % json.dumps(["a"] * 257).encode(), 400),
        ("/tokenize", b"{}", 400),
        ("/tiercel/score", b"[" * 200_000, 400),
        ("/tiercel/score", b'{"tokens": [1, 2], "start": 2}', 400),
        ("/tiercel/score", b'{"tokens": {}, "start": 1}', 400),
        ("/v1/embeddings", b"{}", 404),
        ("/health", b"{}", 405),
    ],
)
async def test_what_is_no_request_is_refused_in_openai_s_form_and_the_next_is_answered(
    path: str, body: bytes, status: int, http: httpx.AsyncClient
) -> None:
    reply = await http.post(path, content=body)
    assert (reply.status_code, reply.json()["error"]["type"]) == (status, "invalid_request_error")
    assert (await chat(http)).json()["choices"][0]["message"]["content"] == "bill_due"


async def test_settings_without_measure_end_no_answer(http: httpx.AsyncClient) -> None:
    """What makes numbers that are none: the thread that decodes would end, and with it the engine."""
    for more in (
        {"temperature": 1e-300},
        {"temperature": 1e300},
        {"logit_bias": {"5": 1e308, "6": -1e308}},
        {"top_p": 1e-300, "temperature": 1},
        {"repetition_penalty": 100, "temperature": 1},
        {"top_k": -5, "min_p": 1, "temperature": 1},
        {"seed": -(10**40), "temperature": 1},
    ):
        reply = await chat(http, **more)
        assert reply.status_code == 200, (more, reply.text)


async def test_an_answer_that_cannot_be_drawn_fails_alone(
    server: Server, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise ValueError("probabilities contain NaN")

    with monkeypatch.context() as patched:
        patched.setattr(Sampler, "draw", fails)
        reply = await chat(http)
        assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")
    assert server.engine.running == 0
    assert (await chat(http)).json()["choices"][0]["message"]["content"] == "bill_due"


async def test_an_engine_that_has_ended_keeps_nobody_waiting(
    server: Server, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    server.engine._on_end = lambda: loop.call_soon_threadsafe(ended.set)

    def fails(*_: Any) -> Any:
        raise LlamaError("llama.cpp could not decode")

    monkeypatch.setattr(LlamaContext, "decode", fails)
    assert (await chat(http)).status_code == 500
    await ended.wait()
    assert (await http.get("/health")).status_code == 503
    reply = await asyncio.wait_for(chat(http), 30)
    assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")


async def test_clients_that_have_left_do_not_fill_the_line(
    server: Server, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "WAITING", 3)
    body = {"model": "demo", "prompt": [1, 2, 3], "max_tokens": 400, "ignore_eos": True}
    asked = [asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(2)]
    while server.engine.running < 2:
        await asyncio.sleep(0.001)
    asked += [asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(3)]
    while server.engine.waiting < 3:
        await asyncio.sleep(0.001)
    for task in asked[2:]:
        task.cancel()
    await asyncio.gather(*asked[2:], return_exceptions=True)
    while server.engine.waiting:
        await asyncio.sleep(0.001)
    assert server.engine.running == 2, "those before them go on"
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)


async def test_an_answer_keeps_to_a_json_schema(http: httpx.AsyncClient) -> None:
    schema = {"type": "object", "properties": {"label": {"enum": ["a", "b"]}}, "required": ["label"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    for temperature in (0, 1):
        reply = await chat(http, response_format=wanted, temperature=temperature, max_tokens=40, seed=3)
        found = json.loads(reply.json()["choices"][0]["message"]["content"])
        assert found["label"] in ("a", "b")


async def test_answers_together_say_what_they_say_alone(http: httpx.AsyncClient) -> None:
    texts = ["transfer ten dollars to savings", "what is the weather", "set an alarm for six", "hello"]

    async def answer(text: str) -> str:
        messages = [MESSAGES[0], {"role": "user", "content": text}]
        return str((await chat(http, messages=messages)).json()["choices"][0]["message"]["content"])

    alone = [await answer(text) for text in texts]
    assert await asyncio.gather(*map(answer, texts)) == alone


async def test_a_cache_is_gone_on_from_by_the_same_salt_alone(
    server: Server, http: httpx.AsyncClient
) -> None:
    counts = server.engine.counts
    await chat(http, cache_salt="one")
    assert counts.prefix_hits == 0
    first = (await chat(http, cache_salt="one")).json()
    hits = counts.prefix_hits
    assert hits > 10
    other = (await chat(http, cache_salt="two")).json()
    assert counts.prefix_hits == hits, "another tenant's cache was gone on from"
    assert first["choices"][0]["message"] == other["choices"][0]["message"]


async def test_a_cache_that_cannot_be_gone_back_in_is_begun_anew(
    server: Server, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models with a state in place of keys and values: what a tenant said before would stay in it."""
    forget, gone = LlamaContext.forget, list[int]()

    def whole_alone(context: LlamaContext, sequence: int, position: int = 0) -> bool:
        gone.append(position)
        return position == 0 and forget(context, sequence)

    monkeypatch.setattr(LlamaContext, "forget", whole_alone)
    for _ in range(2):
        assert (await chat(http)).json()["choices"][0]["message"]["content"] == "bill_due"
    assert gone[-2] > 0
    assert gone[-1] == server.engine.counts.prefix_hits == 0


async def test_a_client_that_leaves_frees_its_slot(server: Server, http: httpx.AsyncClient) -> None:
    body = {"model": "demo", "prompt": [1, 2, 3], "max_tokens": 400, "ignore_eos": True}
    asked = asyncio.create_task(http.post("/v1/completions", json=body))
    while not server.engine.running:
        await asyncio.sleep(0.001)
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    while server.engine.running:
        await asyncio.sleep(0.001)
    assert server.engine.counts.generated_tokens < 400


async def test_a_full_line_is_said_with_when_to_come_again(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "WAITING", 0)
    reply = await chat(http)
    assert reply.status_code == 503
    assert reply.headers["retry-after"] == "1"


async def test_it_tells_the_gateway_how_it_is(server: Server, http: httpx.AsyncClient) -> None:
    from gateway.telemetry.engines import parse_reading

    await chat(http)
    reading = parse_reading((await http.get("/metrics")).text)
    assert reading.running == reading.waiting == 0
    assert reading.prompt_tokens is not None
    assert reading.prompt_tokens > 10
    assert reading.cache_tokens == 1024
    assert (await http.get("/health")).status_code == 200
    await http.post("/tiercel/drain")
    assert (await http.get("/health")).status_code in (200, 503)


def test_a_slot_is_free_before_its_answer_is_told(server: Server) -> None:
    seen: queue.Queue[tuple[Drawn | str | Exception, int]] = queue.Queue()
    engine = server.engine
    work = Answering([1, 2, 3], 2, Sampling(temperature=0), lambda what: seen.put((what, engine.running)))
    engine.submit(work)
    what: Drawn | str | Exception = ""
    while not isinstance(what, str | Exception) or not what:
        what, running = seen.get(timeout=60)
    assert running == 0, what


async def test_its_account_is_what_the_card_says(http: httpx.AsyncClient, gguf: Path) -> None:
    from quantize.account import account_of_workers

    account = account_of_workers((await http.get("/tiercel/account")).json())
    assert account.quantization == "none", "the demo's file has 16 bits"
    assert account.engine.startswith("llama.cpp b")
    assert account.kernels.keys() == {"F16"}


class InProcess(EngineClient):
    """The evaluator's client without a socket."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        super().__init__("http://engine", "demo")
        self._http = http

    async def _request(self, method: str, path: str, body: dict[str, Any] | bytes | None) -> bytes:
        given: dict[str, Any] = {"content": body} if isinstance(body, bytes) else {"json": body}
        reply = await self._http.request(method, path, **(given if body is not None else {}))
        if reply.status_code != 200:
            from quantize.evaluate.client import EngineError

            raise EngineError(f"{path} answered {reply.status_code}: {reply.text}")
        return reply.content


def reference_record(server: Server, tokens: list[int], start: int) -> tuple[Kept, Any]:
    """Hidden states of the reference as an engine keeps them, and its log-probabilities by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    with torch.no_grad():
        hidden = model.model(torch.tensor([tokens])).last_hidden_state[0, start - 1 : -1]
        log_p = torch.log_softmax(model.lm_head(hidden).double(), -1).numpy()
    assert server.head is not None
    about = {"width": server.head.width, "dtype": "bfloat16", "head": server.head.fingerprint()}
    return Kept("hidden", about, hidden.contiguous().view(torch.uint8).numpy().tobytes()), log_p


async def test_the_kl_is_exact_over_the_whole_vocabulary(server: Server, http: httpx.AsyncClient) -> None:
    client = InProcess(http)
    tokens = await client.tokenize(MESSAGES, True)
    tokens, start = [*tokens, 40, 50, 60], len(tokens)
    account = await client.account()
    assert account is not None
    kept, log_p = reference_record(server, tokens, start)
    scored = await client.score_against(tokens, start, kept)
    ours = log_softmax(last_logits(server.engine.model, tokens, start, 1))
    expected = (np.exp(log_p) * (log_p - ours)).sum(-1)
    assert scored.exact
    assert scored.kl is not None
    assert np.allclose(scored.kl, expected, atol=1e-4)
    assert np.allclose(scored.came, [row[token] for row, token in zip(ours, tokens[start:], strict=True)])
    assert (scored.reference_top1 == log_p.argmax(-1)).all()


async def test_hidden_states_of_another_model_are_refused(server: Server, http: httpx.AsyncClient) -> None:
    client = InProcess(http)
    await client.account()
    kept, _ = reference_record(server, [1, 2, 3, 4], 2)
    other = Kept("hidden", {**kept.about, "head": "0" * 32}, kept.data)
    with pytest.raises(Exception, match="another model or head"):
        await client.score_against([1, 2, 3, 4], 2, other)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_draws_keep_to_top_k_top_p_and_seed(seed: int) -> None:
    logits = np.array([0.0, 4.0, 3.9, 1.0, 3.8], np.float32)
    how = Sampling(temperature=1.0, top_k=3, seed=seed)
    drawn = [Sampler(how, [], [], None).draw(logits).token for _ in range(20)]
    assert len(set(drawn)) == 1, "the same seed draws the same"
    assert set(drawn) <= {1, 2, 4}
    # What is decoded beside an answer swaps neighbours in likelihood, and should swap no answers.
    near = np.linspace(0, 1, 500, dtype=np.float32)
    other = near + np.random.default_rng(0).normal(0, 0.01, 500).astype(np.float32)
    one, two = (Sampler(Sampling(seed=seed), [], [], None).draw(row).token for row in (near, other))
    assert abs(one - two) <= 2
    narrow = Sampling(temperature=1.0, top_p=0.1, seed=seed)
    assert Sampler(narrow, [], [], None).draw(logits).token == 1
    biased = Sampling(temperature=0, logit_bias={0: 100.0})
    assert Sampler(biased, [], [], None).draw(logits).token == 0
    held = Sampling(temperature=0, ignore_eos=True)
    assert Sampler(held, [], [1], None).draw(logits).token == 2
