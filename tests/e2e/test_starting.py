"""`tiercel up MODEL` on a checkpoint that nobody has seen, with no file: to an answer through the gateway."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import pytest

from deploy.cli import main
from deploy.engine import free_port
from gateway.config import load_config
from quantize.card import Card, read_card, variant_directory
from tests.e2e.conftest import ROOT
from tests.quantize.tiny import make_checkpoint

pytestmark = pytest.mark.engine
TIERCEL = (sys.executable, "-m", "deploy.cli")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def words(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


@contextmanager
def running(directory: Path, model: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command as a person types it, in an empty directory."""
    with log.open("wb") as output:
        up = subprocess.Popen(
            [*TIERCEL, "up", str(model)],
            cwd=directory,
            env=ENVIRONMENT,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield up
    finally:
        if up.poll() is None:
            up.send_signal(signal.SIGINT)
            up.wait(timeout=120)


def until(up: subprocess.Popen[bytes], log: Path, text: str, patience_s: float = 600.0) -> None:
    deadline = time.monotonic() + patience_s
    while text not in words(log):
        assert up.poll() is None, words(log)
        assert time.monotonic() < deadline, words(log)
        time.sleep(0.2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, and sure of itself: else every rounding would change every choice."""
    from safetensors.torch import load_file, save_file

    made = make_checkpoint(tmp_path_factory.mktemp("models") / "newcomer", max_position_embeddings=512)
    tensors = load_file(made / "model.safetensors")
    tensors["lm_head.weight"] *= 20
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    return made


@pytest.fixture
def path(model: Path, tmp_path: Path) -> Path:
    """The file that the command would write, with fewer conversations and ports that are free."""
    path = tmp_path / "tiercel.yaml"
    main(["init", str(model), "--out", str(path)])
    port, base = free_port("127.0.0.1"), free_port("127.0.0.1", together=3)
    few = "conversations: { count: 100, max_tokens: 16 }\n"
    text = path.read_text(encoding="utf-8").replace("\nengine:\n", f"\nengine:\n  base_port: {base}\n")
    path.write_text(text.replace("gateway: { ", f"gateway: {{ port: {port}, ") + few, encoding="utf-8")
    return path


async def test_a_directory_alone_becomes_a_gateway_that_answers(model: Path, path: Path) -> None:
    tmp_path = path.parent
    log = tmp_path / "first.log"
    with running(tmp_path, model, log) as up:
        until(up, log, "conversations to judge by")
        up.send_signal(signal.SIGINT)
        assert up.wait(timeout=120) == 130, words(log)
    assert "interrupted; what was finished is kept" in words(log)

    log = tmp_path / "second.log"
    with running(tmp_path, model, log) as up:
        until(up, log, "Tiercel is up at")
        assert "conversations to calibrate with" not in words(log), "they were answered in the first run"
        config = load_config(path)
        url = f"http://127.0.0.1:{config.gateway.port}/v1/chat/completions"
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as http:
            for role in ("default", "auxiliary", "core"):
                body = {"model": role, "max_tokens": 4, "messages": [{"role": "user", "content": "who?"}]}
                async with http.post(url, json=body) as answer:
                    assert answer.status == 200, await answer.text()
                    assert answer.headers["x-tiercel-variant"] in config.served
                    passing = read(path, answer.headers["x-tiercel-variant"])
                    assert role in passing.passed
    assert up.returncode == 0, words(log)

    log = tmp_path / "third.log"
    with running(tmp_path, model, log) as up:
        until(up, log, "Tiercel is up at")
        again = words(log)
        assert "evaluate" not in again, "everything was known"
        assert load_config(path) == config


def read(path: Path, identity: str) -> Card:
    model, _, variant = identity.partition(":")
    return read_card(variant_directory(load_config(path).of(model).variants_dir, variant))
