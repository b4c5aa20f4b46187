"""What is compared: which variants serve, and who decides which of them answers a role.

Engines are started as ``tiercel up`` starts them: on the cores that a placement gives them, with the cards'
arguments. An arrangement has ``KV_GIB`` of KV cache in all, which its engines share equally.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import urllib.request
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.agents.traces import AUXILIARY, CORE
from benchmarks.gateway.peers import environment, free_port, wait_for
from deploy.engine import EngineProcess, EngineSpec
from deploy.fleet.engines import engine_specs
from deploy.supervisor import Stack
from gateway.config import load_config

BITS = {"bf16": 16, "int8": 8, "int4": 4}
KV_GIB = 2
CONTEXT = 4096
"""Tokens of the longest prompt and its answer."""
ENGINE_ARGUMENTS = ("--block-size", "32", "--enable-prompt-tokens-details")


@dataclass(frozen=True)
class Arrangement:
    """``serves`` says which variant answers which role; None: Tiercel's router decides among ``served``."""

    name: str
    title: str
    served: tuple[str, ...]
    door: str
    """``engine`` (the client asks it directly), ``vllm-router``, ``litellm`` or ``tiercel``."""
    serves: Mapping[str, str] | None = None
    core_bits: int | None = None
    """What the core role's budget asks for beside what the user's file says."""


def arrangements(planned: Sequence[str], static: Mapping[str, str]) -> tuple[Arrangement, ...]:
    """``planned``: what ``tiercel fleet plan`` chose. ``static``: the rule that the other gateways go by."""
    pools = tuple(dict.fromkeys(static.values()))
    rule = " + ".join(pools)
    one_bf16, one_int8 = ({CORE: name, AUXILIARY: name} for name in ("bf16", "int8"))
    return (
        Arrangement("bf16", "one engine, bf16", ("bf16",), "engine", one_bf16),
        Arrangement("int8", "one engine, int8", ("int8",), "engine", one_int8),
        Arrangement("vllm-router", f"vllm-router, {rule}", pools, "vllm-router", static),
        Arrangement("litellm", f"LiteLLM, {rule}", pools, "litellm", static),
        Arrangement("tiercel", f"Tiercel, {' + '.join(planned)}", tuple(planned), "tiercel"),
        Arrangement(
            "tiercel-pools", f"Tiercel, {rule}, by budget", pools, "tiercel", core_bits=BITS[static[CORE]]
        ),
    )


@dataclass
class Running:
    """An arrangement that takes requests at ``url``."""

    url: str
    engines: dict[str, EngineProcess]
    """By variant."""
    doors: list[int]
    """Processes of whatever stands before the engines."""

    def processes(self) -> dict[str, list[int]]:
        """Process ids of engines and of what stands before them, their children included."""
        roots = {"engines": [one.pid for one in self.engines.values() if one.pid], "door": self.doors}
        found: dict[str, list[int]] = {}
        for name, pids in roots.items():
            trees = [psutil.Process(pid) for pid in pids]
            found[name] = [one.pid for tree in trees for one in (tree, *tree.children(recursive=True))]
        return found


def configuration(user: Path, served: Sequence[str], directory: Path, core_bits: int | None = None) -> Path:
    """The user's file with what is served, ports of its own, and the arrangement's share of the cache."""
    raw: dict[str, Any] = yaml.safe_load(user.read_text(encoding="utf-8"))
    base = user.resolve().parent
    name, model = next(iter(raw["models"].items()))
    engine = {
        **raw.get("engine", {}),
        "base_port": free_port(),
        "kv_cache_gib": KV_GIB // len(served),
        "max_model_len": CONTEXT,
        "extra_args": [*raw.get("engine", {}).get("extra_args", []), *ENGINE_ARGUMENTS],
    }
    roles = dict(raw["roles"])
    if core_bits is not None:
        core = roles.get(CORE) or {}
        budget = core.get("budget", {})
        least = max(core_bits, budget.get("min_weight_bits") or 0)
        roles[CORE] = {**core, "budget": {**budget, "min_weight_bits": least}}
    changed = {
        **raw,
        "roles": roles,
        "models": {name: {**model, "path": str(base / model["path"]), "serve": list(served)}},
        "variants_dir": str((base / raw["variants_dir"]).resolve()),
        "run_dir": str(directory / "run"),
        "gateway": {**raw.get("gateway", {}), "port": free_port()},
        "engine": engine,
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "tiercel.yaml"
    path.write_text(yaml.safe_dump(changed), encoding="utf-8")
    return path


@contextlib.asynccontextmanager
async def started(one: Arrangement, user: Path, directory: Path) -> AsyncIterator[Running]:
    """The arrangement, ready inside the block. ``directory`` is for its configuration and its logs."""
    path = configuration(user, one.served, directory, one.core_bits)
    config = load_config(path)
    if one.door == "tiercel":
        async with Stack(config, path, lambda _text: None) as stack:
            engines = {each.spec.card.variant: each for each in stack.engines.values()}
            yield Running(stack.url, engines, [stack.gateway.pid or 0])
        return
    async with AsyncExitStack() as running:
        engines = {spec.card.variant: EngineProcess(_by_role(spec)) for spec in engine_specs(config)}
        for engine in engines.values():
            running.push_async_callback(engine.stop)
            await engine.start()
        for engine in engines.values():
            await engine.wait_ready()
        urls = {variant: engine.spec.url for variant, engine in engines.items()}
        if one.door == "engine":
            yield Running(next(iter(urls.values())), engines, [])
            return
        assert one.serves is not None
        by_role = {role: urls[variant] for role, variant in one.serves.items()}
        process, url = await asyncio.to_thread(DOORS[one.door], by_role, directory)
        running.callback(_end, process)
        yield Running(url, engines, [process.pid])


def _by_role(spec: EngineSpec) -> EngineSpec:
    """The engine answers to the roles' names as well: nobody else translates them here."""
    named = ("--served-model-name", spec.card.model, CORE, AUXILIARY)
    settings = spec.settings.model_copy(update={"extra_args": (*spec.settings.extra_args, *named)})
    return dataclasses.replace(spec, settings=settings)


def _vllm_router(by_role: Mapping[str, str], directory: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Its mode for several models, each of which is a role here."""
    python = environment("vllm-router", ("vllm-router==0.1.17", "uvloop", "aiohttp")) / "bin/python"
    port = free_port()
    command = [
        str(python), "-m", "vllm_router.launch_router", "--host", "127.0.0.1", "--port", str(port),
        "--enable-igw", "--policy", "cache_aware", "--log-level", "error",
        "--prometheus-port", str(free_port()),
    ]  # fmt: skip
    process, url = _process(command, port, "/health", directory / "vllm-router.log")
    for role, engine in by_role.items():
        body = json.dumps({"url": engine, "model_id": role}).encode()
        headers = {"content-type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{url}/workers", body, headers), timeout=30):
            pass
    return process, url


def _litellm(by_role: Mapping[str, str], directory: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A model of its list for each role."""
    path = directory / "litellm.yaml"
    models = [
        {
            "model_name": role,
            "litellm_params": {"model": f"hosted_vllm/{role}", "api_base": f"{url}/v1", "api_key": "none"},
        }
        for role, url in by_role.items()
    ]
    path.write_text(json.dumps({"model_list": models}), encoding="utf-8")
    program, port = environment("litellm", ("litellm[proxy]==1.106.2",)) / "bin/litellm", free_port()
    command = [str(program), "--config", str(path), "--port", str(port), "--host", "127.0.0.1"]
    return _process([*command, "--num_workers", "1"], port, "/health/liveliness", directory / "litellm.log")


LITELLM = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    # Nobody asks for keys here, Tiercel neither.
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
}
DOORS = {"vllm-router": _vllm_router, "litellm": _litellm}


def _process(
    command: Sequence[str], port: int, ready: str, said: Path
) -> tuple[subprocess.Popen[bytes], str]:
    url = f"http://127.0.0.1:{port}"
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with said.open("wb") as log:
        process = subprocess.Popen(
            list(command),
            stdout=log,
            stderr=log,
            env=env | LITELLM,
            start_new_session=True,
        )
    try:
        wait_for(url + ready, process)
    except BaseException as error:
        _end(process)
        if not isinstance(error, SystemExit):
            raise
        last = said.read_text(encoding="utf-8", errors="replace").splitlines()[-8:]
        raise SystemExit(f"{command[0]} did not become ready ({said}):\n" + "\n".join(last)) from None
    return process, url


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
