"""vLLM's OpenAI-compatible server for engines that share a machine's cores, which is the case on a CPU.

1. Its processes are forked instead of spawned. An engine is three processes, and importing vLLM takes
   each of them 17 s of CPU time; forked ones share what the first has imported. vLLM forks by
   default, but its CPU platform asks for ``spawn``; nothing of torch has run before the fork here,
   which is what ``spawn`` protects from.
2. An engine's processes wait for each other asleep. By default a reader of vLLM's shared-memory queue
   spins for a second after every message, which takes two cores from the other engines.
"""

import os

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

if __name__ == "__main__":
    main()
