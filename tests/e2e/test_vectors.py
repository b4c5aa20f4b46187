"""What a pooling engine serves, through the gateway: embeddings, scores, ranks."""

import contextlib
import math
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import openai
import pytest
import yaml

from deploy.engine import EngineSpec, command, environment, free_port
from gateway.config import Engine
from quantize.card import variant_directory
from tests.e2e.conftest import ROOT, Stack, stop_stack

pytestmark = pytest.mark.engine

TEXTS = ["what is my balance", "how much money do i have", "will it rain in oslo tomorrow"]


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while True:
        with contextlib.suppress(OSError):
            if urllib.request.urlopen(url, timeout=5).status == 200:
                return
        assert process.poll() is None, log.read_text(errors="replace")
        assert time.monotonic() < deadline, log.read_text(errors="replace")
        time.sleep(0.5)


@pytest.fixture(scope="module")
def urls(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A pooling engine of the reference, and a gateway before it."""
    stop_stack()
    directory = tmp_path_factory.mktemp("vectors")
    settings = Engine(
        python=ROOT / ".venv-engine/bin/python",
        env={"OMP_NUM_THREADS": "1"},
        extra_args=("--runner", "pooling", "--convert", "embed"),
    )
    card = stack.cards["bf16"]
    variant = variant_directory(stack.model.variants_dir, "bf16")
    spec = EngineSpec(card, variant, settings, free_port(settings.host), directory / "engine.log")
    port = free_port("127.0.0.1")
    config = {
        "models": {card.model: {"path": str(stack.model.path), "serve": ["bf16"]}},
        "variants_dir": str(stack.config.variants_dir),
        "run_dir": str(directory / "run"),
        "roles": {"searcher": {}},
        "default_role": "searcher",
        "pools": {"bf16": [spec.url]},
        "gateway": {"port": port},
    }
    (directory / "tiercel.yaml").write_text(yaml.safe_dump(config))
    started = []
    try:
        for name, line, env in (
            ("engine", command(spec), environment(spec)),
            ("gateway", [sys.executable, "-m", "gateway", "--config", str(directory / "tiercel.yaml")], None),
        ):
            log = directory / f"{name}.log"
            with log.open("wb") as output:
                started.append(
                    subprocess.Popen(line, stdout=output, stderr=output, env=env, start_new_session=True)
                )
            url = f"{spec.url}/health" if name == "engine" else f"http://127.0.0.1:{port}/readiness"
            wait_for(url, started[-1], log)
        yield f"http://127.0.0.1:{port}", spec.url
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(30)


@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_embeddings_are_the_engines_own(urls: tuple[str, str], encoding: str) -> None:
    found = []
    for url in urls:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            found.append(
                await client.embeddings.create(model="assistant", input=TEXTS, encoding_format=encoding)
            )
    ours, theirs = found
    assert [one.embedding for one in ours.data] == [one.embedding for one in theirs.data]
    assert ours.usage.prompt_tokens == theirs.usage.prompt_tokens > 0
    assert [one.index for one in ours.data] == [0, 1, 2]
    if encoding == "float":
        vectors = [one.embedding for one in ours.data]
        assert all(math.isclose(math.hypot(*vector), 1, rel_tol=1e-2) for vector in vectors)
        assert len({tuple(vector) for vector in vectors}) == 3


async def test_a_role_and_a_variant_may_be_named(urls: tuple[str, str]) -> None:
    async with openai.AsyncOpenAI(base_url=f"{urls[0]}/v1", api_key="none") as client:
        first = await client.embeddings.create(model="searcher", input="hello")
        second = await client.embeddings.with_raw_response.create(model="assistant:bf16", input="hello")
        assert first.data[0].embedding == second.parse().data[0].embedding
        assert second.headers["x-tiercel-variant"] == "assistant:bf16"
        with pytest.raises(openai.NotFoundError, match="does not exist; use one of"):
            await client.embeddings.create(model="ada", input="hello")
        with pytest.raises(openai.BadRequestError, match="Field required"):
            await client.post("/embeddings", body={"model": "assistant"}, cast_to=object)


async def test_scores_and_ranks(urls: tuple[str, str], http: aiohttp.ClientSession) -> None:
    url = urls[0]
    asked = {"model": "assistant", "text_1": TEXTS[0], "text_2": TEXTS}
    async with http.post(f"{url}/v1/score", json=asked) as response:
        assert response.status == 200, await response.text()
        scores = [one["score"] for one in (await response.json())["data"]]
    assert scores[0] == max(scores)
    assert math.isclose(scores[0], 1, rel_tol=1e-2)
    asked = {"model": "assistant", "query": TEXTS[0], "documents": TEXTS}
    async with http.post(f"{url}/v1/rerank", json=asked) as response:
        assert response.status == 200, await response.text()
        ranked = (await response.json())["results"]
    assert ranked[0]["index"] == 0
    assert [one["relevance_score"] for one in ranked] == sorted(scores, reverse=True)


async def test_what_such_an_engine_does_not_serve_is_said(
    urls: tuple[str, str], http: aiohttp.ClientSession
) -> None:
    url = urls[0]
    asked = {"model": "assistant", "messages": [{"role": "user", "content": "hello"}]}
    async with http.post(f"{url}/v1/chat/completions", json=asked) as response:
        assert response.status == 404
        assert "do not serve /v1/chat/completions" in (await response.json())["error"]["message"]
    async with http.post(f"{url}/tokenize", json={"model": "assistant", "prompt": "hello"}) as response:
        assert (await response.json())["count"] > 0


async def test_tokens_are_counted(urls: tuple[str, str], http: aiohttp.ClientSession) -> None:
    async def prompt_tokens() -> float:
        async with http.get(f"{urls[0]}/metrics") as response:
            lines = (await response.text()).splitlines()
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith("tiercel_tokens_total{") and 'kind="prompt"' in line
        )

    before = await prompt_tokens()
    asked = {"model": "assistant", "input": TEXTS}
    async with http.post(f"{urls[0]}/v1/embeddings", json=asked) as response:
        used = (await response.json())["usage"]["prompt_tokens"]
    assert await prompt_tokens() - before == used > 0
