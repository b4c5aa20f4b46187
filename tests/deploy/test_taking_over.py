"""`tiercel up` takes over a version while clients ask: nothing is cut, and the role stays served.

Engines are stand-ins that answer with the name of the directory that they serve, and can be drained.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from deploy.engine import free_port
from deploy.models import registry_of
from deploy.supervisor import Stack
from gateway.config import Config, load_config
from quantize.card import Card, Outcome, Verdict
from quantize.core.checkpoint import open_checkpoint
from quantize.core.modules import read_modules
from quantize.core.plan import uniform
from tests.deploy.test_supervisor import ROOT, until

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gateway"))

from gateway_stack import make_card

ENGINE = f'''#!{sys.executable}
import asyncio, sys
sys.path.insert(0, "{ROOT}")
from aiohttp import web
from gateway.upstream.fake import FakeEngine, Script

given = dict(zip(sys.argv[1:], sys.argv[2:]))
version = given["--model"].rstrip("/").rpartition("/")[2]
if version in open("{{refused}}").read().split():
    sys.exit("ValueError: group size 48 is not divisible")

class Engine(FakeEngine):
    def app(self):
        app = super().app()
        app.router.add_post("/tiercel/drain", self.drain)
        return app

    async def drain(self, request):
        self.script.healthy = False
        return web.Response()

async def serve():
    engine = Engine(Script(text=" ".join([version] * 20), token_delay_s=0.1))
    async with engine.serving(int(given["--port"])):
        await asyncio.Event().wait()

asyncio.run(serve())
'''


class Case:
    """A stack whose int8 has two versions, both of which passed; the first is in use."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.said = directory, list[str]()
        self.refused = directory / "refused"
        self.refused.touch()
        engine = directory / "python"
        engine.write_text(ENGINE.replace("{refused}", str(self.refused)), encoding="utf-8")
        engine.chmod(engine.stat().st_mode | stat.S_IXUSR)
        self.path = directory / "tiercel.yaml"
        self.path.write_text(
            f"""
models: {{assistant: {{path: {ROOT}/deploy/assistant/model, serve: [bf16, int8]}}}}
variants_dir: variants
roles: {{core: {{}}}}
default_role: core
run_dir: run
watch: {{enabled: false}}
gateway: {{port: {free_port("127.0.0.1")}, health_interval_s: 0.1}}
engine:
  {{base_port: {free_port("127.0.0.1", 3)}, python: {engine}, start_timeout_s: 30, stop_timeout_s: 5}}
""",
            encoding="utf-8",
        )
        self.config: Config = load_config(self.path)
        model = self.config.of("assistant")
        self.registry = registry_of(model)
        checkpoint = open_checkpoint(model.path)
        self.registry.add_reference(checkpoint)
        plan = uniform(read_modules(checkpoint), "w8a8", method="rtn")

        def version(number: int) -> Card:
            def make(out: Path) -> None:
                for name in ("model.safetensors", "config.json"):
                    (out / name).write_bytes((model.path / name).read_bytes())
                (out / "generation_config.json").write_text(json.dumps({"number": number}), encoding="utf-8")

            method = ("rtn", "mse")[number]
            card = self.registry.add(
                checkpoint, "int8", plan.model_copy(update={"method": method}), None, make=make
            )
            found = make_card("int8", passes=("core",))
            gate = {"core": Verdict(outcome=Outcome.PASSED, reasons=("x",))}
            return self.registry.update(
                card.model_copy(
                    update={"evaluation": found.evaluation, "gate": gate, "weight_bytes": 1_000_000}
                )
            )

        self.first, self.second = version(0), version(1)
        self.registry.use("int8", self.first.version)

    @contextlib.asynccontextmanager
    async def up(self) -> AsyncIterator[Stack]:
        async with Stack(self.config, self.path, self.said.append) as stack:
            yield stack

    def heard(self, words: str) -> bool:
        return any(words in line for line in self.said)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


async def answer(
    http: aiohttp.ClientSession, url: str, begun: asyncio.Event | None = None, **more: Any
) -> tuple[int, str]:
    """``begun`` is set when its first part has come."""
    body = {"model": "assistant", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20, **more}
    async with http.post(url + "/v1/chat/completions", json=body) as response:
        first = await response.content.readline()
        if begun is not None:
            begun.set()
        text = (first + await response.content.read()).decode()
        if not more.get("stream"):
            return response.status, text
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert not [chunk for chunk in chunks if "error" in chunk], text
    words = [one["choices"][0]["delta"].get("content") or "" for one in chunks if one["choices"]]
    return response.status, "".join(words)


async def test_what_has_begun_is_finished_and_others_serve_meanwhile(case: Case) -> None:
    async with case.up() as stack, aiohttp.ClientSession() as http:
        before = stack.engines["assistant:int8"].pid
        begun = asyncio.Event()
        whole = asyncio.create_task(answer(http, stack.url, begun, model="assistant:int8", stream=True))
        await begun.wait()
        case.registry.use("int8", case.second.version)
        found = []
        while not case.heard("is served now"):
            found.append(asyncio.create_task(answer(http, stack.url)))
            await asyncio.sleep(0.1)
        status, text = await whole
        assert (status, text.split()) == (200, [case.first.version] * 20)
        answers = await asyncio.gather(*found)
        assert {status for status, _ in answers} == {200}  # whoever asked meanwhile
        assert len(answers) > 5
        assert stack.engines["assistant:int8"].pid != before
        assert stack.engines["assistant:int8"].spec.directory.name == case.second.version
        _, later = await answer(http, stack.url, model="assistant:int8", stream=True)
        assert set(later.split()) == {case.second.version}


async def test_a_version_that_does_not_load_gives_way_to_the_one_before(case: Case) -> None:
    async with case.up() as stack, aiohttp.ClientSession() as http:
        case.refused.write_text(case.second.version, encoding="utf-8")
        case.registry.use("int8", case.second.version)
        await until(lambda: case.heard("is served again"))
        assert case.heard("group size 48 is not divisible")
        assert case.registry.current("int8") == case.first.version
        assert case.registry.card("int8", case.second.version).state == "broken"
        status, text = await answer(http, stack.url, model="assistant:int8", stream=True)
        assert (status, set(text.split())) == (200, {case.first.version})


async def test_where_the_one_before_does_not_start_either_it_is_tried_again(case: Case) -> None:
    """Versions were followed no more from then on, and nobody was told."""
    async with case.up() as stack:
        case.refused.write_text(f"{case.first.version} {case.second.version}", encoding="utf-8")
        case.registry.use("int8", case.second.version)
        await until(lambda: case.heard(f"{case.first.version} is not served again yet"))
        case.refused.write_text("", encoding="utf-8")
        await until(lambda: case.heard("engine assistant:int8 is ready again"))
        case.registry.update(case.second)
        case.registry.use("int8", case.second.version)
        await until(lambda: case.heard(f"{case.second.version} is served now"))
        assert stack.engines["assistant:int8"].spec.directory.name == case.second.version


async def test_a_stack_that_is_stopped_meanwhile_leaves_nothing_behind(case: Case) -> None:
    async with aiohttp.ClientSession() as http:
        async with case.up() as stack:
            begun = asyncio.Event()
            whole = asyncio.create_task(answer(http, stack.url, begun, model="assistant:int8", stream=True))
            await begun.wait()
            case.registry.use("int8", case.second.version)
            await until(lambda: case.heard("its engine takes it over"))
            engines = dict(stack.engines)
        await asyncio.gather(whole, return_exceptions=True)
    assert [engine.exit_code is not None for engine in engines.values()] == [True, True]
    assert not case.heard("starting it again")
    assert not case.heard("is served")
