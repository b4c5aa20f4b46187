"""vLLM's OpenAI-compatible server for engines that share a machine's cores, which is the case on a CPU.

1. Its processes are forked instead of spawned. An engine is three processes, and importing vLLM takes
   each of them 17 s of CPU time; forked ones share what the first has imported. vLLM forks by
   default, but its CPU platform asks for ``spawn``; nothing of torch has run before the fork here,
   which is what ``spawn`` protects from.
2. An engine's processes wait for each other asleep. By default a reader of vLLM's shared-memory queue
   spins for a second after every message, which takes two cores from the other engines. A reader that
   sleeps must be woken by every message, and vLLM's writer may lose a wake-up that follows another one
   within a millisecond: its socket takes one message at a time, and ZeroMQ looks only so often whether
   that has gone. The reader would notice 5 s later. So the writer's socket takes all of them.
3. Quantized weights can carry LoRA adapters. vLLM asks a module's weights on which device its adapter
   belongs, and kernels of 8 and 4 bits have taken those over: here all are on the processor.
4. It can be measured: :mod:`serve_scored`.
"""

import os
import sys

import torch
import zmq  # type: ignore[import-not-found]
from serve_scored import add_scoring  # type: ignore[import-not-found]
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

_init = SpinCondition.__init__


def _init_that_wakes(
    self: SpinCondition,
    is_reader: bool,
    context: zmq.Context,
    notify_address: str,
    busy_loop_s: float = SPIN_S,
) -> None:
    if is_reader:
        _init(self, is_reader, context, notify_address, busy_loop_s)
        return
    self.is_reader = False
    self.last_read = self.busy_loop_s = 0
    self.read_cancel_socket = self.write_cancel_socket = self.poller = None
    self.local_notify_socket = context.socket(zmq.PUB)
    self.local_notify_socket.setsockopt(zmq.SNDHWM, 0)  # a reader keeps the last one only: nothing piles up
    self.local_notify_socket.bind(notify_address)


SpinCondition.__init__ = _init_that_wakes


def _put_adapters_on_the_processor() -> None:
    from vllm.lora.layers import base_linear

    base_linear._get_lora_device = lambda _layer: torch.device("cpu")


if __name__ == "__main__":
    if "--enable-lora" in sys.argv:
        _put_adapters_on_the_processor()
    add_scoring(sys.argv)
    main()
