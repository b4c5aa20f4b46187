"""What an operator relies on: health, readiness, metrics, the process's start and its stop."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import aiohttp
import pytest
import yaml
from gateway_stack import Stack, eventually, free_port, running_gateway, write_variants
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from gateway.__main__ import main
from gateway.quality.cells import CellKey
from gateway.routing.replicas import Replica
from gateway.telemetry.engines import (
    MEMORY_EVERY_S,
    EngineReader,
    engine_pids,
    parse_reading,
    resident_bytes,
)
from gateway.telemetry.metrics import Metrics


async def get(stack: Stack, path: str) -> tuple[int, str]:
    async with stack.http.get(stack.url + path) as response:
        return response.status, await response.text()


async def test_models(stack: Stack) -> None:
    ids = [model["id"] for model in json.loads((await get(stack, "/v1/models"))[1])["data"]]
    roles = ["intent_classifier", "summarizer", "core"]
    assert ids == ["assistant", *roles, "assistant:bf16", "assistant:int8", "assistant:int4-kv8"]


async def test_it_is_ready_while_some_role_can_be_served(stack: Stack) -> None:
    async def readiness_is(status: int, *missing: str) -> bool:
        found, text = await get(stack, "/readiness")
        return found == status and json.loads(text)["not_reachable"] == list(missing)

    await eventually(lambda: readiness_is(200))
    stack.engines["int8"].script.healthy = False
    await eventually(lambda: readiness_is(200, "assistant:int8"))
    detail = json.loads((await get(stack, "/readiness"))[1])
    assert (detail["ready"], detail["unserved"]) == (True, [])
    assert detail["pools"]["assistant:bf16"]["replicas"]["assistant:bf16-0"]["reachable"] is True

    stack.engines["bf16"].script.healthy = False
    await eventually(lambda: readiness_is(200, "assistant:bf16", "assistant:int8"))
    detail = json.loads((await get(stack, "/readiness"))[1])
    assert (detail["ready"], detail["unserved"]) == (True, ["summarizer", "core"])

    stack.engines["int4-kv8"].script.healthy = False
    await eventually(lambda: readiness_is(503, "assistant:bf16", "assistant:int8", "assistant:int4-kv8"))
    assert (await get(stack, "/health"))[0] == 200


async def test_request_metrics(stack: Stack) -> None:
    stack.engines["int8"].script.first_token_delay_s = delay_s = 0.3
    for stream in (False, True):
        async with stack.post({"model": "summarizer", "stream": stream}) as response:
            await response.read()
    asked = {"role": "summarizer", "variant": "int8"}
    counted = {"requested": "summarizer", "outcome": "200"}
    assert stack.sample("tiercel_requests_total", **asked, **counted) == 2
    assert stack.sample("tiercel_request_duration_seconds_count", **asked) == 2
    assert stack.sample("tiercel_time_to_first_token_seconds_count", **asked) == 1
    assert stack.sample("tiercel_inter_token_latency_seconds_count", **asked) >= 1
    took = stack.sample("tiercel_request_duration_seconds_sum", **asked)
    overhead = stack.sample("tiercel_gateway_overhead_seconds_sum", **asked)
    assert 0 < overhead <= took - 2 * delay_s, "what is waited for is not the gateway's"
    assert stack.sample("tiercel_tokens_total", **asked, kind="completion") == 8
    assert stack.sample("tiercel_tokens_total", **asked, kind="prompt") > 0
    assert stack.sample("tiercel_route_total", **asked, reason="cheapest_in_budget") == 2
    assert stack.sample("tiercel_variant_weight_bytes", variant="int4-kv8") == 3_000_000
    await eventually(stack.settled)
    assert stack.sample("tiercel_token_nll_mean_sum", **asked) == pytest.approx(2 * 0.10536, abs=1e-4)
    assert stack.sample("tiercel_token_entropy_max_count", **asked) == 2
    text = (await get(stack, "/metrics"))[1]
    names = {family.name for family in text_string_to_metric_families(text)}
    assert "tiercel_requests" in names
    assert "process_resident_memory_bytes" in names


async def test_grounded_role_is_checked(stack: Stack) -> None:
    for text in ("The total is $277.", "The total is $278. Anything else?"):
        stack.engines["bf16"].script.text = text
        async with stack.post({"stream": True}) as response:
            await response.read()
    asked = {"role": "core", "variant": "bf16"}
    checks = "tiercel_quality_checks_total"
    await eventually(stack.settled)
    for outcome in ("failed", "passed"):
        assert stack.sample(checks, **asked, check="grounded", outcome=outcome) == 1
    assert stack.sample("tiercel_quality_score_count", **asked, check="grounded") == 2
    labels = {
        label: stack.sample("tiercel_quality_sentences_total", **asked, label=label)
        for label in ("supported", "unsupported", "not_applicable")
    }
    assert labels == {"supported": 1, "unsupported": 1, "not_applicable": 1}
    assert stack.sample("tiercel_quality_score_sum", **asked, check="grounded") == 1.5
    assert stack.sample("tiercel_quality_score_sum", **asked, check="grounded_strict") == 1


async def test_what_an_engine_throws_out_of_its_cache_is_watched() -> None:
    async with running_gateway() as stack:
        told: list[tuple[str, float | None]] = []
        assert stack.gateway.watch is not None
        noted = stack.gateway.watch.note

        def note(key: CellKey, check: str, bad: bool, value: float | None = None, **more: bool) -> None:
            if check == "preemptions":
                told.append((key.variant, value))
            noted(key, check, bad, value, **more)

        stack.gateway.watch.note = note  # type: ignore[method-assign]
        await eventually(lambda: ("assistant:int8", 0.0) in told)
        stack.engines["int8"].preemptions = 3
        await eventually(lambda: ("assistant:int8", 3.0) in told)
        told.clear()
        await eventually(lambda: ("assistant:int8", 0.0) in told)
        stack.engines["int8"].preemptions = 0  # started anew
        seen = len(told)
        await eventually(lambda: len(told) >= seen + 9)
        assert {value for _, value in told} == {0.0}


async def test_engine_metrics_are_read_and_forgotten_when_stale(tmp_path: Path) -> None:
    async with running_gateway(run_dir=tmp_path) as stack:
        engine = stack.engines["int8"]
        engine.waiting, engine.kv_cache_usage = 3, 0.25
        at = {"model": "assistant", "variant": "int8", "replica": "assistant:int8-0"}
        await eventually(lambda: stack.sample("tiercel_queue_depth", **at) == 3)
        assert stack.sample("tiercel_kv_cache_usage_ratio", **at) == 0.25
        assert stack.registry.get_sample_value("tiercel_engine_memory_bytes", at) is None


def test_engine_readings(tmp_path: Path) -> None:
    two_ranks = 'vllm:num_requests_waiting{engine="0"} 2\nvllm:num_requests_waiting{engine="1"} 3\n'
    reading = parse_reading(two_ranks)
    assert (reading.waiting, reading.kv_cache_usage, reading.preemptions) == (5, None, None)
    thrown_out = "# TYPE vllm:num_preemptions_total counter\nvllm:num_preemptions_total 7.0\n"
    assert parse_reading(thrown_out).preemptions == 7
    assert engine_pids(tmp_path) == {}
    engines = {"assistant:int8": {"url": "http://127.0.0.1:8102/", "pid": os.getpid()}}
    (tmp_path / "engines.json").write_text(json.dumps({"engines": engines}))
    assert engine_pids(tmp_path) == {("assistant:int8", "http://127.0.0.1:8102"): os.getpid()}
    (tmp_path / "engines.json").write_text("{")
    assert engine_pids(tmp_path) == {}
    assert resident_bytes(os.getpid()) > 1_000_000
    assert resident_bytes(2**22 + 1) is None


async def test_an_engines_memory_is_read_less_often_than_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, sizes, told = [50.0], iter((100, 200, 300)), list[float | None]()
    monkeypatch.setattr("gateway.telemetry.engines.resident_bytes", lambda pid: next(sizes))
    engine = {"assistant:int8": {"url": "http://127.0.0.1:9", "pid": os.getpid()}}
    (tmp_path / "engines.json").write_text(json.dumps({"engines": engine}))
    replica = Replica("assistant:int8", "assistant:int8-0", "http://127.0.0.1:9", lambda: now[0])
    registry = CollectorRegistry()
    counted = Metrics(registry, ["core"])

    def seen(_variant: str, memory: float | None, _kv: float | None, _thrown: float | None) -> None:
        told.append(memory)

    def shown() -> float | None:
        labels = {"model": "assistant", "variant": "int8", "replica": "assistant:int8-0"}
        return registry.get_sample_value("tiercel_engine_memory_bytes", labels)

    async with aiohttp.ClientSession() as http:
        reader = EngineReader(http, counted, tmp_path, lambda: now[0], seen)
        for later, memory in ((0.0, 100), (2.0, 100), (MEMORY_EVERY_S, 200)):
            now[0] += later
            await reader.read(lambda: [replica])
            assert shown() == memory
        (tmp_path / "engines.json").write_text(json.dumps({"engines": {}}))
        await reader.read(lambda: [replica])
        assert shown() is None
        (tmp_path / "engines.json").write_text(json.dumps({"engines": engine}))
        await reader.read(lambda: [replica])
        assert shown() == 300
    assert told == [100, None, 200, None, 300]


def write_setup(directory: Path, port: int, **changes: object) -> Path:
    """A configuration and its cards on disk; ``serve`` and ``reference`` are the model's."""
    write_variants(directory / "variants")
    own = {name: changes.pop(name) for name in ("serve", "reference", "serv") if name in changes}
    config = {
        "models": {"assistant": {"path": "model", "serve": ["bf16", "int8", "int4-kv8"]} | own},
        "variants_dir": "variants",
        "roles": {"core": {}},
        "default_role": "core",
        "gateway": {"port": port},
    }
    path = directory / "tiercel.yaml"
    path.write_text(yaml.safe_dump(config | changes))
    return path


def gateway_process(config: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-m", "gateway", "--config", str(config)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("says", "change"),
    [
        ("stop what uses it or set another port", {}),
        ("did you mean 'serve'?", {"serv": 1}),
        ("card.json does not exist", {"serve": ["bf16", "int2"]}),
        ("was compared with 'bf16'", {"serve": ["int8"], "reference": "int8"}),
    ],
)
def test_what_stops_a_start_is_said_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], says: str, change: dict[str, object]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = write_setup(tmp_path, taken.getsockname()[1], **change)
        assert main(["--config", str(config)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_role_that_nothing_may_serve_stops_a_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roles = {"core": {"budget": {"min_weight_bits": 16}}}
    alone = {"serve": ["int8"], "watch": {"reference": "none"}}
    config = write_setup(tmp_path, free_port(), roles=roles, **alone)
    before = (logging.root.level, logging.root.handlers[:], sys.unraisablehook, threading.excepthook)
    assert main(["--config", str(config)]) == 2
    after = (logging.root.level, logging.root.handlers[:], sys.unraisablehook, threading.excepthook)
    assert after == before, "a process that embeds the gateway keeps its own log"
    assert "roles.core: the reference assistant:bf16 is not served, and no other" in capsys.readouterr().err


async def test_process_serves_and_stops_gracefully(tmp_path: Path) -> None:
    process = gateway_process(write_setup(tmp_path, free_port()))
    assert process.stderr is not None
    lines = [""]
    while "startup complete" not in lines[-1]:
        lines.append(await asyncio.to_thread(process.stderr.readline))
        assert lines[-1], lines
    process.send_signal(signal.SIGTERM)
    _, rest = await asyncio.to_thread(process.communicate, timeout=60)
    assert process.returncode == 0, rest
    assert all(json.loads(line)["level"] == "info" for line in (*lines[1:], *rest.splitlines()))


async def started(config: Path) -> subprocess.Popen[str]:
    """A gateway process that listens."""
    process = gateway_process(config)
    assert process.stderr is not None
    said = ""
    while "startup complete" not in said:
        said = await asyncio.to_thread(process.stderr.readline)
        assert said, process.poll()
    return process


async def test_sighup_takes_the_file_as_it_is_now(tmp_path: Path) -> None:
    """A good one is used; a bad one changes nothing and says why, and so does another address."""
    port = free_port()
    path = write_setup(tmp_path, port)
    process = await started(path)
    log: list[str] = []
    assert process.stderr is not None
    stderr = process.stderr
    reading = asyncio.create_task(asyncio.to_thread(lambda: log.extend(iter(stderr.readline, ""))))

    async def models() -> list[str]:
        async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{port}/v1/models") as answer:
            return [entry["id"] for entry in (await answer.json())["data"]]

    async def has(model: str) -> bool:
        return model in await models()

    try:
        assert await models() == [
            "assistant",
            "core",
            "assistant:bf16",
            "assistant:int8",
            "assistant:int4-kv8",
        ]
        write_setup(tmp_path, port, roles={"core": {}, "helper": {}})
        process.send_signal(signal.SIGHUP)
        await eventually(lambda: has("helper"))
        path.write_text(path.read_text() + "rols: 1\n")
        process.send_signal(signal.SIGHUP)
        await eventually(lambda: any("rols" in line and "did you mean" in line for line in log))
        write_setup(tmp_path, free_port(), roles={"core": {}, "other": {}})
        process.send_signal(signal.SIGHUP)
        await eventually(lambda: any("gateway.port" in line for line in log))
        assert await has("helper")
        assert not await has("other")
    finally:
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 20) == 0
        await reading
        stderr.close()


def make_certificate(directory: Path) -> tuple[Path, Path]:
    certificate, key = directory / "tls.crt", directory / "tls.key"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names]
    subprocess.run([*made, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return certificate, key


async def test_https(tmp_path: Path) -> None:
    """The listener itself speaks TLS: whole answers, streams, and what FastAPI serves."""
    certificate, key = make_certificate(tmp_path)
    port = free_port()
    async with running_gateway() as fake, fake.engines["bf16"].serving() as url:
        settings = {"port": port, "tls_certificate": str(certificate), "tls_key": str(key)}
        urls = {"bf16": [url]}
        process = await started(write_setup(tmp_path, port, gateway=settings, pools=urls, serve=["bf16"]))
        trusted = ssl.create_default_context(cafile=str(certificate))
        base = f"https://127.0.0.1:{port}"
        question = {"model": "assistant", "messages": [{"role": "user", "content": "hello"}]}
        try:
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trusted)) as http:
                async with http.get(base + "/v1/models") as answer:
                    assert answer.status == 200
                for stream in (False, True):
                    body = question | {"stream": stream}
                    async with http.post(base + "/v1/chat/completions", json=body) as answer:
                        assert answer.status == 200
                        assert ("[DONE]" in await answer.text()) is stream
            async with aiohttp.ClientSession() as http:
                with pytest.raises(aiohttp.ClientError):
                    await http.get(base.replace("https", "http") + "/v1/models")
        finally:
            process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait, 20) == 0
            assert process.stderr is not None
            process.stderr.close()
