"""The gateway is never narrower than the engine: thousands of requests, made from its own description of its
routes, straight to it and through the gateway. Status and answer are the same but for what ``ALLOWED`` says.
"""

import contextlib
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.engine import EngineSpec, command, environment, free_port
from gateway.config import Engine
from quantize.card import Card, write_card
from quantize.core.files import point
from tests.e2e.conftest import ROOT, stop_stack
from tests.e2e.differences import Answer
from tests.e2e.request_cases import Case, cases

pytestmark = pytest.mark.engine

TRIES = 3
"""An engine that is busy puts two tokens into one event: what differs each time differs."""
MODEL = ROOT / "deploy/assistant/model"


@dataclass(frozen=True)
class Kind:
    """What an engine is for, and so which of its routes there are."""

    flags: tuple[str, ...]
    every: int
    """One in so many of the cases that are made is asked: which, differs between the two gateways."""
    least: int
    """How many that has to come to."""
    fine: Case
    """What it answers as long as it is well."""


KINDS = {
    "writes": Kind(
        ("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--enable-scale-out"),
        3,
        1000,
        Case("/v1/completions", b'{"prompt": "a", "max_tokens": 1}'),
    ),
    "pools": Kind(
        ("--runner", "pooling", "--convert", "embed"), 9, 400, Case("/v1/embeddings", b'{"input": "a"}')
    ),
}


@dataclass(frozen=True)
class Urls:
    kind: Kind
    engine: str
    gateways: tuple[str, ...]
    """One that listens to no answer, and one that listens to all."""


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while True:
        with contextlib.suppress(OSError):
            if urllib.request.urlopen(url, timeout=5).status == 200:
                return
        assert process.poll() is None, log.read_text(errors="replace")
        assert time.monotonic() < deadline, log.read_text(errors="replace")
        time.sleep(0.5)


def demo_card() -> Card:
    return Card(
        model="assistant",
        variant="bf16",
        reference="bf16",
        scheme="bf16",
        method="none",
        weight_bits=16,
        module_bits={},
        weight_bytes=8_000_000,
        kv_bytes_per_token=1024,
        max_model_len=1024,
        versions={},
        created="2026-11-20",
        files={},
    )


@pytest.fixture(scope="module", params=KINDS)
def urls(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Urls]:
    """An engine of the demo model, and two gateways before it."""
    stop_stack()
    directory = tmp_path_factory.mktemp("differential")
    kind = KINDS[request.param]
    settings = Engine(
        python=ROOT / ".venv-engine/bin/python",
        env={"OMP_NUM_THREADS": "1"},
        max_num_seqs=16,
        extra_args=kind.flags,
    )
    card = demo_card()
    place = directory / "variants/assistant/bf16" / card.version
    place.mkdir(parents=True)
    write_card(card, place)
    point(place.parent / "current", card.version)
    spec = EngineSpec(card, MODEL, settings, free_port(settings.host), directory / "engine.log")
    with contextlib.ExitStack() as exits:

        def run(arguments: list[str], log: Path, ready: str, **options: Any) -> None:
            process = subprocess.Popen(
                arguments, stdout=exits.enter_context(log.open("wb")), stderr=subprocess.STDOUT, **options
            )
            exits.callback(process.wait, timeout=60)
            exits.callback(process.terminate)
            wait_for(ready, process, log)

        run(command(spec), spec.log, f"{spec.url}/health", env=environment(spec))
        gateways = []
        for rate in (0.0, 1.0):
            port = free_port("127.0.0.1")
            config = {
                "models": {card.model: {"path": str(MODEL), "serve": ["bf16"]}},
                "variants_dir": str(directory / "variants"),
                "run_dir": str(directory / f"run-{port}"),
                "roles": {"core": {}},
                "default_role": "core",
                "pools": {"bf16": [spec.url]},
                "gateway": {"port": port},
                "quality": {"sample_rate": rate},
                "watch": {"store": "sqlite://"},
            }
            path = directory / f"{port}.yaml"
            path.write_text(yaml.safe_dump(config), encoding="utf-8")
            arguments = [sys.executable, "-m", "gateway", "--config", str(path)]
            url = f"http://127.0.0.1:{port}"
            run(arguments, directory / f"{port}.log", f"{url}/readiness")
            gateways.append(url)
        yield Urls(kind, spec.url, tuple(gateways))


def ask(url: str, case: Case) -> Answer:
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(url + case.path, data=case.body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return Answer(response.status, response.headers.get_content_type(), response.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.headers.get_content_type(), error.read())


@pytest.mark.parametrize("listens", [0, 1])
def test_the_gateway_is_as_wide_as_the_engine(urls: Urls, listens: int) -> None:
    gateway, every = urls.gateways[listens], urls.kind.every
    description = json.loads(urllib.request.urlopen(urls.engine + "/openapi.json", timeout=30).read())
    asked, different = 0, []
    for case in [
        case for number, case in enumerate(cases(description)) if case.rare or number % every == listens
    ]:
        asked += 1
        for _ in range(TRIES):
            direct, through = ask(urls.engine, case), ask(gateway, case)
            if (why := direct.differs_from(through, case)) is None:
                break
        else:
            different.append(f"{case}\n  {why}\n  engine:  {direct}\n  gateway: {through}")
        if direct.status >= 500:  # what breaks in the engine must not add up to an engine that is left alone
            assert ask(gateway, urls.kind.fine).status == 200
    assert asked > urls.kind.least
    assert not different, f"{len(different)} of {asked}:\n" + "\n".join(different[:20])
