"""`tiercel up` with stand-in engines: it starts, restarts what dies, and leaves nothing behind.

The engine environment's interpreter is replaced by a script that starts the shipped fake engine on
the port that it is given, so everything but vLLM is the real thing.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from deploy.cli import main
from deploy.engine import EngineProcess, EngineStartError, command, environment, free_port
from deploy.fleet.engines import engine_specs
from deploy.supervisor import Stack
from gateway.config import Config, ConfigError, load_config
from gateway.kept.store import About, Row
from quantize.card import Outcome, Verdict
from quantize.core.checkpoint import open_checkpoint
from quantize.core.modules import read_modules
from quantize.core.plan import uniform
from quantize.registry import Registry
from tests.deploy.kept import changed, fill

ROOT = Path(__file__).resolve().parents[2]

FAKE_ENGINE = f"""#!/bin/sh
while [ $# -gt 0 ]; do
  [ "$1" = --port ] && port=$2
  shift
done
exec {sys.executable} -P -m gateway.upstream.fake --port "$port"
"""


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    engine = tmp_path / "python"
    engine.write_text(FAKE_ENGINE, encoding="utf-8")
    engine.chmod(engine.stat().st_mode | stat.S_IXUSR)
    path = tmp_path / "tiercel.yaml"
    path.write_text(
        f"""
models: {{assistant: {{path: {ROOT}/deploy/assistant/model, serve: [bf16]}}}}
variants_dir: variants
roles: {{core: {{}}}}
default_role: core
run_dir: run
gateway: {{port: {free_port("127.0.0.1")}}}
engine:
  {{base_port: {free_port("127.0.0.1", 3)}, python: {engine}, start_timeout_s: 30, stop_timeout_s: 5}}
""",
        encoding="utf-8",
    )
    main(["quantize", "--config", str(path), "--no-evaluate", "bf16"])
    return path


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        await asyncio.sleep(0.05)


async def status(url: str) -> int:
    async with aiohttp.ClientSession() as session:
        try:
            async with session.get(url) as response:
                return response.status
        except aiohttp.ClientError:
            return 0


async def test_serves_restarts_a_crashed_engine_and_stops_cleanly(config_path: Path) -> None:
    said: list[str] = []
    others = set(psutil.Process().children(recursive=True))  # of other tests, such as a resource tracker
    async with Stack(load_config(config_path), config_path, said.append) as stack:
        assert await status(stack.url + "/readiness") == 200
        engine = stack.engines["assistant:bf16"]
        crashed = engine.pid
        assert crashed is not None
        os.kill(crashed, signal.SIGKILL)
        await until(lambda: any("is ready again" in line for line in said))
        assert engine.pid != crashed
        assert any("ended with status -9; starting it again in 1 s" in line for line in said)
        family = {psutil.Process(engine.pid), *psutil.Process().children(recursive=True)} - others
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not (config_path.parent / "run/engines.json").exists()


async def test_a_role_that_nothing_may_serve_is_said_before_an_engine_is_started(config_path: Path) -> None:
    """With large models it would be said after minutes, by a gateway that did not start."""
    with_a_version_that_fails(config_path)

    def without_reference(settings: dict[str, Any]) -> None:
        settings["models"]["assistant"]["serve"] = ["int4"]
        settings["watch"] = {"reference": "none"}

    changed(config_path, without_reference)
    stack = Stack(load_config(config_path), config_path, lambda _text: None)
    with pytest.raises(ConfigError, match=r"roles\.core: the reference assistant:bf16 is not served"):
        await stack.__aenter__()
    assert all(engine.pid is None for engine in stack.engines.values())


async def test_what_waits_for_the_reference_is_scored_from_time_to_time(config_path: Path) -> None:
    def batch(settings: dict[str, Any]) -> None:
        settings |= {"kept": {}, "watch": {"reference": "batch", "batch": {"every_s": 0.2}}}

    changed(config_path, batch)
    about = About("answer", "core", "assistant:int8", "0" * 12, time.time())
    fill(config_path, [Row(about, b"of a variant that is gone")])
    said: list[str] = []
    async with Stack(load_config(config_path), config_path, said.append):
        await until(lambda: any(line.startswith("watch: 1 answers were dropped") for line in said))


def test_sigterm_ends_everything_with_status_0(config_path: Path) -> None:
    config = load_config(config_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy.cli", "up", "--config", str(config_path)],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "curl" in line and "/metrics" in line:
            break
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2, "".join(lines)
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=30)
    assert process.returncode == 0, rest
    assert "stopped; logs are in" in rest
    assert "Traceback" not in "".join(lines) + rest
    assert not [p for p in children if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert config.gateway.port > 0


def dead_engine(config_path: Path, script: str) -> Config:
    config = load_config(config_path)
    assert config.engine.python is not None
    config.engine.python.write_text(script, encoding="utf-8")
    return config


def with_a_version_that_fails(config_path: Path) -> tuple[Config, Registry, str, str]:
    """The configuration with an int4 of two versions: the first passed, and the second, in use, fails."""
    text = config_path.read_text(encoding="utf-8").replace("serve: [bf16]", "serve: [bf16, int4]")
    config_path.write_text(text, encoding="utf-8")
    config = load_config(config_path)
    model = config.of("assistant")
    checkpoint = open_checkpoint(model.path)
    registry = Registry(config.variants_dir / "assistant", "assistant", "bf16")

    def make(out: Path) -> None:
        for name in ("model.safetensors", "config.json"):
            (out / name).write_bytes((model.path / name).read_bytes())

    def make_other(out: Path) -> None:
        make(out)
        (out / "generation_config.json").write_text("{}", encoding="utf-8")

    plan = uniform(read_modules(checkpoint), "w4a16-g64", method="rtn")
    good = registry.add(checkpoint, "int4", plan, None, make=make)
    passed = Verdict(outcome=Outcome.PASSED, reasons=("x",))
    registry.update(good.model_copy(update={"gate": {"core": passed}}))
    other = plan.model_copy(update={"method": "mse"})
    bad = registry.add(checkpoint, "int4", other, None, make=make_other)
    registry.use("int4", bad.version)
    fails = f"case \"$*\" in *{bad.version}*) echo 'ValueError: group size 48'; exit 1;; esac\n"
    assert config.engine.python is not None
    script = FAKE_ENGINE.replace("#!/bin/sh\n", "#!/bin/sh\n" + fails)
    config.engine.python.write_text(script, encoding="utf-8")
    return config, registry, good.version, bad.version


async def test_a_version_that_does_not_load_gives_way_to_one_that_passed(config_path: Path) -> None:
    config, registry, good, bad = with_a_version_that_fails(config_path)
    said: list[str] = []
    async with Stack(config, config_path, said.append) as stack:
        assert await status(stack.url + "/readiness") == 200
        assert stack.engines["assistant:int4"].spec.directory.name == good
    assert registry.current("int4") == good
    assert registry.card("int4", bad).engine_words == "ValueError: group size 48"
    assert any("is used instead of" in line for line in said)


async def test_engine_that_dies_at_start_shows_its_last_words(config_path: Path) -> None:
    config = dead_engine(config_path, "#!/bin/sh\necho loading; echo 'not enough KV blocks' >&2; exit 3\n")
    with pytest.raises(BaseException) as failed:  # noqa: PT011 - a group when several engines start
        async with Stack(config, config_path, lambda _: None):
            pass
    text = str(failed.value)
    assert "engine assistant:bf16 ended with status 3 while starting" in text
    assert "not enough KV blocks" in text


async def test_engine_port_in_use(config_path: Path) -> None:
    config = load_config(config_path)
    server = await asyncio.start_server(lambda r, w: None, "127.0.0.1", config.engine.base_port)
    async with server:
        with pytest.raises(EngineStartError, match=f"port {config.engine.base_port} on 127.0.0.1 is in use"):
            await EngineProcess(engine_specs(config)[0]).start()


async def test_engine_that_hangs_is_given_up_and_killed(config_path: Path) -> None:
    config = dead_engine(config_path, "#!/bin/sh\ntrap '' TERM\nwhile :; do sleep 1; done\n")
    settings = config.engine.model_copy(update={"start_timeout_s": 1.0, "stop_timeout_s": 0.5})
    engine = EngineProcess(dataclasses.replace(engine_specs(config)[0], settings=settings))
    await engine.start()
    with pytest.raises(EngineStartError, match=r"was not ready after 1 s; raise engine\.start_timeout_s"):
        await engine.wait_ready()
    await engine.stop()
    with contextlib.suppress(psutil.NoSuchProcess):
        assert psutil.Process(engine.pid).status() == psutil.STATUS_ZOMBIE


async def test_missing_engine_environment(config_path: Path) -> None:
    config = load_config(config_path)
    settings = config.engine.model_copy(update={"python": Path("/nonexistent/python")})
    with pytest.raises(EngineStartError, match="run `make setup`"):
        await EngineProcess(dataclasses.replace(engine_specs(config)[0], settings=settings)).start()


def test_command_line_comes_from_the_card(config_path: Path) -> None:
    config = load_config(config_path)
    spec = engine_specs(config)[0]
    card = spec.card.model_copy(update={"kv": "fp8", "max_model_len": 512})
    spec = dataclasses.replace(spec, card=card)
    line = command(spec)
    pairs = dict(itertools.pairwise(line))
    assert pairs["--kv-cache-dtype"] == "fp8"
    assert pairs["--max-model-len"] == "512"
    assert pairs["--served-model-name"] == "assistant"
    assert pairs["--load-format"] == "safetensors"
    assert pairs["--config-format"] == "hf"
    started = environment(spec)
    assert started["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert started["OMP_NUM_THREADS"].isdigit()
