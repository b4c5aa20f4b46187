"""What tests of kept conversations stand on: a configuration with a model that is there, and rows."""

from __future__ import annotations

import asyncio
import stat
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import yaml

from deploy.engine import EngineSpec, free_port
from deploy.models import registry_of
from gateway.config import Config, ModelConfig, load_config
from gateway.kept.cipher import cipher_of
from gateway.kept.conversation import Asked
from gateway.kept.store import About, KeptStore, Row, limits_of, store_url
from quantize.card import Card

ROOT = Path(__file__).resolve().parents[2]

ENGINE = f"""#!{sys.executable}
import asyncio, sys
sys.path.insert(0, "{ROOT}")
from gateway.upstream.fake import FakeEngine, Script

given = dict(zip(sys.argv[1:], sys.argv[2:]))

async def serve():
    script = Script(text="what the reference says", disputes={{disputes!r}})
    async with FakeEngine(script).serving(int(given["--port"])):
        await asyncio.Event().wait()

asyncio.run(serve())
"""


def write_config(directory: Path, disputes: str = "", **changes: Any) -> Path:
    """The demo model, of which ``int8`` alone is served; engines are stand-ins, whose reference disputes
    words with one of these letters."""
    engine = directory / "python"
    engine.write_text(ENGINE.replace("{disputes!r}", repr(disputes)), encoding="utf-8")
    engine.chmod(engine.stat().st_mode | stat.S_IXUSR)
    fields: dict[str, Any] = {
        "models": {"assistant": {"path": str(ROOT / "deploy/assistant/model"), "serve": ["int8"]}},
        "variants_dir": "variants",
        "run_dir": "run",
        "roles": {"intents": {"record": {}}, "core": {}},
        "default_role": "core",
        "gateway": {"port": free_port("127.0.0.1")},
        "engine": {"python": str(engine), "base_port": free_port("127.0.0.1", 3), "start_timeout_s": 60},
        "watch": {"reference": "none"},
        "kept": {},
    }
    path = directory / "tiercel.yaml"
    path.write_text(yaml.safe_dump(fields | changes), encoding="utf-8")
    return path


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a configuration's file."""
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    change(settings)
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")


async def tiercel(path: Path, *words: str) -> tuple[int | None, str, str]:
    """A command in a process of its own: its status, what it found, and what it said."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "deploy.cli", *words, "--config", str(path)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    found, said = await process.communicate()
    return process.returncode, found.decode(), said.decode()


def fill(path: Path, rows: Sequence[Row]) -> None:
    """Put rows into the store of a configuration."""
    config = load_config(path)
    store = opened(config)
    store.keep(rows, limits_of(config), time.time())
    store.close()


def opened(config: Config) -> KeptStore:
    config.run_dir.mkdir(parents=True, exist_ok=True)
    return KeptStore(store_url(config), cipher_of(config, make=True))


def question(*texts: str, role: str = "intents", **more: Any) -> Row:
    """``texts``: of the user, the last one alone or after a system prompt."""
    roles = ("user",) if len(texts) == 1 else ("system", "user")
    messages = [{"role": who, "content": text} for who, text in zip(roles, texts, strict=True)]
    about = About("request", role, "assistant:int8", "", time.time())
    return Row(about, msgspec.msgpack.encode(Asked(messages, **more)))


@asynccontextmanager
async def as_engine(url: str, model: ModelConfig, reference: Card) -> AsyncIterator[EngineSpec]:
    """What answers at ``url`` in place of the engine that would be started."""
    port = urlsplit(url).port
    assert port is not None
    directory = registry_of(model).path(reference.variant, reference.version)
    yield EngineSpec(reference, directory, model.engine, port, model.log(reference.variant))
