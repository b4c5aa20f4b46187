"""`tiercel up` where something is amiss: a second one, its own violent end, a reader that has gone, a full
disk, an address that cannot be had, and files of somebody's that are called as the product's modules are."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from deploy.cli import main
from deploy.commands import say
from deploy.gateway_process import UpError
from deploy.supervisor import Stack
from gateway.config import load_config
from gateway.telemetry.engines import ENGINES_FILE, engine_pids
from tests.deploy.kept import changed
from tests.deploy.test_supervisor import config_path, status, until

__all__ = ["config_path"]


@contextlib.contextmanager
def up(
    path: Path, *, where: Path | None = None, hang_up: signal.Handlers = signal.SIG_DFL
) -> Iterator[subprocess.Popen[str]]:
    """A `tiercel up` that serves, begun in a directory. ``hang_up``: how it is started as to SIGHUP, however
    these tests were."""
    tiercel = Path(sys.executable).with_name("tiercel")
    process = subprocess.Popen(
        [str(tiercel), "up", "--config", str(path)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=where,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, hang_up),
    )
    assert process.stderr is not None
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if "curl" in line and "/metrics" in line:
                break
        else:
            raise AssertionError("".join(said))
        yield process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def ended(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run after a while."""
    return psutil.wait_procs(processes, timeout=20)[1]


async def test_a_second_one_is_refused_and_leaves_the_first_alone(config_path: Path) -> None:
    """It said that the port was taken, and removed the list of the first one's engines."""
    config = load_config(config_path)
    async with Stack(config, config_path, lambda _text: None) as stack:
        log = stack.gateway.log.read_bytes()
        before = engine_pids(config.run_dir)
        with pytest.raises(UpError, match=f"is in use by process {os.getpid()}.*; stop that one"):
            async with Stack(config, config_path, lambda _text: None):
                pass
        assert engine_pids(config.run_dir) == before != {}
        assert stack.gateway.log.read_bytes().startswith(log)
        assert log
        assert await status(stack.url + "/readiness") == 200


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL])
def test_a_closed_terminal_and_a_violent_end_leave_nothing_running(
    config_path: Path, number: signal.Signals
) -> None:
    """The gateway lived on, without engines, and held its port: the next `up` was refused."""
    with up(config_path) as process:
        assert process.stderr is not None
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        process.stderr.close()  # the terminal is gone
        assert process.wait(30) == (0 if number == signal.SIGHUP else -number)
    assert ended(children) == []


def test_nohup_is_heeded(config_path: Path) -> None:
    with up(config_path, hang_up=signal.SIG_IGN) as process:
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.terminate()
        assert process.wait(30) == 0


def test_what_nobody_reads_stops_no_work(config_path: Path) -> None:
    """`tiercel up 2>&1 | head`: no engine that ended was started again, for it could not be said."""
    run = load_config(config_path).run_dir

    def pid() -> int | None:
        return next(iter(engine_pids(run).values()), None)

    with up(config_path) as process:
        assert process.stderr is not None
        process.stderr.close()
        first = pid()
        assert first is not None
        os.kill(first, signal.SIGKILL)
        asyncio.run(until(lambda: pid() not in (None, first), 20))
        process.terminate()
        assert process.wait(30) == 0


async def test_a_full_disk_does_not_end_the_watch_over_engines(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    write = Path.write_text

    def full(path: Path, *given: Any, **more: Any) -> int:
        if path.name.startswith(ENGINES_FILE.partition(".")[0]):
            raise OSError(28, "No space left on device")
        return write(path, *given, **more)

    async with Stack(load_config(config_path), config_path, said.append) as stack:
        engine = stack.engines["assistant:bf16"]
        monkeypatch.setattr(Path, "write_text", full)
        for times in (1, 2):
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)
            while sum("is ready again" in line for line in said) < times:
                await asyncio.sleep(0.05)
        assert any("engines.json cannot be written: No space left on device" in line for line in said)


async def test_an_engine_that_cannot_be_started_for_a_while_is_started_later(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    async with Stack(load_config(config_path), config_path, said.append) as stack:
        engine = stack.engines["assistant:bf16"]
        start, failures = engine.start, [OSError(28, "No space left on device"), OSError(11, "try again")]

        async def refused() -> None:
            if failures:
                raise failures.pop()
            await start()

        monkeypatch.setattr(engine, "start", refused)
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        await until(lambda: any("is ready again" in line for line in said))
        assert sum("did not start again: [Errno" in line for line in said) == 2


async def test_an_engine_of_others_that_is_down_keeps_nobody_from_serving(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One replica that was down after a machine's restart, and no gateway came up anywhere."""
    monkeypatch.setattr("deploy.gateway_process.OTHERS_S", 1.0)

    def with_another(settings: dict[str, Any]) -> None:
        settings["models"]["other"] = settings["models"]["assistant"]

    def elsewhere(settings: dict[str, Any]) -> None:
        settings["pools"] = {"other:bf16": ["http://127.0.0.1:9"]}

    changed(config_path, with_another)
    main(["quantize", "--config", str(config_path), "--no-evaluate", "--model", "other", "bf16"])
    changed(config_path, elsewhere)
    said: list[str] = []
    async with Stack(load_config(config_path), config_path, said.append) as stack:
        assert await status(stack.url + "/readiness") == 200
    assert any("other:bf16 cannot be reached" in line for line in said)


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ({"host": "::1"}, ""),
        ({"host": "192.0.2.7"}, r"cannot be listened on \(Cannot assign requested.*correct gateway\.host"),
    ],
)
async def test_an_address_is_refused_for_what_is_wrong_with_it(
    config_path: Path, address: dict[str, Any], why: str
) -> None:
    """All of them were said to be in use."""

    def there(settings: dict[str, Any]) -> None:
        settings["gateway"] |= address
        settings["keys"] = [{"name": "me", "sha256": "0" * 64, "admin": True}]

    changed(config_path, there)
    refused: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if why:
        refused = pytest.raises(UpError, match=why)
    with refused:
        async with Stack(load_config(config_path), config_path, lambda _text: None) as stack:
            assert stack.url.startswith("http://[::1]:")
            assert await status(stack.url + "/health") == 200


def test_files_that_are_called_as_modules_are_not_run(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ``deploy.py`` is in many a project: `tiercel up MODEL` ran it."""
    for name in ("deploy", "gateway", "quantize"):
        harm = f"open({str(config_path.parent / f'{name}-ran')!r}, 'w')\n"
        (config_path.parent / f"{name}.py").write_text(harm, encoding="utf-8")
    with up(config_path, where=config_path.parent) as process:
        process.terminate()
        assert process.wait(30) == 0
    monkeypatch.setattr("deploy.starting.bring_up", lambda *_: None)
    monkeypatch.setattr("os.execve", _as_child)
    monkeypatch.chdir(config_path.parent)
    changed(config_path, lambda settings: settings["gateway"].update(host="192.0.2.7"))
    with pytest.raises(SystemExit) as left:
        main(["up", "any", "--config", str(config_path)])
    assert left.value.code == 2, "it came as far as the configuration"
    assert list(config_path.parent.glob("*-ran")) == []


def _as_child(_program: str, words: list[str], environment: dict[str, str]) -> None:
    sys.exit(subprocess.run(words, env=environment, check=False).returncode)


def test_progress_is_said_to_nobody_without_complaint(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, _text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    say("x")
