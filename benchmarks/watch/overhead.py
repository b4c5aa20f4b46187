"""What the watch costs requests that it does not look at.

    python -m benchmarks.watch.overhead

Two gateways on one core, alike but for the watch: one has it, with one answer in a hundred listened to, the
other has neither. They take turns, with a fast fake engine and ``wrk`` on the other core, and a load straight
to the engine between them. The median of one connection is of requests that nobody listened to. The ratio is
of what the gateways add to the engine's own median; its interval is of the turns, by bootstrap. With 32
connections all of the watch's own work counts too: requests per second, and the gateway's CPU time for each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from functools import partial

import numpy as np
from tqdm import tqdm

from benchmarks.gateway.peers import OTHER_CORE, ROOT, WORK, Peer, Running, free_port, tiercel, wait_for
from benchmarks.gateway.run import CONNECTIONS, SMALL, body, wrk

RESULT = ROOT / "var/benchmarks/watch/overhead.json"
QUANTIZED = {"core": {"canary": {"variant": "int8", "percent": 100}}, "summarizer": {}}
"""Every answer is of a quantized variant, so that there is something to watch."""
GATEWAYS = {
    "on": {"roles": QUANTIZED},
    "off": {"roles": QUANTIZED, "watch": {"enabled": False}, "quality": {"sample_rate": 0.0}},
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--turns", type=int, default=15)
    options.add_argument("--seconds", type=float, default=3)
    given = options.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = ["taskset", "-c", str(OTHER_CORE), sys.executable, "-m", "benchmarks.gateway.upstream"]
    engine = subprocess.Popen([*command, "--port", str(port)], cwd=ROOT)
    running: dict[str, Running] = {}
    message = body(SMALL)
    medians: dict[str, list[float]] = {name: [] for name in ("engine", *GATEWAYS)}
    rates: dict[str, list[float]] = {name: [] for name in GATEWAYS}
    cpu_us: dict[str, list[float]] = {name: [] for name in GATEWAYS}
    try:
        wait_for(f"http://127.0.0.1:{port}/health", engine)
        for name, changes in GATEWAYS.items():
            running[name] = Running(Peer(f"watch-{name}", partial(tiercel, **changes)), port)
        ports = {"engine": port, **{name: gateway.port for name, gateway in running.items()}}
        for turn in tqdm(range(given.turns), file=sys.stderr):
            names = list(medians)
            for name in names if turn % 2 else reversed(names):
                found = wrk(ports[name], message, 1, given.seconds, f"watch-{name}")
                assert not found["errors"], (name, found)
                medians[name].append(found["p50_ms"])
            for name in GATEWAYS:
                before = running[name].cpu_s()
                found = wrk(ports[name], message, CONNECTIONS, given.seconds, f"watch-{name}")
                assert not found["errors"], (name, found)
                rates[name].append(found["rate"])
                cpu_us[name].append(1e6 * (running[name].cpu_s() - before) / found["requests"])
    finally:
        for gateway in running.values():
            gateway.stop()
        engine.terminate()
        engine.wait()
    on, off, bare = (np.array(medians[name]) for name in ("on", "off", "engine"))
    result = {
        "turns": given.turns,
        "median_ms": {name: float(np.median(values)) for name, values in medians.items()},
        "added": _ratio(on - bare, off - bare),
        "rate": _ratio(np.array(rates["on"]), np.array(rates["off"])),
        "cpu_us": {name: float(np.median(values)) for name, values in cpu_us.items()},
        "cpu": _ratio(np.array(cpu_us["on"]), np.array(cpu_us["off"])),
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


def _ratio(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Of the medians of paired figures, with its 95 % bootstrap interval."""
    picks = np.random.default_rng(0).integers(0, len(a), size=(2000, len(a)))
    low, high = np.quantile(np.median(a[picks], 1) / np.median(b[picks], 1), (0.025, 0.975))
    return float(np.median(a) / np.median(b)), float(low), float(high)


if __name__ == "__main__":
    main()
