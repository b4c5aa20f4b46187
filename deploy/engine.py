"""One engine, vLLM's or another's, as a child process: command line from a card, readiness, log, end."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import math
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from deploy.engine_failures import (
    EngineLoadError,
    EngineRoomError,
    EngineSetupError,
    EngineStartError,
    diagnose,
)
from deploy.launches import environment as own_environment
from deploy.launches import launch_of
from deploy.machine import find_gpus
from deploy.placement import CPU_OVERHEAD, Need, Placed
from deploy.ports import free_port, port_in_use, why_not
from deploy.scratch import Scratch
from gateway.config import Engine as EngineSettings
from gateway.telemetry.engines import parse_reading
from quantize.card import ADAPTER, Card

__all__ = [
    "EngineLoadError",
    "EngineProcess",
    "EngineSpec",
    "EngineStartError",
    "command",
    "environment",
    "free_port",
]

SITE = Path(__file__).with_name("engine_site")
"""What an engine's interpreter runs at start, and the CPU server's entry."""
LAST_LINES = 12
"""Lines of an engine's log that an error message shows."""
DRAIN = "/tiercel/drain"
WITHOUT_ADAPTER = "--without-adapter"
"""After the model's name: what the engine calls its weights where the variant carries an adapter."""
SOCKETS = "tiercel-engine-"
STOP_MARGIN_S = 5.0
"""For an engine that has finished what it had begun to end."""
PORT_FREE_S = 10.0
"""For the port of an engine that has been stopped to be free again."""


@dataclass(frozen=True)
class EngineSpec:
    """What to serve and where."""

    card: Card
    directory: Path
    settings: EngineSettings
    port: int
    log: Path
    placed: Placed = field(default_factory=Placed)

    @property
    def id(self) -> str:
        """The variant's name in the fleet."""
        return self.card.id

    @property
    def url(self) -> str:
        return f"http://{self.settings.host}:{self.port}"


def need_of(card: Card, directory: Path, settings: EngineSettings) -> Need:
    """What an engine of the variant takes: its weights and its KV cache."""
    launch = launch_of(card)
    if launch is not None:
        cache = launch.kv_bytes(card, settings)
    else:
        cache = settings.kv_bytes(card.max_model_len, card.kv_bytes_per_token)
    return Need(
        name=card.id,
        weight_bytes=card.weight_bytes,
        kv_bytes=cache,
        heads=attention_heads(directory),
        env=settings.env,
        arguments=settings.extra_args,
        token_bytes=card.kv_bytes_per_token,
        context=settings.context(card.max_model_len, card.kv_bytes_per_token),
        kv_dtype=card.kv,
        overhead=launch.overhead if launch else CPU_OVERHEAD,
        on_cores=launch is not None,
    )


def attention_heads(directory: Path) -> tuple[int, ...]:
    """Attention and KV heads of a variant by its config, which ranks divide; empty if it names none."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config") or config
    found = (config.get(name) for name in ("num_attention_heads", "num_key_value_heads"))
    return tuple(int(count) for count in found if count)


def shared_flags(settings: EngineSettings) -> list[str]:
    """Arguments that do not depend on the variant or on where it runs, the user's own last.

    The files that Tiercel writes are named, so that the engine does not choose others that lie beside them.
    """
    flags = [
        *("--config-format", "hf"),
        *("--load-format", "safetensors"),
        *("--max-num-seqs", str(settings.max_num_seqs)),
        *("--max-logprobs", "-1"),
        *("--scheduling-policy", "priority"),  # what the gateway's watch asks comes after users' requests
    ]
    if not has_cuda():
        flags.append("--enforce-eager")
    return [*flags, *settings.extra_args]


def command(spec: EngineSpec) -> list[str]:
    """The engine's command line for a variant, from its card."""
    settings = spec.settings
    if (launch := launch_of(spec.card)) is not None:
        return launch.command(spec.card, spec.directory, settings, spec.port, spec.placed)
    arguments = [
        str(settings.python),
        str(SITE / ("serve_scored.py" if has_cuda() else "serve_vllm.py")),
        *("--model", str(spec.directory)),
        *_names(spec),
        *("--host", settings.host),
        *("--port", str(spec.port)),
        *("--max-model-len", str(settings.context(spec.card.max_model_len, spec.card.kv_bytes_per_token))),
        *("--kv-cache-dtype", spec.card.kv),
        *("--uvicorn-log-level", "warning"),
        *("--shutdown-timeout", str(math.ceil(settings.stop_timeout_s))),
        *spec.placed.arguments,
    ]
    return [*arguments, *shared_flags(settings)]


def _names(spec: EngineSpec) -> list[str]:
    """What the engine serves under the model's name: its weights, or those with the adapter that the variant
    carries. Nobody asks for them without it."""
    adapter = spec.card.adapter
    if adapter is None:
        return ["--served-model-name", spec.card.model]
    return [
        *("--served-model-name", f"{spec.card.model}{WITHOUT_ADAPTER}", "--enable-lora"),
        *("--max-lora-rank", str(adapter.engine_rank)),
        *("--lora-modules", f"{spec.card.model}={spec.directory / ADAPTER}"),
    ]


def environment(spec: EngineSpec) -> dict[str, str]:
    """The engine's environment: no hub, no telemetry, our sitecustomize first, its place, then the user's
    own. Of what both name the place's devices hold, which were chosen among the user's."""
    settings = spec.settings
    if launch_of(spec.card) is not None:
        return own_environment(settings, spec.placed, SITE)
    cache = settings.kv_bytes(spec.card.max_model_len, spec.card.kv_bytes_per_token)
    added = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": f"{cache >> 30}",
        "PYTHONPATH": str(SITE),
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
    }
    if spec.card.adapter is not None:
        added["TIERCEL_ADAPTER"] = spec.card.model
    if not has_cuda():
        # A CPU engine compiles its sampler with a C++ compiler at the first request that asks for
        # log-probabilities: 20 s of silence for a gain that a CPU does not show.
        added["TORCH_COMPILE_DISABLE"] = "1"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, **added, **settings.env, **spec.placed.env}


def has_cuda() -> bool:
    """Whether engines run on a GPU here: what placement and targets go by as well."""
    return _listed()


@functools.cache
def _listed() -> bool:
    return bool(find_gpus()[0])


class EngineProcess:
    """A running (or ended) engine. ``start`` and ``wait_ready`` raise EngineStartError."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self._process: asyncio.subprocess.Process | None = None
        self._answered = False
        """Whether it has been ready: before that it has nothing to finish."""
        self._log_from = 0
        """Where in the log this start begins: what an earlier one said is no reason for this one."""
        self._sockets: Scratch | None = None
        """The folder of those that the engine's processes talk through, and leave behind."""

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def exit_code(self) -> int | None:
        return self._process.returncode if self._process else None

    async def start(self) -> None:
        """Start the process in its own process group, its output appended to the log."""
        python = self.spec.settings.python
        if (launch := launch_of(self.spec.card)) is not None:
            if missing := launch.missing():
                raise EngineSetupError(f"engine {self.spec.id}: {missing}")
        elif python is None or not python.exists():
            raise EngineSetupError(
                f"no engine environment at {python}; run `make setup`, or set engine.python"
            )
        if why := why_not(self.spec.settings.host, self.spec.port, "engine.base_port"):
            raise EngineRoomError(why)
        self._answered = False
        self.spec.log.parent.mkdir(parents=True, exist_ok=True)
        self._log_from = self.spec.log.stat().st_size if self.spec.log.exists() else 0
        self._forget_sockets()
        self._sockets = Scratch(SOCKETS)
        with self.spec.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command(self.spec),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={
                    "VLLM_RPC_BASE_PATH": str(self._sockets.path),
                    **environment(self.spec),
                    "TIERCEL_STARTED_BY": str(os.getpid()),
                },
                start_new_session=True,
            )

    async def wait_ready(self) -> None:
        """Return when the engine has answered a request, log-probabilities included."""
        patience = self.spec.settings.patience_s(self.spec.card.weight_bytes)
        deadline = asyncio.get_running_loop().time() + patience
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
            while not await self._answers(session):
                if self.exit_code is not None:
                    raise diagnose(self.said(), self.exit_code).error(
                        f"engine {self.spec.id} ended with status {self.exit_code} while starting; "
                        f"its last words ({self.spec.log}):\n{self.last_words()}"
                    )
                if asyncio.get_running_loop().time() > deadline:
                    raise EngineRoomError(
                        f"engine {self.spec.id} was not ready after {patience:.0f} s; raise "
                        f"engine.start_timeout_s or see {self.spec.log}:\n{self.last_words()}"
                    )
                await asyncio.sleep(0.5)
        self._answered = True

    async def _answers(self, session: aiohttp.ClientSession) -> bool:
        body = {"model": self.spec.card.model, "prompt": [1, 2, 3], "max_tokens": 1, "logprobs": 1}
        try:
            async with session.get(self.spec.url + "/health") as health:
                if health.status != 200:
                    return False
            async with session.post(self.spec.url + "/v1/completions", json=body) as first:
                return first.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def drain(self) -> bool:
        """Have it say that it takes no more requests; whether it does. A stock server knows no such thing."""
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session,
                session.post(self.spec.url + DRAIN) as response,
            ):
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def until_idle(self, within_s: float) -> bool:
        """Wait until it has finished what it does; whether it has, or has ended."""
        deadline, idle = time.monotonic() + within_s, 0
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session:
            while time.monotonic() < deadline:
                try:
                    async with session.get(self.spec.url + "/metrics") as response:
                        reading = parse_reading(await response.text())
                except (aiohttp.ClientError, TimeoutError, ValueError):
                    return self.exit_code is not None
                idle = 0 if reading.running or reading.waiting else idle + 1
                if idle > 1:  # a request is counted only when the engine's core has it
                    return True
                await asyncio.sleep(0.2)
        return False

    async def wait(self) -> int:
        """Wait for the process to end; returns its exit status."""
        if self._process is None:
            raise EngineStartError(f"engine {self.spec.id} was never started")
        return await self._process.wait()

    async def stop(self) -> None:
        """End it: it has ``engine.stop_timeout_s`` to finish what it has begun; then what is left is killed.

        The server alone is told, and tells the others when they are done: a worker that is told ends at once,
        and the engine's core waits for it in vain.
        """
        if (process := self._process) is None:
            return
        try:
            if process.returncode is None and self._answered:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), self.spec.settings.stop_timeout_s + STOP_MARGIN_S)
        finally:  # also where nobody waits any more: nothing is left running
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        self._forget_sockets()
        # They have inherited its socket, and hold the port until the last of them is gone.
        deadline = time.monotonic() + PORT_FREE_S
        while port_in_use(self.spec.settings.host, self.spec.port) and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.02)

    def _forget_sockets(self) -> None:
        if self._sockets is not None:
            self._sockets.close()
            self._sockets = None

    def last_words(self) -> str:
        """The last lines of the engine's log, without vLLM's prefixes being cut."""
        lines = self.said().splitlines() or ["(no log)"]
        return "\n".join(f"  {line}" for line in lines[-LAST_LINES:])

    def said(self) -> str:
        """What the engine has logged since it was started."""
        try:
            with self.spec.log.open("rb") as log:
                log.seek(self._log_from)
                return log.read().decode(errors="replace")
        except FileNotFoundError:
            return ""


@contextlib.asynccontextmanager
async def running(spec: EngineSpec, say: Callable[[str], None]) -> AsyncIterator[EngineProcess]:
    """An engine that is ready inside the block and gone after it."""
    engine = EngineProcess(spec)
    where = f", {spec.placed.where}" if spec.placed.where else ""
    say(f"starting engine {spec.id} on port {spec.port}{where}")
    try:
        await engine.start()
        await engine.wait_ready()
        yield engine
    finally:
        await engine.stop()
