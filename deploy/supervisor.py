"""``tiercel up``: one engine per served variant and the gateway, kept running until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from deploy.children import stop_signals
from deploy.engine import EngineProcess, EngineSpec, EngineStartError
from deploy.engine_account import refuse_otherwise
from deploy.engine_failures import EngineLoadError
from deploy.fleet.choice import ladders_of
from deploy.fleet.engines import Version, engine_specs, placed_again, served_here, version_of
from deploy.following import Following
from deploy.gateway_process import GatewayProcess, UpError
from deploy.models import registry_of
from deploy.ports import why_not
from deploy.scheduled import Scheduled
from gateway.config import Config, parts_of
from gateway.telemetry.engines import ENGINES_FILE
from quantize.core.gpus import GpuError

Say = Callable[[str], None]

_GATEWAY, _FOLLOWING, _SCORING = "gateway ", "following ", "scoring "
FIRST_BACK_OFF_S, LONGEST_BACK_OFF_S = 1.0, 60.0
LOCK = "up.lock"
STEADY_S = 120.0
"""A process that ran this long starts again without delay when it ends."""
NOTICED_S = 10.0
"""For the gateway to see that an engine is being drained, beside the time between its probes."""


class Stack:
    """Engines and gateway of one configuration. Use as an async context manager.

    ``engines`` are by ``model:variant``; ``before_gateway`` is awaited with what they serve when all are
    ready.
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
        self.gateway = GatewayProcess(config, config_path)
        self._held = contextlib.ExitStack()
        """The run directory, which is this one's alone."""
        self._watchers: dict[str, asyncio.Task[None]] = {}
        """By ``model:variant``, and ``_GATEWAY``, ``_FOLLOWING`` and ``_SCORING``, no variants' names."""

    @property
    def url(self) -> str:
        return self.gateway.url

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
        self._held.enter_context(alone_in(self.config.run_dir))
        if why := why_not(gateway.host, gateway.port, "gateway.port"):
            raise UpError(why)
        self._forget_state()  # of one that was killed outright
        self._held.callback(self._forget_state)
        if self._before_gateway is None:  # which may be what judges them
            ladders_of(self.config)  # refused now, and not by the gateway when all engines are loaded
        for log in (self.gateway.log, *(spec.log for spec in self._specs)):
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_bytes(b"")
        await self._start_engines()
        self._write_state()
        if self._before_gateway is not None:
            await self._before_gateway({name: engine.spec for name, engine in self.engines.items()})
            await self._take_what_was_chosen()
        for name, engine in self.engines.items():
            self._watchers[name] = asyncio.create_task(self._watch_engine(engine))
        for other in await self.gateway.start(ours=self.engines):
            self._say(f"{other} cannot be reached; the gateway asks again and again")
        self._watchers[_GATEWAY] = asyncio.create_task(self._watch_gateway())
        following = Following(
            {spec.id: spec.directory for spec in self._current()}, self.take_over, self._say
        )
        self._watchers[_FOLLOWING] = asyncio.create_task(following.run())
        if (scheduled := Scheduled.of(self.config, self._config_path, self._say)) is not None:
            self._watchers[_SCORING] = asyncio.create_task(scheduled.run())

    def _current(self) -> list[EngineSpec]:
        return [engine.spec for engine in self.engines.values()]

    async def _start_engines(self) -> None:
        with tqdm(total=len(self.engines), desc="starting", unit="engine", mininterval=0.5) as bar:

            async def start(engine: EngineProcess) -> None:
                try:
                    await _bring_up(engine)
                except EngineLoadError as error:
                    engine = self._instead(engine, error)
                    await _bring_up(engine)
                bar.set_postfix_str(f"{engine.spec.id} ready")
                bar.update()

            starts = [asyncio.create_task(start(engine)) for engine in self.engines.values()]
            try:
                await asyncio.gather(*starts)
            finally:
                for one in starts:
                    one.cancel()
                await asyncio.gather(*starts, return_exceptions=True)

    def _instead(self, failed: EngineProcess, error: EngineLoadError) -> EngineProcess:
        """An engine of the newest version that passed, where the one in use does not load: it is marked
        broken. Raises the error where there is none, as of the reference."""
        card = failed.spec.card
        if card.variant == card.reference:
            raise error
        model = self.config.of(card.model)
        registry = registry_of(model, self._say)
        registry.mark_broken(card, error.words)
        if registry.path(card.variant).name == card.version:
            raise error
        return self._engine_of(version_of(model, card.variant, None), failed.spec)

    def _engine_of(self, version: Version, old: EngineSpec) -> EngineProcess:
        """An engine of another version, where the variant's engine is."""
        spec = dataclasses.replace(old, card=version.card, directory=version.directory)
        engine = self.engines[spec.id] = EngineProcess(spec)
        return engine

    async def _take_what_was_chosen(self) -> None:
        """Serve what is in use now: the gateway reads those cards, and a gate may have chosen others."""
        for version in served_here(self.config, self._say):
            old = self.engines[version.card.id]
            if old.spec.directory != version.directory:
                await old.stop()
                await _bring_up(self._engine_of(version, old.spec))
                self._write_state()

    async def _watch_engine(self, engine: EngineProcess) -> None:
        """Restart an engine whenever it ends, with a delay that doubles while it keeps ending."""
        delay = FIRST_BACK_OFF_S
        while True:
            began = time.monotonic()
            status = await engine.wait() if engine.pid is not None else "unknown"
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
            except (EngineStartError, OSError) as error:
                self._say(f"engine {name} did not start again: {error}")
                await engine.stop()

    @contextlib.asynccontextmanager
    async def _unwatched(self, variant: str) -> AsyncIterator[EngineProcess]:
        """The variant's engine, which may be stopped and replaced inside the block."""
        watcher = self._watchers.pop(variant)
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
        try:
            yield self.engines[variant]
        finally:
            self._watchers[variant] = asyncio.create_task(self._watch_engine(self.engines[variant]))

    async def swap(self, variant: str, directory: Path) -> None:
        """Serve other files under a variant's name: at the same address, and unknown to the gateway."""
        async with self._unwatched(variant) as old:
            await old.stop()
            engine = self.engines[variant] = EngineProcess(dataclasses.replace(old.spec, directory=directory))
            await engine.start()
            self._write_state()
            await engine.wait_ready()

    async def take_over(self, variant: str, directory: Path) -> None:
        """Serve another version of a ``model:variant``. Its engine finishes what it has begun and takes no
        more meanwhile; other variants serve. Where the new version does not load it is marked broken, and the
        old one is served and in use again."""
        model_name, short = parts_of(variant)
        model = self.config.of(model_name)
        version = await asyncio.to_thread(version_of, model, short, directory.name)
        async with self._unwatched(variant) as old:
            await self._drain(old)
            await old.stop()
            engine = self._engine_of(version, old.spec)
            try:
                engine.spec = await asyncio.to_thread(placed_again, self.config, engine.spec, self._current())
                await self._serve(engine)
                self._say(f"{variant}: {version.card.version} is served now")
            except (EngineStartError, GpuError, OSError) as error:
                await engine.stop()
                self._say(f"{variant}: {version.card.version} cannot be served: {error}")
                if isinstance(error, EngineLoadError):
                    registry_of(model).mark_broken(version.card, error.words)
                await asyncio.to_thread(registry_of(model).use, short, old.spec.card.version)
                await self._serve_again(old.spec)

    async def _serve_again(self, spec: EngineSpec) -> None:
        engine = self.engines[spec.id] = EngineProcess(spec)
        try:
            await self._serve(engine)
            self._say(f"{spec.id}: {spec.card.version} is served again")
        except (EngineStartError, OSError) as error:
            await engine.stop()  # whoever watches it starts it again
            self._say(f"{spec.id}: {spec.card.version} is not served again yet: {error}")

    async def _serve(self, engine: EngineProcess) -> None:
        try:
            await _bring_up(engine)
        finally:
            self._write_state()

    async def _drain(self, engine: EngineProcess) -> None:
        settings = self.config.gateway
        if not await engine.drain():
            return  # one that does not know how to: what it has begun is asked of another replica
        await self.gateway.until_unreached(engine.spec.id, settings.health_interval_s + NOTICED_S)
        if not await engine.until_idle(settings.answer_timeout_s):
            self._say(
                f"{engine.spec.id}: what is not answered after {settings.answer_timeout_s:.0f} s is cut"
            )

    async def _watch_gateway(self) -> None:
        delay = FIRST_BACK_OFF_S
        while True:
            began = time.monotonic()
            status = await self.gateway.wait()
            delay = FIRST_BACK_OFF_S if time.monotonic() - began > STEADY_S else delay
            self._say(f"the gateway ended with status {status}; starting it again in {delay:.0f} s")
            await asyncio.sleep(delay)
            delay = min(2 * delay, LONGEST_BACK_OFF_S)
            try:
                await self.gateway.start()
                self._say("the gateway is ready again")
            except (UpError, OSError) as error:
                self._say(f"it did not: {error}")

    def _write_state(self) -> None:
        """Tell the gateway which process serves which variant, for its memory metric, and others what the
        engines take."""
        path = self.config.run_dir / ENGINES_FILE
        engines = {
            name: {
                "url": engine.spec.url,
                "pid": engine.pid,
                "gpus": list(engine.spec.placed.gpus),
                "memory": engine.spec.placed.memory,
            }
            for name, engine in self.engines.items()
        }
        partial = path.with_suffix(".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps({"engines": engines}), encoding="utf-8")
            partial.rename(path)
        except OSError as error:  # as on a full disk; engines serve without
            self._say(f"{path} cannot be written: {error.strerror}")

    def _forget_state(self) -> None:
        (self.config.run_dir / ENGINES_FILE).unlink(missing_ok=True)

    async def stop(self) -> None:
        """Gateway first (it drains), then the engines, all at once."""
        while watchers := [self._watchers.pop(name) for name in list(self._watchers)]:
            for watcher in watchers:  # one that is taking a version over leaves another behind
                watcher.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)
        await self.gateway.stop()
        await asyncio.gather(*(engine.stop() for engine in self.engines.values()))
        self._held.close()


@contextlib.contextmanager
def alone_in(run_dir: Path) -> Iterator[None]:
    """Hold the directory of logs and of what runs, by a lock that ends with this process. Raises UpError
    where another one has it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UpError(
                f"run_dir: {run_dir} is in use by process {file.read().strip() or '?'}, whose engines are "
                "told of there; stop that one, or set run_dir to another"
            ) from None
        with contextlib.suppress(OSError):  # on a full disk it stays unsaid
            os.truncate(file.fileno(), 0)
            os.write(file.fileno(), f"{os.getpid()}\n".encode())
        yield


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


async def run_until_stopped(config: Config, config_path: Path, say: Say) -> None:
    """Run the stack until SIGINT, SIGTERM or the terminal's end, then stop everything."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in stop_signals():
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
        say("stopped; logs are in " + str(stack.gateway.log.parent))


_INTENT = {
    "system": "Classify the intent of the message.",
    "user": "when is my credit card bill due",
}
_ANYTHING = {"user": "Name three uses of a paper clip."}


def _try_it(stack: Stack) -> str:
    """What a person can type now."""
    role, settings = next(iter(stack.config.roles.items()))
    asked = _INTENT if settings.tasks else _ANYTHING  # the first role with tasks is the demo's, mostly
    messages = [f'{{"role": "{who}", "content": "{text}"}}' for who, text in asked.items()]
    model = stack.config.default_model
    shell, python = (f",\n{' ' * width}".join(messages) for width in (6, 16))
    return f"""
Tiercel is up at {stack.url}  (Ctrl-C stops it; logs in {stack.gateway.log.parent})

  curl {stack.url}/v1/chat/completions -H 'content-type: application/json' \\
    -H 'x-agent-role: {role}' -d '{{"model": "{model}", "messages": [
      {shell}], "temperature": 0}}'

  from openai import OpenAI
  client = OpenAI(base_url="{stack.url}/v1", api_key="unused")
  for chunk in client.chat.completions.create(
      model="{role}", stream=True, temperature=0,
      messages=[{python}]):
      print(chunk.choices[0].delta.content or "", end="") if chunk.choices else None

  curl {stack.url}/v1/models      curl {stack.url}/metrics
"""
