"""Agents' sessions through different arrangements of engines and gateways, on one machine.

    python -m benchmarks.agents.run --config tiercel.yaml --traces path/to/agent_traces

``--config`` is a fleet whose first model has judged and measured variants ``bf16`` and ``int8`` (``tiercel up
MODEL`` makes them) and roles ``core`` and ``auxiliary``. Real agent traces are replayed by AIPerf
(:mod:`benchmarks.agents.traces` says how they are made smaller); arrangements take turns within each repeat,
each with engines of its own that have just been started.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.agents.arrangements import Arrangement, arrangements, configuration
from benchmarks.agents.measure import Workload, measured
from benchmarks.agents.quality import quality_of
from benchmarks.agents.report import write_report
from benchmarks.agents.traces import AUXILIARY, CORE, Scale, read_traces, sessions, streams, traffic, write
from deploy.commands.fleet_plan import best_layouts
from deploy.fleet.plan import FleetPlan
from deploy.fleet.traffic import Traffic
from gateway.config import load_config

WORK = Path("var/benchmarks/agents")
DEFAULT = ("bf16", "int8", "vllm-router", "litellm", "tiercel")


def planned(user: Path, wanted: Traffic, directory: Path) -> FleetPlan:
    """What ``tiercel fleet plan`` says of this traffic."""
    path = configuration(user, ("bf16",), directory)
    return best_layouts(load_config(path), wanted)[0]


def said(plan: FleetPlan) -> list[dict[str, Any]]:
    return [
        {
            "served": [name.rpartition(":")[2] for name in one.layout.served],
            "sessions_per_s": one.prediction.sessions_per_s,
            "latency_s": {role: found.total_s for role, found in one.prediction.latencies.items()},
        }
        for one in plan.ranked
    ]


async def repeats(
    chosen: Sequence[Arrangement], user: Path, work: Workload, count: int, out: Path
) -> AsyncIterator[dict[str, Any]]:
    """Every arrangement once in each repeat; each repeat begins with another one."""
    for repeat in range(count):
        shift = repeat % len(chosen)
        for one in (*chosen[shift:], *chosen[:shift]):
            began = time.monotonic()
            result = await measured(one, user, work, out / one.name)
            result["repeat"] = repeat
            core = result["roles"][CORE]["total_s"]
            print(
                f"repeat {repeat + 1}, {one.title}: {result['sessions_per_s']:.3f} sessions/s, core p50 "
                f"{core['p50']:.2f} s, p95 {core['p95']:.2f} s; {time.monotonic() - began:.0f} s in all",
                flush=True,
            )
            yield result


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """What was measured; it is written down after each run."""
    fields = {field.name for field in dataclasses.fields(Scale)}
    scale = Scale(**{name: value for name, value in vars(options).items() if name in fields})
    made = sessions(read_traces(options.traces), options.sessions, scale)
    wanted = traffic(made, options.at_once)
    options.work.mkdir(parents=True, exist_ok=True)
    write(made, options.work / "traces")
    (options.work / "traffic.yaml").write_text(yaml.safe_dump(wanted.model_dump()), encoding="utf-8")
    plan = planned(options.config, wanted, options.work / "plan")
    best = [name.rpartition(":")[2] for name in plan.chosen.layout.served]
    every = {one.name: one for one in arrangements(best, {CORE: options.core, AUXILIARY: options.auxiliary})}
    if unknown := [name for name in options.arrangements if name not in every]:
        raise SystemExit(f"--arrangements: {unknown[0]!r} is none; there are {', '.join(every)}")
    chosen = [every[name] for name in options.arrangements]
    print(f"fleet plan: {' + '.join(best)} for {wanted.model_dump()['roles']}", flush=True)
    config = load_config(configuration(options.config, ("bf16",), options.work / "plan"))
    tokenizer = next(iter(config.each())).path
    asked = [request for one in made for _, requests in streams(one) for request in requests]
    work = Workload(
        traces=options.work / "traces",
        sessions=options.sessions,
        requests=len(asked),
        prompt_tokens=sum(one["in"] for one in asked),
        at_once=options.at_once,
        tokenizer=tokenizer,
    )
    document: dict[str, Any] = {
        "command": " ".join(sys.argv[1:]),
        "scale": dataclasses.asdict(scale),
        "sessions": options.sessions,
        "at_once": options.at_once,
        "requests": work.requests,
        "traffic": wanted.model_dump(),
        "plan": said(plan),
        "titles": {one.name: one.title for one in chosen},
        "quality": quality_of(config),
        "results": [],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    async for result in repeats(chosen, options.config, work, options.repeats, options.work):
        document["results"].append(result)
        options.out.write_text(json.dumps(document, indent=1), encoding="utf-8")
    return document


def main() -> None:
    options = _arguments()
    if options.show is not None:
        document = json.loads(options.show.read_text(encoding="utf-8"))
    elif options.traces is None:
        raise SystemExit("say with --traces where the agent traces are, or with --show what to report")
    else:
        document = asyncio.run(run(options))
    write_report(document, options.docs, options.picture)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--config", type=Path, default=Path("tiercel.yaml"))
    parser.add_argument("--traces", type=Path, help="folder of agent traces (*.json.gz)")
    parser.add_argument("--sessions", type=int, default=8, help="that are replayed each time")
    parser.add_argument("--at-once", type=int, default=4, help="sessions at a time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--arrangements", nargs="+", default=list(DEFAULT), metavar="NAME")
    parser.add_argument("--core", default="bf16", help="the static rule's variant for core")
    parser.add_argument("--auxiliary", default="int8", help="the static rule's variant for auxiliary")
    parser.add_argument("--prompt", type=int, default=Scale.prompt, help="prompts so many times shorter")
    parser.add_argument("--answer", type=int, default=Scale.answer, help="answers so many times shorter")
    parser.add_argument("--turns", type=int, default=Scale.turns, help="requests of a session, at most")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--out", type=Path, default=WORK / "agents.json")
    parser.add_argument("--show", type=Path, help="report what an earlier run wrote, and run nothing")
    parser.add_argument("--docs", type=Path, help="document whose results between marks are written anew")
    parser.add_argument("--picture", type=Path, help="where the picture is drawn")
    return parser.parse_args()


if __name__ == "__main__":
    main()
