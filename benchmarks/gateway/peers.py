"""The gateways that are compared: how each is made ready and started on one core."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

import deploy.engine

if TYPE_CHECKING:
    from quantize.card import Card

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "var/benchmarks/gateway"
KEY = "tk-benchmark"
VARIANTS = WORK / "variants"
GATEWAY_CORE, OTHER_CORE = 0, 1


@dataclass(frozen=True)
class Peer:
    """``start`` gives the command and the path that answers when it is ready."""

    name: str
    start: Callable[[int, int], tuple[list[str], str]]
    without: tuple[str, ...] = ()
    """Tests that would take it hours."""


class Running:
    """A gateway that runs, pinned to its core."""

    def __init__(self, peer: Peer, upstream_port: int) -> None:
        self.port = free_port()
        command, ready = peer.start(self.port, upstream_port)
        log = (WORK / f"{peer.name}.log").open("wb")
        self.process = subprocess.Popen(
            ["taskset", "-c", str(GATEWAY_CORE), *command],
            stdout=log,
            stderr=log,
            cwd=ROOT,
            start_new_session=True,
            env=os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        )
        wait_for(f"http://127.0.0.1:{self.port}{ready}", self.process)

    def pids(self) -> list[int]:
        import psutil

        root = psutil.Process(self.process.pid)
        return [root.pid, *(child.pid for child in root.children(recursive=True))]

    def cpu_s(self) -> float:
        """User and system time so far, of all its processes."""
        ticks = 0
        for pid in self.pids():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def rss_mb(self) -> float:
        total = 0
        for pid in self.pids():
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("VmRSS"):
                    total += int(line.split()[1])
        return total / 1024

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def free_port() -> int:
    return deploy.engine.free_port("127.0.0.1")


def wait_for(url: str, process: subprocess.Popen[bytes], within_s: float = 120.0) -> None:
    """Until it answers 200."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            request = urllib.request.Request(url, headers={"authorization": f"Bearer {KEY}"})
            if urllib.request.urlopen(request, timeout=1).status == 200:
                return
        except OSError:
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"{process.args} did not become ready; its log is in {WORK}")
        time.sleep(0.1)


def environment(name: str, requirements: tuple[str, ...]) -> Path:
    """A Python environment of a peer's own, made when it is missing."""
    path = WORK / "env" / name
    if not (path / ".ready").exists():
        shutil.rmtree(path, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", path], check=True)
        pip = [path / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *requirements], check=True)
        (path / ".ready").touch()
    return path


def variants() -> dict[str, Card]:
    """The cards, by id, of variants that nobody made, in the folder where a gateway looks for them."""
    from quantize.card import Card, write_card

    cards = {}
    for name, bits, size in (("bf16", 16, 8_000_000), ("int8", 8, 5_000_000)):
        card = Card(
            model="assistant", variant=name, reference="bf16", scheme="benchmark", method="none",
            weight_bits=bits, module_bits={}, weight_bytes=size, kv_bytes_per_token=1024, max_model_len=1024,
            versions={}, created="2026-11-21", files={}, evaluation=None,
        )  # fmt: skip
        cards[card.id] = card
        directory = VARIANTS / card.model / name / "000000000000"
        directory.mkdir(parents=True, exist_ok=True)
        write_card(card, directory)
        current = directory.parent / "current"
        if not current.is_symlink():
            current.symlink_to(directory.name)
    return cards


def tiercel(port: int, upstream: int, **changes: object) -> tuple[list[str], str]:
    """All switched on: keys, routing by quality budget, usage, metrics, log, quality signals on a sample.
    ``changes`` are laid over the configuration."""
    variants()
    config = {
        "models": {
            "assistant": {"path": str(ROOT / "deploy/assistant/model"), "serve": ["bf16", "int8"]},
        },
        "variants_dir": str(VARIANTS),
        "run_dir": str(WORK / "run"),
        "roles": {"core": {}, "summarizer": {}},
        "default_role": "core",
        "pools": {"bf16": [f"http://127.0.0.1:{upstream}"], "int8": [f"http://127.0.0.2:{upstream}"]},
        "keys": [{"name": "bench", "sha256": hashlib.sha256(KEY.encode()).hexdigest(), "tenant": "bench"}],
        "gateway": {"port": port},
        "quality": {"sample_rate": 0.01},
        **changes,
    }
    path = WORK / f"tiercel-{port}.yaml"
    path.write_text(yaml.safe_dump(config))
    return [sys.executable, "-m", "gateway", "--config", str(path)], "/readiness"


def _four_replicas(port: int, upstream: int) -> tuple[list[str], str]:
    """The same with four replicas, among which the policy that looks at prompts chooses."""
    replicas = [f"http://127.0.0.{number}:{upstream}" for number in (1, 3, 4, 5)]
    pools = {"bf16": replicas, "int8": [f"http://127.0.0.2:{upstream}"]}
    return tiercel(port, upstream, pools=pools, gateway={"port": port, "policy": "prefix_aware"})


def nginx(port: int, upstream: int, other: int = 0, others: str = "") -> tuple[list[str], str]:
    """One worker, connections kept on both sides, nothing buffered. The session ``others`` goes to the engine
    at ``other``."""
    folder = WORK / "nginx"
    folder.mkdir(exist_ok=True)
    path = folder / f"{port}.conf"
    path.write_text(
        f"""worker_processes 1; daemon off; pid {folder}/{port}.pid; error_log {folder}/error.log;
events {{ worker_connections 16384; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  keepalive_requests 100000000; client_max_body_size 64m; client_body_buffer_size 1m;
  upstream engine {{ server 127.0.0.1:{upstream}; keepalive 4096; keepalive_requests 100000000; }}
  upstream other {{ server 127.0.0.1:{other or upstream}; keepalive 4096; keepalive_requests 100000000; }}
  map $http_x_session_id $chosen {{ default engine; "{others or "-"}" other; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://$chosen; proxy_http_version 1.1; proxy_set_header connection "";
      proxy_buffering off; proxy_request_buffering off; proxy_read_timeout 600s;
    }}
  }}
}}
"""
    )
    return ["nginx", "-c", str(path), "-p", str(folder)], "/health"


def _vllm_router(port: int, upstream: int) -> tuple[list[str], str]:
    python = environment("vllm-router", ("vllm-router==0.1.17", "uvloop", "aiohttp")) / "bin/python"
    return [
        str(python), "-m", "vllm_router.launch_router", "--host", "127.0.0.1", "--port", str(port),
        "--worker-urls", f"http://127.0.0.1:{upstream}", "--policy", "round_robin", "--log-level", "error",
        "--prometheus-port", str(free_port()),
    ], "/health"  # fmt: skip


def _smg(port: int, upstream: int) -> tuple[list[str], str]:
    python = environment("smg", ("smg==1.13.0",)) / "bin/python"
    return [
        str(python), "-m", "smg.launch_router", "--host", "127.0.0.1", "--port", str(port),
        "--worker-urls", f"http://127.0.0.1:{upstream}", "--policy", "round_robin", "--log-level", "error",
        "--prometheus-port", str(free_port()),
    ], "/health"  # fmt: skip


def _floor(port: int, upstream: int) -> tuple[list[str], str]:
    command = ["-m", "benchmarks.gateway.floor", "--port", str(port), "--engine", str(upstream)]
    return [sys.executable, *command], "/health"


def _litellm(port: int, upstream: int) -> tuple[list[str], str]:
    python = environment("litellm", ("litellm[proxy]==1.106.2",)) / "bin"
    path = WORK / f"litellm-{port}.yaml"
    settings = {
        "model_list": [
            {
                "model_name": "assistant",
                "litellm_params": {
                    "model": "hosted_vllm/assistant",
                    "api_base": f"http://127.0.0.1:{upstream}/v1",
                    "api_key": "none",
                },
            }
        ],
        "general_settings": {"master_key": KEY},
    }
    path.write_text(json.dumps(settings))
    command = [str(python / "litellm"), "--config", str(path), "--port", str(port), "--host", "127.0.0.1"]
    return [*command, "--num_workers", "1"], "/health/liveliness"


PEERS = {
    peer.name: peer
    for peer in (
        Peer("tiercel", tiercel),
        Peer("tiercel-4-replicas", _four_replicas),
        Peer("nginx", nginx),
        Peer("vllm-router", _vllm_router),
        Peer("smg", _smg),
        Peer("uvloop", _floor),
        Peer("litellm", _litellm, without=("paced", "open")),
    )
}
