"""Runs at interpreter start in every process of a vLLM engine, before anything is imported.

1. On CPUs with AMX a process must ask the kernel for the tile registers before it uses them, or it
   dies with an illegal instruction: ``arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)``
   (https://docs.kernel.org/arch/x86/xstate.html).
2. A process of an engine ends when the process that started it dies, however that happened, so that
   nothing is left running: ``prctl(PR_SET_PDEATHSIG, SIGTERM)``. Where the one that started the engine,
   whose number is in ``TIERCEL_STARTED_BY``, has died before that, it ends at once.
"""

import ctypes
import os
import signal
import sys

_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18
_PR_SET_PDEATHSIG = 1


def _prepare() -> None:
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if (starter := os.environ.get("TIERCEL_STARTED_BY")) and _is_gone(starter):
        os._exit(128 + signal.SIGTERM)
    with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
        if any(" amx_tile" in line for line in cpuinfo if line.startswith("flags")):
            libc.syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)


def _is_gone(process: str) -> bool:
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8") as stat:
            return stat.read().rpartition(")")[2].split()[0] in ("Z", "X")
    except OSError:
        return True


_prepare()
os.register_at_fork(after_in_child=_prepare)  # neither is inherited by a forked process
