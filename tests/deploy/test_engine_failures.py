"""Whose fault it is that an engine did not start: only what lies in the files marks a variant broken."""

import pytest

from deploy.engine_failures import EngineLoadError, EngineRoomError, EngineSetupError, diagnose

CORE = "(EngineCore pid=412) ERROR 11-26 06:40:11 [core.py:946] "
SERVER = (
    "(APIServer pid=398) RuntimeError: Engine core initialization failed. See root cause above. "
    "Failed core proc(s): {}\n"
)
GPU_BUSY = (
    CORE + "ValueError: Free memory on device cuda:0 (31.2/79.2 GiB) on startup is less than desired GPU "
    "memory utilization (0.92, 72.87 GiB). Decrease it.\n" + SERVER
)
NO_CACHE = CORE + "ValueError: No available memory for the cache blocks. Try increasing …\n" + SERVER
OOM = CORE + "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n" + SERVER
LONG = (
    CORE + "ValueError: To serve at least one request with the model's max seq len (131072), (16.0 GiB KV "
    "cache is needed, which is larger than the available KV cache memory (1.0 GiB).\n" + SERVER
)
SHAPE = CORE + "ValueError: The output_size 48 is not divisible by 32\n" + SERVER
CONFIG = (
    "pydantic_core._pydantic_core.ValidationError: 1 validation error for VllmConfig\n"
    "  Value error, Quantization method fp9 is not supported [type=value_error, input_value=()]\n"
    "    For further information visit https://errors.pydantic.dev/2.14/v/value_error\n"
)
KILLED = SERVER.replace("{}", "{'EngineCore': -9}")
TAKEN = "OSError: [Errno 98] Address already in use\n"
TYPO = "usage: serve_vllm.py [options]\nserve_vllm.py: error: unrecognized arguments: --max-modle-len 5\n"
NO_VLLM = "Traceback (most recent call last):\nModuleNotFoundError: No module named 'vllm'\n"
NO_GPU = CORE + "RuntimeError: No CUDA GPUs are available\n" + SERVER
SICK_GPUS = (
    "torch.AcceleratorError: CUDA error: unspecified launch failure",
    "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered",
    "torch.AcceleratorError: CUDA error: the launch timed out and was terminated",
    "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized",
    "RuntimeError: CUDA unknown error - this may be due to an incorrectly set up environment",
    "torch.AcceleratorError: CUDA error: no kernel image is available for execution on the device",
    "RuntimeError: NCCL error: unhandled system error (run with NCCL_DEBUG=INFO for details)",
    "pynvml.NVMLError_GpuIsLost: GPU is lost",
)


def core(words: str) -> str:
    return CORE + words + "\n" + SERVER


@pytest.mark.parametrize(
    ("log", "status", "kind", "cause"),
    [
        (GPU_BUSY, 1, EngineRoomError, "memory"),
        (NO_CACHE, 1, EngineRoomError, "memory"),
        (OOM, 1, EngineRoomError, "memory"),
        (LONG, 1, EngineRoomError, "memory"),
        (TAKEN, 1, EngineRoomError, "port"),
        (KILLED, 1, EngineRoomError, "killed"),
        ("loading\n", -9, EngineRoomError, "killed"),
        (NO_GPU, 1, EngineRoomError, "device"),
        (TYPO, 2, EngineSetupError, "settings"),
        (NO_VLLM, 1, EngineSetupError, "environment"),
        *((core(words), 1, EngineRoomError, "device") for words in SICK_GPUS),
        (core("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), 1, EngineRoomError, "memory"),
        (
            core("AssertionError: Error in memory profiling. Initial free memory …"),
            1,
            EngineRoomError,
            "memory",
        ),
        (core("RuntimeError: CUDA error: an illegal memory access …"), 1, EngineLoadError, "files"),
        (SHAPE, 1, EngineLoadError, "files"),
        (CONFIG, 1, EngineLoadError, "files"),
    ],
)
def test_the_cause_decides(log: str, status: int, kind: type[Exception], cause: str) -> None:
    found = diagnose(log, status)
    assert found.cause == cause
    error = found.error("engine int4 ended")
    assert type(error) is kind
    assert bool(found.fix) == (cause != "files")
    assert found.fix in str(error)


def test_an_old_error_above_is_no_cause_where_the_last_one_is_about_the_files() -> None:
    log = "WARNING: retrying: [Errno 98] Address already in use\n" + SHAPE
    assert diagnose(log, 1).cause == "files"
