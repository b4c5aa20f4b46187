"""``tiercel up``: one engine per served variant and the gateway, kept running until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import aiohttp
from tqdm import tqdm

from deploy.engine import EngineProcess, EngineSpec, EngineStartError, need_of, port_in_use
from deploy.engine_account import refuse_otherwise
from deploy.engine_failures import EngineLoadError
from deploy.machine import look
from deploy.models import registry_of
from deploy.placement import Placed, PlacementError, place
from gateway.config import Config, ModelConfig
from quantize.card import VERSION, Card, refuse_broken
from quantize.versions import usable_version

Say = Callable[[str], None]

_GATEWAY = "gateway "
FIRST_BACK_OFF_S, LONGEST_BACK_OFF_S = 1.0, 60.0
STEADY_S = 120.0
"""A process that ran this long starts again without delay when it ends."""


class UpError(RuntimeError):
    """The stack cannot be started. The text says why and what to do."""


def engine_specs(config: Config, say: Say = lambda _text: None) -> list[EngineSpec]:
    """The engines to start here, each with its place: served variants without given replicas.

    In place of a version that its engine could not load, the newest one that passed is served, which is
    said. Raises CardError and PlacementError.
    """
    found: list[tuple[ModelConfig, Card, Path]] = []
    for model in config.each():
        registry = registry_of(model)
        for variant in model.serve:
            if variant in model.pools:
                continue
            directory, sentence = usable_version(model.variants_dir, variant)
            if sentence:
                say(sentence)
            version = directory.name if VERSION.fullmatch(directory.name) else None
            card = registry.card(variant, version)
            refuse_broken(card)
            found.append((model, card, registry.path(variant, card.version)))
    return [
        EngineSpec(
            card=card,
            directory=directory,
            settings=model.engine,
            port=model.ports[card.variant],
            log=model.log(card.variant),
            placed=placed,
        )
        for (model, card, directory), placed in zip(found, side_by_side(found), strict=True)
    ]


def side_by_side(engines: Sequence[tuple[ModelConfig, Card, Path]]) -> list[Placed]:
    """Places for engines that all run at once. Raises PlacementError."""
    machine, placed = look(), list[Placed]()
    for model, card, directory in engines:
        settings = model.engine
        need = need_of(card, directory, settings)
        found = place(machine, need, placed, len(engines), settings.env, settings.extra_args)
        if found is None and not machine.gpus:
            # Engines that serve may share cores: what they wait for most is the next request.
            found = dataclasses.replace(placed[0], memory=need.weight_bytes + need.kv_bytes)
        if found is None:
            names = ", ".join(of.id(one.variant) for of, one, _ in engines)
            raise PlacementError(
                f"{names} do not fit on this machine side by side, {model.id(card.variant)} has no room; "
                "serve fewer variants here (serve, pools), or lower engine.kv_cache_gib"
            )
        placed.append(found)
    return placed


class Stack:
    """Engines and gateway of one configuration. Use as an async context manager.

    ``before_gateway`` is awaited with every engine, by variant, when all are ready.
    """

    def __init__(
        self,
        config: Config,
        config_path: Path,
        say: Say,
        before_gateway: Callable[[dict[str, EngineSpec]], Awaitable[object]] | None = None,
    ) -> None:
        self.config, self._config_path, self._say = config, config_path, say
        self._before_gateway = before_gateway
        self._specs = engine_specs(config, say)
        self.engines = {spec.id: EngineProcess(spec) for spec in self._specs}
        self._gateway: asyncio.subprocess.Process | None = None
        self._watchers: dict[str, asyncio.Task[None]] = {}
        """By variant, and ``_GATEWAY``, which is no variant's name."""

    @property
    def url(self) -> str:
        scheme = "https" if self.config.gateway.tls_certificate else "http"
        return f"{scheme}://{self.config.gateway.host}:{self.config.gateway.port}"

    @property
    def gateway_log(self) -> Path:
        return self.config.run_dir / "logs" / "gateway.log"

    async def __aenter__(self) -> Stack:
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _start(self) -> None:
        gateway = self.config.gateway
        if port_in_use(gateway.host, gateway.port):
            raise UpError(
                f"port {gateway.port} on {gateway.host} is in use; stop what listens there, "
                "or set gateway.port to another"
            )
        for log in (self.gateway_log, *(spec.log for spec in self._specs)):
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_bytes(b"")
        with tqdm(total=len(self.engines), desc="starting", unit="engine", mininterval=0.5) as bar:

            async def bring_up(engine: EngineProcess) -> None:
                try:
                    await _bring_up(engine)
                except EngineLoadError as error:
                    engine = self._instead(engine, error)
                    await _bring_up(engine)
                bar.set_postfix_str(f"{engine.spec.id} ready")
                bar.update()

            starts = [asyncio.create_task(bring_up(engine)) for engine in self.engines.values()]
            try:
                await asyncio.gather(*starts)
            finally:
                for start in starts:
                    start.cancel()
                await asyncio.gather(*starts, return_exceptions=True)
        self._write_state()
        if self._before_gateway is not None:
            await self._before_gateway({name: engine.spec for name, engine in self.engines.items()})
            await self._follow_choice()
        await self._start_gateway()
        for name, engine in self.engines.items():
            self._watchers[name] = asyncio.create_task(self._watch_engine(engine))
        self._watchers[_GATEWAY] = asyncio.create_task(self._watch_gateway())

    def _instead(self, failed: EngineProcess, error: EngineLoadError) -> EngineProcess:
        """An engine of the newest version that passed, where the one in use does not load: it is marked
        broken. Raises the error where there is none, as of the reference."""
        card = failed.spec.card
        if card.variant == card.reference:
            raise error
        registry = registry_of(self.config.of(card.model), self._say)
        registry.mark_broken(card, error.words)
        directory = registry.path(card.variant)
        if directory.name == card.version:
            raise error
        spec = dataclasses.replace(failed.spec, card=registry.card(card.variant), directory=directory)
        engine = self.engines[spec.id] = EngineProcess(spec)
        return engine

    async def _follow_choice(self) -> None:
        """Serve what is in use now: the gateway reads those cards, and a gate may have chosen others."""
        for spec in engine_specs(self.config, self._say):
            old = self.engines[spec.id]
            if old.spec.directory != spec.directory:
                await old.stop()
                engine = EngineProcess(dataclasses.replace(spec, placed=old.spec.placed))
                self.engines[spec.id] = engine
                await engine.start()
                await engine.wait_ready()
                self._write_state()

    async def _start_gateway(self) -> None:
        with self.gateway_log.open("ab") as log:
            self._gateway = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "gateway", "--config", str(self._config_path)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 60
        # The certificate is of the name that clients use, which is not that of this probe.
        unchecked = aiohttp.TCPConnector(ssl=False)
        timeout = aiohttp.ClientTimeout(total=5)
        async with aiohttp.ClientSession(timeout=timeout, connector=unchecked) as session:
            while not await _is_ready(session, self.url + "/readiness"):
                if self._gateway.returncode is not None or time.monotonic() > deadline:
                    words = self.gateway_log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:]
                    raise UpError("the gateway did not start; its last words:\n" + "\n".join(words))
                await asyncio.sleep(0.2)

    async def _watch_engine(self, engine: EngineProcess) -> None:
        """Restart an engine whenever it ends, with a delay that doubles while it keeps ending."""
        delay = FIRST_BACK_OFF_S
        while True:
            began = time.monotonic()
            status = await engine.wait()
            delay = FIRST_BACK_OFF_S if time.monotonic() - began > STEADY_S else delay
            name = engine.spec.id
            self._say(f"engine {name} ended with status {status}; starting it again in {delay:.0f} s")
            await engine.stop()
            await asyncio.sleep(delay)
            delay = min(2 * delay, LONGEST_BACK_OFF_S)
            try:
                await engine.start()
                self._write_state()
                await engine.wait_ready()
                self._say(f"engine {name} is ready again")
            except EngineStartError as error:
                self._say(str(error))
                await engine.stop()

    async def swap(self, variant: str, directory: Path) -> None:
        """Serve other files under a variant's name: at the same address, and unknown to the gateway."""
        old = self.engines[variant]
        watcher = self._watchers.pop(variant)
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
        await old.stop()
        spec = dataclasses.replace(old.spec, directory=directory)
        engine = self.engines[variant] = EngineProcess(spec)
        await engine.start()
        self._write_state()
        await engine.wait_ready()
        self._watchers[variant] = asyncio.create_task(self._watch_engine(engine))

    async def _watch_gateway(self) -> None:
        delay = FIRST_BACK_OFF_S
        while self._gateway is not None:
            began = time.monotonic()
            status = await self._gateway.wait()
            delay = FIRST_BACK_OFF_S if time.monotonic() - began > STEADY_S else delay
            self._say(f"the gateway ended with status {status}; starting it again in {delay:.0f} s")
            await asyncio.sleep(delay)
            delay = min(2 * delay, LONGEST_BACK_OFF_S)
            try:
                await self._start_gateway()
                self._say("the gateway is ready again")
            except UpError as error:
                self._say(str(error))

    def _write_state(self) -> None:
        """Tell the gateway which process serves which variant, for its memory metric."""
        self.config.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.config.run_dir / "engines.json"
        engines = {name: {"url": e.spec.url, "pid": e.pid} for name, e in self.engines.items()}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"engines": engines}), encoding="utf-8")
        partial.rename(path)

    async def stop(self) -> None:
        """Gateway first (it drains), then the engines, all at once."""
        for watcher in self._watchers.values():
            watcher.cancel()
        await asyncio.gather(*self._watchers.values(), return_exceptions=True)
        if self._gateway is not None and self._gateway.returncode is None:
            drained = self.config.gateway.shutdown_timeout_s + 5.0
            for sent, patience in ((signal.SIGTERM, drained), (signal.SIGKILL, 5.0)):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._gateway.pid, sent)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._gateway.wait(), patience)
                    break
        await asyncio.gather(*(engine.stop() for engine in self.engines.values()))
        (self.config.run_dir / "engines.json").unlink(missing_ok=True)


async def _bring_up(engine: EngineProcess) -> None:
    """Start an engine, and see that it serves what its card says. Raises EngineStartError; it is stopped then
    where it does not load."""
    await engine.start()
    try:
        await engine.wait_ready()
        await refuse_otherwise(engine)
    except EngineLoadError:
        await engine.stop()
        raise


async def _is_ready(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(url) as response:
            return not (await response.json())["not_reachable"]
    except (aiohttp.ClientError, TimeoutError):
        return False


async def run_until_stopped(config: Config, config_path: Path, say: Say) -> None:
    """Run the stack until SIGINT or SIGTERM, then stop everything."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    starting = asyncio.create_task(Stack(config, config_path, say).__aenter__())
    waiting = asyncio.create_task(stopped.wait())
    await asyncio.wait({starting, waiting}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        say("stopping before everything was started")
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        waiting.cancel()
        return
    stack = await starting
    try:
        say(_try_it(stack))
        await waiting
        say("stopping")
    finally:
        waiting.cancel()
        await stack.stop()
        say("stopped; logs are in " + str(stack.gateway_log.parent))


def _try_it(stack: Stack) -> str:
    """What a person can type now."""
    role = next(iter(stack.config.roles))
    model = stack.config.default_model
    return f"""
Tiercel is up at {stack.url}  (Ctrl-C stops it; logs in {stack.gateway_log.parent})

  curl {stack.url}/v1/chat/completions -H 'content-type: application/json' \\
    -H 'x-agent-role: {role}' -d '{{"model": "{model}", "messages": [
      {{"role": "system", "content": "Classify the intent of the message."}},
      {{"role": "user", "content": "when is my credit card bill due"}}], "temperature": 0}}'

  from openai import OpenAI
  client = OpenAI(base_url="{stack.url}/v1", api_key="unused")
  for chunk in client.chat.completions.create(
      model="{role}", stream=True, temperature=0,
      messages=[{{"role": "system", "content": "Classify the intent of the message."}},
                {{"role": "user", "content": "when is my credit card bill due"}}]):
      print(chunk.choices[0].delta.content or "", end="") if chunk.choices else None

  curl {stack.url}/v1/models      curl {stack.url}/metrics
"""
