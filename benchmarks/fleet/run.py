"""The fleet plan's predictions beside what runs: sessions per second of several layouts.

    python -m benchmarks.fleet.run --config tiercel.yaml --seconds 60

The variants of the configuration's first model have to be made and measured (``tiercel quantize``). Each
layout is started as ``tiercel up`` would, sessions run through the gateway, one after another in as many
loops as there are sessions at a time, and what they did is put beside the prediction that was made from the
cards before. Prompts are random tokens of exact lengths, answers are written to their full length.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from deploy.engine import free_port
from deploy.fleet.choice import candidates_of, ladders_of
from deploy.fleet.layouts import layouts
from deploy.fleet.lengths import Lengths
from deploy.fleet.predict import Prediction, predict
from deploy.fleet.traffic import RoleTraffic, Traffic
from deploy.machine import look
from deploy.supervisor import Stack
from gateway.config import Config, load_config
from quantize.report.tables import align

LAYOUTS = (
    ("bf16", "bf16"),
    ("int8", "int8"),
    ("int4", "int4"),
    ("bf16", "int8"),
    ("bf16", "int4"),
    ("int8", "int4"),
)
"""Variant of the core role, and of the auxiliary role."""
BITS = {"bf16": 16, "int8": 8, "int4": 4}
WARM_UP_S = 12.0
WINDOWS = 3
"""Parts of a run that are counted apart: their spread is the figure's."""


def traffic(sessions: int) -> Traffic:
    """A session: two short classifications, then an answer from a longer context."""
    return Traffic(
        roles={
            "auxiliary": RoleTraffic(requests=2, prompt_tokens=120, answer_tokens=8),
            "core": RoleTraffic(requests=1, prompt_tokens=320, answer_tokens=48),
        },
        sessions=sessions,
    )


def configuration(raw: dict[str, Any], core: str, auxiliary: str, directory: Path, base: Path) -> Path:
    """The user's file with the layout's pools, two roles, and no watch: it would ask on its own."""
    name, model = next(iter(raw["models"].items()))
    model = {**model, "path": str(base / model["path"]), "serve": list(dict.fromkeys((core, auxiliary)))}
    lenient = {"max_kl": 1000.0, "min_first_choice_agreement": 0, "max_changed_answers": 1}
    changed = {
        "models": {name: model},
        "variants_dir": str((base / raw["variants_dir"]).resolve()),
        "run_dir": str(directory / "run"),
        "roles": {
            "core": {"budget": {**lenient, "min_weight_bits": BITS[core]}},
            "auxiliary": {"budget": lenient},
        },
        "default_role": "core",
        "watch": {"enabled": False, "reference": "none"},
        "quality": {"sample_rate": 0.0},
        "gateway": {"port": free_port("127.0.0.1"), "access_log": False},
        "engine": {**raw.get("engine", {}), "base_port": free_port("127.0.0.1", 2)},
    }
    path = directory / "tiercel.yaml"
    path.write_text(yaml.safe_dump(changed), encoding="utf-8")
    return path


def predicted(config: Config, wanted: Traffic) -> Prediction:
    candidates, ladders = candidates_of(config), ladders_of(config)
    found, refused = layouts(candidates, ladders, {}, look(), wanted)
    served = set(config.served)
    layout = next((one for one in found if set(one.served) == served), None)
    if layout is None:
        raise SystemExit(f"{served} is no layout here: {refused}")
    return predict(layout.devices, wanted)


class Sessions:
    """Loops of sessions, and when each session of theirs ended."""

    def __init__(self, url: str, model: str, wanted: Traffic) -> None:
        self._url, self._model, self._wanted = url, model, wanted
        self._rng = random.Random(0)
        self._lengths = Lengths(self._rng)
        self.ends: list[float] = []
        self.seconds: dict[str, list[float]] = {role: [] for role in wanted.roles}

    async def run(self, seconds: float) -> None:
        stop = time.monotonic() + seconds
        timeout = aiohttp.ClientTimeout(total=120)
        async with aiohttp.ClientSession(timeout=timeout) as http, asyncio.TaskGroup() as group:
            for number in range(self._wanted.sessions):
                # Begun apart, or all would go on in step.
                delay = number * WARM_UP_S / self._wanted.sessions / 2
                group.create_task(self._loop(http, delay, stop))

    async def _loop(self, http: aiohttp.ClientSession, delay: float, stop: float) -> None:
        await asyncio.sleep(delay)
        while time.monotonic() < stop:
            for role, asked in self._wanted.roles.items():
                for _ in range(round(asked.requests)):
                    began = time.monotonic()
                    await self._ask(http, role, asked)
                    self.seconds[role].append(time.monotonic() - began)
            self.ends.append(time.monotonic())

    async def _ask(self, http: aiohttp.ClientSession, role: str, asked: RoleTraffic) -> None:
        prompt_tokens = self._lengths.draw((role, "prompt"), asked.prompt_tokens)
        body = {
            "model": self._model,
            "prompt": self._rng.choices(range(100, 1000), k=prompt_tokens),
            "max_tokens": self._lengths.draw((role, "answer"), asked.answer_tokens),
            "ignore_eos": True,
            "temperature": 0,
        }
        headers = {"x-agent-role": role}
        async with http.post(f"{self._url}/v1/completions", json=body, headers=headers) as response:
            if response.status != 200:
                raise SystemExit(f"{role}: {response.status} {(await response.text())[:200]}")
            await response.read()


def windows(ends: Sequence[float], began: float, seconds: float) -> list[float]:
    """Sessions per second in each part of the time that counts."""
    width = seconds / WINDOWS
    return [
        sum(began + n * width <= end < began + (n + 1) * width for end in ends) / width
        for n in range(WINDOWS)
    ]


async def one(path: Path, wanted: Traffic, seconds: float) -> dict[str, Any]:
    """A layout, predicted and run."""
    config = load_config(path)
    expected = predicted(config, wanted)
    async with Stack(config, path, lambda text: print(text, flush=True)) as stack:
        sessions = Sessions(stack.url, config.default_model, wanted)
        began = time.monotonic() + WARM_UP_S
        await sessions.run(WARM_UP_S + seconds)
    rates = windows(sessions.ends, began, seconds)
    rate = statistics.mean(rates)
    return {
        "served": list(config.served),
        "predicted": expected.sessions_per_s,
        "measured": rate,
        "windows": rates,
        "ratio": expected.sessions_per_s / rate,
        "latency_s": {role: statistics.mean(times) for role, times in sessions.seconds.items()},
        "predicted_latency_s": {role: found.total_s for role, found in expected.latencies.items()},
    }


def table(found: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            "served",
            "predicted, sessions/s",
            "measured (windows)",
            "predicted / measured",
            "core, s",
            "auxiliary, s",
        ]
    ]
    for result in found:
        spread = " ".join(f"{rate:.2f}" for rate in result["windows"])
        latency, expected = result["latency_s"], result["predicted_latency_s"]
        rows.append(
            [
                " + ".join(result["served"]),
                f"{result['predicted']:.2f}",
                f"{result['measured']:.2f} ({spread})",
                f"{result['ratio']:.2f}",
                f"{latency['core']:.2f} ({expected['core']:.2f})",
                f"{latency['auxiliary']:.2f} ({expected['auxiliary']:.2f})",
            ]
        )
    return align(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--config", type=Path, default=Path("tiercel.yaml"))
    parser.add_argument("--seconds", type=float, default=60.0, help="that count, of each layout")
    parser.add_argument("--sessions", type=int, default=6, help="at the same time")
    parser.add_argument("--out", type=Path, default=Path("var/benchmarks/fleet.json"))
    options = parser.parse_args()
    raw = yaml.safe_load(options.config.read_text(encoding="utf-8"))
    wanted, found = traffic(options.sessions), []
    for core, auxiliary in LAYOUTS:
        with tempfile.TemporaryDirectory() as directory:
            path = configuration(raw, core, auxiliary, Path(directory), options.config.resolve().parent)
            found.append(asyncio.run(one(path, wanted, options.seconds)))
        print(table(found), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
