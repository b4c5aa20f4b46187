"""A fault injected under live traffic: how many sampled answers until the watch acts, and does it ever act
wrongly?

    python -m benchmarks.watch.inject [--faults two-bits kv-scales chat-template] [--repeats 3] [--healthy
    5000]

Real engines serve the demo's variants; traffic runs all the time. After ``--healthy`` answers, in which
nothing may be demoted, the engine of the quantized variant is replaced by one that serves a harmed copy at
the same address. Counted are the answers that were put before the reference from then until the demotion.
Then the healthy files come back, and probation restores the variant. Needs the variants (``tiercel
quantize``) and CLINC150.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from tqdm import tqdm

from benchmarks.watch.traffic import Answered, questions, send
from deploy.commands import run_engines
from deploy.damage import DAMAGES, damaged
from deploy.engine import free_port
from deploy.supervisor import Stack
from gateway.config import Config, load_config, variant_id
from quantize.card import variant_directory

WORK = Path("var/benchmarks/watch")
ROLES = ("intent_classifier", "summarizer")
MODEL, SHORT = "assistant", "int4-kv8"
VARIANT = variant_id(MODEL, SHORT)
MOST_ANSWERS = 4000
CHECKS = ("shadow",)


def configuration(rate: float) -> Path:
    """The project's own, with the watch looking at ``rate`` of the answers and a store of its own."""
    WORK.mkdir(parents=True, exist_ok=True)
    root = Path.cwd()
    settings = yaml.safe_load((root / "tiercel.yaml").read_text(encoding="utf-8"))
    model = settings["models"][MODEL]
    model["path"] = str(root / model["path"])
    model["calibration"] = str(root / model["calibration"])
    model["serve"] = ["bf16", "int8", SHORT]
    settings["variants_dir"] = str(root / settings["variants_dir"])
    for role in settings["roles"].values():
        for name in ("tasks", "long_context"):
            if name in role:
                role[name] = str(root / role[name])
    settings["engine"]["python"] = str(root / ".venv-engine/bin/python")
    settings["gateway"] = {"port": free_port("127.0.0.1"), "access_log": False}
    settings["run_dir"] = "run"
    settings["watch"] = {
        "rate": rate,
        "probation_after_s": 5.0,
        "probation_rate": 1.0,
        "demotions_per_hour": 1000,
    }
    path = WORK / "tiercel.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


class Run:
    """Traffic that never ends, and what the gateway says of it."""

    def __init__(self, stack: Stack, session: aiohttp.ClientSession) -> None:
        self.stack, self.session = stack, session
        self.answers: list[Answered] = []
        self._next = itertools.count(0, 2000)
        self._stop = asyncio.Event()
        self.began = time.monotonic()
        self.ended = asyncio.Event()
        self.marks: list[tuple[float, str]] = []

    def mark(self, what: str) -> None:
        self.marks.append((time.monotonic() - self.began, what))

    async def traffic(self, concurrency: int) -> None:
        try:
            await self._traffic(concurrency)
        finally:
            self.ended.set()

    async def _traffic(self, concurrency: int) -> None:
        for first in self._next:
            asked = questions(ROLES, 2000, first)
            begun = time.monotonic() - self.began
            async for one in send(self.session, self.stack.url, asked, concurrency, stop=self._stop.is_set):
                self.answers.append(
                    Answered(one.role, one.variant, one.reason, one.right, one.seconds, begun + one.at)
                )
            if self._stop.is_set():
                return

    async def watch(self) -> dict[str, Any]:
        async with self.session.get(self.stack.url + "/admin/watch?since_s=86400&events=1000") as response:
            found: dict[str, Any] = await response.json()
            return found

    def looked_at(self, report: dict[str, Any]) -> dict[str, int]:
        """Answers that the reference has been asked about, by role."""
        return {
            cell["role"]: sum(cell["checks"].get(check, {}).get("answers", 0) for check in CHECKS)
            for cell in report["cells"]
            if cell["variant"] == VARIANT
        }

    async def until(self, true: Any, what: str, most_s: float = 600.0) -> dict[str, Any]:
        began = time.monotonic()
        while True:
            report = await self.watch()
            if true(report):
                return report
            if time.monotonic() - began > most_s:
                raise TimeoutError(
                    f"{what} did not come within {most_s:.0f} s: {json.dumps(report['cells'])[:2000]}"
                )
            await asyncio.sleep(0.2)

    def stop(self) -> None:
        self._stop.set()


def cell(report: dict[str, Any], role: str) -> dict[str, Any]:
    return next(c for c in report["cells"] if (c["variant"], c["role"]) == (VARIANT, role))


async def inject(run: Run, config: Config, fault: str) -> list[dict[str, Any]]:
    """Harm, wait for the demotion of every role, heal, wait for their return; a row per role."""
    source = variant_directory(config.of(MODEL).variants_dir, SHORT)
    harmed = damaged(source, WORK / f"harmed-{fault}", fault)
    # Nothing is asked of the variant while its engine changes, so that every answer counts on one side.
    await run.stack.swap(VARIANT, harmed)
    before = run.looked_at(await run.watch())
    harmed_at = time.monotonic() - run.began
    run.mark(f"{fault} injected")
    rows = []
    waiting = set(ROLES)
    while waiting:
        if run.ended.is_set():
            raise RuntimeError("the traffic has ended")
        report = await run.watch()
        for role in sorted(waiting):
            now = cell(report, role)
            if not now["serves"]:
                waiting.discard(role)
                run.mark(f"{role} demoted")
                rows.append(
                    {
                        "fault": fault,
                        "role": role,
                        "answers": run.looked_at(report)[role] - before[role],
                        "given": sum(
                            (a.role, a.variant) == (role, VARIANT) and a.at > harmed_at for a in run.answers
                        ),
                        "seconds": round(time.monotonic() - run.began - harmed_at, 2),
                        "why": now["why"],
                    }
                )
        if waiting and min(run.looked_at(report)[role] - before[role] for role in waiting) > MOST_ANSWERS:
            rows += [{"fault": fault, "role": role, "answers": None, "seconds": None} for role in waiting]
            break
        await asyncio.sleep(0.1)
    for row in rows:
        wrong = [
            a for a in run.answers if a.role == row["role"] and a.variant == VARIANT and a.at > harmed_at
        ]
        row["harmed_accuracy"] = sum(a.right for a in wrong) / len(wrong) if wrong else None
    await asyncio.sleep(10)  # copies go to the harmed variant on probation, and must not bring it back
    report = await run.watch()
    for row in rows:
        row["came_back_harmed"] = bool(
            row["answers"] is not None and cell(report, str(row["role"]))["serves"]
        )
    await run.stack.swap(VARIANT, source)
    run.mark("healthy files again")
    healed = time.monotonic()
    await run.until(lambda found: all(cell(found, role)["serves"] for role in ROLES), "the restoration")
    for row in rows:
        row["restored_after_s"] = round(time.monotonic() - healed, 1)
    run.mark("restored")
    return rows


async def benchmark(
    faults: Sequence[str], repeats: int, healthy: int, rate: float, concurrency: int
) -> dict[str, Any]:
    path = configuration(rate)
    config = load_config(path)
    (config.run_dir / "watch.db").unlink(missing_ok=True)
    result: dict[str, Any] = {"rate": rate, "rows": [], "healthy": 0, "false_demotions": 0}

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    async with Stack(config, path, say) as stack, aiohttp.ClientSession() as session:
        run = Run(stack, session)
        traffic = asyncio.create_task(run.traffic(concurrency))
        try:
            with tqdm(total=healthy, desc="healthy", unit="answer", mininterval=2) as bar:
                while len(run.answers) < healthy:
                    await asyncio.sleep(0.5)
                    bar.update(len(run.answers) - bar.n)
                    if traffic.done():
                        traffic.result()
            report = await run.watch()
            result["healthy"] = len(run.answers)
            result["healthy_looked_at"] = run.looked_at(report)
            result["false_demotions"] = sum(event["kind"] == "demoted" for event in report["events"])
            result["healthy_cells"] = [c for c in report["cells"] if c["variant"] == VARIANT and c["checks"]]
            for number, fault in itertools.product(range(repeats), faults):
                say(f"{fault}, {number + 1} of {repeats}")
                rows = await inject(run, config, fault)
                result["rows"] += rows
                for row in rows:
                    say(f"  {row}")
                (WORK / "inject.json").write_text(json.dumps(result, indent=1))
        finally:
            run.stop()
            await asyncio.wait([traffic], timeout=60)
        result["marks"] = run.marks
        result["answers"] = [[a.role, a.variant, a.right, round(a.at, 2)] for a in run.answers]
        result["events"] = (await run.watch())["events"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--faults", nargs="+", choices=DAMAGES, default=list(DAMAGES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--healthy", type=int, default=5000, help="answers before the first fault")
    parser.add_argument("--rate", type=float, default=1.0, help="share that the reference is asked about")
    parser.add_argument("--concurrency", type=int, default=6)
    options = parser.parse_args()
    result = run_engines(
        benchmark(options.faults, options.repeats, options.healthy, options.rate, options.concurrency)
    )
    (WORK / "inject.json").write_text(json.dumps(result, indent=1))
    print(f"{result['healthy']} healthy answers, {result['false_demotions']} demotions")
    for fault in options.faults:
        seen = [
            row["answers"] for row in result["rows"] if row["fault"] == fault and row["answers"] is not None
        ]
        lost = sum(row["fault"] == fault and row["answers"] is None for row in result["rows"])
        median = statistics.median(seen) if seen else None
        given = [row.get("given") for row in result["rows"] if row["fault"] == fault]
        print(f"{fault}: median {median} scored answers until demotion ({seen}); {lost} not noticed")
        print(f"  clients had got {given} answers by then")


if __name__ == "__main__":
    main()
