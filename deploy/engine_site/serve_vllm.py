"""vLLM's OpenAI-compatible server for engines that share a machine's cores, which is the case on a CPU.

1. Its processes are forked instead of spawned. An engine is three processes, and importing vLLM takes
   each of them 17 s of CPU time; forked ones share what the first has imported. vLLM forks by
   default, but its CPU platform asks for ``spawn``; nothing of torch has run before the fork here,
   which is what ``spawn`` protects from.
2. An engine's processes wait for each other asleep. By default a reader of vLLM's shared-memory queue
   spins for a second after every message, which takes two cores from the other engines.
3. One more route hands out log-probabilities in binary: :mod:`score_route`.
"""

import os

import vllm.plugins
from score_route import ScoreRoute, keep_arrays  # type: ignore[import-not-found]
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.entrypoints.launchers.api_server.entry import main
from vllm.platforms.cpu import CpuPlatform

SPIN_S = 0.0005
"""How long a reader spins before it sleeps until it is notified."""

_check_and_update_config = CpuPlatform.check_and_update_config


def _check_and_keep_forking(vllm_config: object) -> None:
    _check_and_update_config(vllm_config)
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"


CpuPlatform.check_and_update_config = staticmethod(_check_and_keep_forking)

SpinCondition.__init__.__defaults__ = (SPIN_S,)  # busy_loop_s, its only default

_load_endpoint_plugins = vllm.plugins.load_endpoint_plugins


def _load_with_score_route(supported_tasks: object = None) -> list[object]:
    return [*_load_endpoint_plugins(supported_tasks), ScoreRoute()]


# An entry point would need VLLM_PLUGINS, which also switches off every plugin that it does not name.
vllm.plugins.load_endpoint_plugins = _load_with_score_route
keep_arrays()

if __name__ == "__main__":
    main()
