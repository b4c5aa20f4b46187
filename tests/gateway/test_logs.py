"""A log that nobody reads holds up nobody, and what it loses is counted."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import msgspec
import pytest
from gateway_stack import CHAT, OTHERS, addresses, eventually, running_gateway, settings, write_variants

from gateway.telemetry.logs import AccessLog, JsonLines, LogWriter, QueueHandler
from gateway.upstream.fake import FakeEngine, Script

QUESTION = {"model": "assistant", "messages": [{"role": "user", "content": "hi"}]}
SMALLEST_PIPE = 4096


class Line(msgspec.Struct):
    number: int


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A small one; its ends may be closed meanwhile."""
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, SMALLEST_PIPE)
    yield read, write
    for end in (read, write):
        with contextlib.suppress(OSError):
            os.close(end)


def read_all(descriptor: int) -> list[str]:
    data = b""
    while part := os.read(descriptor, 1 << 16):
        data += part
    return data.decode().splitlines()


def test_a_pipe_that_nobody_reads_takes_no_time(pipe: tuple[int, int]) -> None:
    read, write = pipe
    writer = LogWriter(write, most_lines=1000)
    for number in range(5000):
        writer.write(json.dumps({"number": number, "text": "x" * 200}).encode() + b"\n")
    dropped = writer.take_dropped()
    assert 3000 < dropped < 4100, "what found no room; the rest waits, or is in the pipe"
    assert writer.take_dropped() == 0, "counted once"
    writer.close(within_s=0.05)
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.extend(read_all(read)))
    reader.start()
    writer.close(within_s=30)
    os.close(write)
    reader.join(30)
    assert len(found) == 5000 - dropped
    numbers = [json.loads(line)["number"] for line in found]
    assert numbers == sorted(numbers), "lines are whole and in order"


def test_bytes_have_a_bound_too(pipe: tuple[int, int]) -> None:
    _, write = pipe
    writer = LogWriter(write, most_bytes=100_000)
    for _ in range(100):
        writer.write(b"x" * 9_999 + b"\n")
    assert writer.take_dropped() >= 88


def test_a_reader_that_has_gone_costs_lines_alone(pipe: tuple[int, int]) -> None:
    read, write = pipe
    os.close(read)
    writer = LogWriter(write)
    for _ in range(10):
        writer.write(b"line\n")
    writer.close(within_s=30)
    assert writer.take_dropped() == 10


def test_a_descriptor_that_does_not_block_loses_nothing(pipe: tuple[int, int]) -> None:
    read, write = pipe
    os.set_blocking(write, False)
    writer = LogWriter(write)
    for number in range(1000):
        writer.write(b"%d %s\n" % (number, b"x" * 100))
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.extend(read_all(read)))
    reader.start()
    writer.close(within_s=30)
    os.close(write)
    reader.join(30)
    assert len(found) == 1000
    assert writer.take_dropped() == 0


def test_records_and_lines_of_many_threads_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("wb") as file:
        writer = LogWriter(file.fileno())
        logger = logging.Logger("test")
        logger.addHandler(QueueHandler(writer))
        access = AccessLog(writer)

        def log(thread: int) -> None:
            for number in range(200):
                logger.info("%d %d", thread, number)

        threads = [threading.Thread(target=log, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for number in range(500):
            access.write(Line(number))
            access.flush()
        for thread in threads:
            thread.join()
        writer.close(within_s=30)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sum("number" in line for line in lines) == 500
    assert len({line["message"] for line in lines if "message" in line}) == 800


def test_a_record_that_cannot_be_formatted_is_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "log").open("wb") as file:
        writer = LogWriter(file.fileno())
        logger = logging.Logger("test")
        logger.addHandler(QueueHandler(writer))
        logger.info("%d", "no number")
        logger.info("a lone surrogate: %s", "\ud800")
        logger.info("fine")
        writer.close(within_s=30)
    assert writer.take_dropped() == 1
    assert capsys.readouterr().err == "", "that is the very pipe that may be full"
    lines = (tmp_path / "log").read_text().splitlines()
    assert [json.loads(line)["message"][:5] for line in lines] == ["a lon", "fine"]


def test_a_traceback_is_one_line() -> None:
    try:
        raise ValueError("no")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 1, "it failed", (), sys.exc_info())
    line = JsonLines().format(record)
    assert "\n" not in line
    assert "ValueError: no" in json.loads(line)["exception"]


async def test_what_is_dropped_is_shown() -> None:
    async with running_gateway() as stack:
        stack.gateway.log.writer._most_lines = 0
        async with stack.post() as response:
            assert response.status == 200
        await eventually(lambda: stack.sample("tiercel_log_lines_dropped_total") >= 1)


async def test_requests_go_on_when_nobody_reads_the_log(tmp_path: Path, free_port: int) -> None:
    write_variants(tmp_path / "variants")
    async with FakeEngine(Script()).serving(also=OTHERS) as engine:
        urls = addresses(engine)
        path = tmp_path / "tiercel.yaml"
        path.write_text(
            settings(
                tmp_path / "variants",
                urls,
                gateway={"port": free_port},
                run_dir=str(tmp_path),
                quality={"sample_rate": 0.0},
            )
        )
        read, write = os.pipe()
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, SMALLEST_PIPE)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gateway", "--config", str(path)), stderr=write
        )
        os.close(write)
        base = f"http://127.0.0.1:{free_port}"
        try:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as http:

                async def up() -> bool:
                    with contextlib.suppress(aiohttp.ClientError):
                        async with http.get(base + "/readiness") as response:
                            return response.status == 200
                    return False

                await eventually(up, within_s=60)

                async def ask() -> None:
                    async with http.post(base + CHAT, json=QUESTION) as response:
                        assert response.status == 200
                        await response.read()

                # A dozen lines fill the pipe; a loop that waited for it would wait without end.
                for _ in range(300):
                    await ask()
                process.send_signal(signal.SIGTERM)
                async with asyncio.timeout(30):
                    assert await process.wait() == 0, "nor does it hold up the end"
        finally:
            os.close(read)
            if process.returncode is None:
                process.kill()


def test_no_file_gets_the_log_where_standard_error_is_closed() -> None:
    """The next file that is opened would get its number."""
    script = (
        "import os\n"
        "from gateway.__main__ import fill_standard_descriptors\n"
        "for number in (0, 1, 2):\n"
        "    os.close(number)\n"
        "fill_standard_descriptors()\n"
        "os._exit(0 if os.open(os.devnull, os.O_RDONLY) > 2 and os.write(2, b'x') == 1 else 1)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=120, check=False).returncode == 0
