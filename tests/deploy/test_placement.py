"""Engines get cores, devices and memory; what does not fit side by side goes one after another."""

import asyncio
import dataclasses
import itertools
from pathlib import Path

import pytest

from deploy.machine import find_gpus
from deploy.placement import (
    GIB,
    GPU_OVERHEAD,
    Gpu,
    Machine,
    Need,
    Placed,
    PlacementError,
    Seats,
    place,
    share_options,
    visible,
)
from deploy.planning import LEAST_CACHE, bench_place
from gateway.config import load_config
from gateway.config.engine import Engine
from quantize.evaluate.bench import Bench

H100 = "0, NVIDIA H100 80GB HBM3, 81559, 81079, 570.124.06\n"
FOUR = "".join(f"{i}, NVIDIA H100 80GB HBM3, 81559, 81079, 570.124.06\n" for i in range(4))
L4_BUSY = "0, NVIDIA L4, 23034, 11800, 550.90.07\n1, NVIDIA L4, 23034, 22553, 550.90.07\n"
MIG = "0, NVIDIA A100-SXM4-80GB, [N/A], [N/A], 550.90.07\n"

ROOT = Path(__file__).resolve().parents[2]
SMALL = Need("bf16", 16 * GIB, 4 * GIB, (32, 8))
LARGE = Need("bf16", 132 * GIB, 4 * GIB, (64, 8))
TWO_CORES = Machine({0: (0, 1)}, 20 * GIB)
TWO_NODES = Machine({0: (0, 1, 2, 3), 1: (4, 5, 6, 7)}, 256 * GIB)


def gpus(listing: str) -> Machine:
    """A machine whose ``nvidia-smi`` prints ``listing``."""
    found, driver = find_gpus(("sh", "-c", 'printf %s "$0"', listing))
    return Machine({0: tuple(range(16))}, 128 * GIB, found, driver)


def test_the_listing_of_nvidia_smi_is_read() -> None:
    machine = gpus(L4_BUSY)
    assert [(gpu.index, gpu.name, gpu.free) for gpu in machine.gpus] == [
        (0, "NVIDIA L4", 11800 << 20),
        (1, "NVIDIA L4", 22553 << 20),
    ]
    assert machine.driver == "550.90.07"
    assert [gpu.total for gpu in gpus(MIG).gpus] == [0]
    assert not gpus("NVIDIA-SMI has failed because it couldn't communicate with the driver.\n").gpus
    assert find_gpus(("no-such-command",)) == ((), "")


def test_engines_share_a_gpu_by_bytes_and_not_by_a_share_of_it() -> None:
    machine, busy = gpus(H100), list[Placed]()
    while (placed := place(machine, SMALL, busy, 9)) is not None:
        busy.append(placed)
    assert len(busy) == 3  # 16.8 + 4 + 1.5 GiB each, of 79.2
    first = busy[0]
    assert first.env == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "0"}
    assert first.arguments == ("--gpu-memory-utilization", "0.05", "--kv-cache-memory-bytes", str(4 * GIB))
    assert first.memory == round(16 * GIB * 1.05) + 4 * GIB + GPU_OVERHEAD


def test_a_share_of_a_gpu_as_options_of_the_engine_in_python() -> None:
    placed = place(gpus(FOUR), LARGE, [], 1)
    assert placed is not None
    assert share_options(placed.arguments) == {
        "gpu_memory_utilization": 0.05,
        "kv_cache_memory_bytes": 2 * GIB,
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "mp",
    }
    with pytest.raises(PlacementError, match="--kv-cache-memory-bytes 4G: is no plain number"):
        share_options(["--kv-cache-memory-bytes", "4G"])
    users = ["--max-num-seqs", "8", "--gpu-memory-utilization=0.4", "-tp", "2"]
    assert share_options(users) == {
        "gpu_memory_utilization": 0.4,
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "mp",
    }


def test_planning_measures_in_what_the_model_needs_of_a_gpu(tmp_path: Path) -> None:
    """Left alone it would take 92 % of a card on which parts are made and scales are tuned as well."""
    python, model = tmp_path / "python", load_config(ROOT / "tiercel.yaml").of("assistant")
    model = dataclasses.replace(
        model, variants_dir=tmp_path, engine=model.engine.model_copy(update={"extra_args": []})
    )
    env, options = bench_place(model, gpus(L4_BUSY))
    assert env == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "1"}
    assert options == {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": LEAST_CACHE}
    env_of_place = env
    assert bench_place(model, TWO_CORES) == ({"VLLM_CPU_KVCACHE_SPACE": "1"}, {})
    own = model.engine.model_copy(update={"extra_args": ["--gpu-memory-utilization=0.4", "-cc", "{}"]})
    env, options = bench_place(dataclasses.replace(model, engine=own), gpus(L4_BUSY))
    assert (env, options) == ({}, {"gpu_memory_utilization": 0.4})
    one = Bench(python, tmp_path / "log", env={**env_of_place, "A": "b"}, site=tmp_path, options=options)
    other = Bench(python, tmp_path / "log", env={"A": "b"}, site=tmp_path)
    assert one.identity == other.identity


def test_the_emptier_gpu_is_taken_and_the_users_choice_of_devices_holds() -> None:
    machine, need = gpus(L4_BUSY), Need("int8", 8 * GIB, GIB)
    free = place(machine, need, [], 2)
    assert free is not None
    assert free.gpus == (1,)
    first = dataclasses.replace(need, env={"CUDA_VISIBLE_DEVICES": "0"})
    named = place(machine, first, [], 2)
    assert named is not None
    assert named.gpus == (0,)
    assert place(machine, first, [named], 2) is None
    own = place(machine, dataclasses.replace(need, arguments=("--gpu-memory-utilization=0.4",)), [], 2)
    assert own is not None
    assert not own.arguments
    assert not own.env


def test_gpus_are_chosen_by_index_or_uuid_as_cuda_chooses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (Gpu(index, "L4", GIB, GIB, f"GPU-{name}c0ffee") for index, name in enumerate("ab"))
    for named, chosen in {
        "1": (b,),
        "1,0": (b, a),
        "GPU-b": (b,),
        "GPU-a, 1": (a, b),
        "": (),
        "-1": (),
        "0,7,1": (a,),
        "GPU-zz": (),
        "MIG-4b5c": (a, b),
    }.items():
        assert visible((a, b), {"CUDA_VISIBLE_DEVICES": named}) == chosen, named
    assert visible((a, b), {}) == (a, b)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [gpu.index for gpu in gpus(L4_BUSY).gpus] == [1], (
        "what this process may not use it does not place on"
    )


def test_kv_heads_that_are_fewer_than_ranks_are_repeated_with_their_cache() -> None:
    wide = Need("bf16", 470 * GIB, 4 * GIB, (64, 4))
    eight = gpus("".join(f"{i}, NVIDIA H100 80GB HBM3, 81559, 81079, 570.124.06\n" for i in range(8)))
    placed = place(eight, wide, [], 1)
    assert placed is not None
    assert placed.arguments[-4:] == ("--kv-cache-memory-bytes", str(GIB), "--tensor-parallel-size", "8")


@pytest.mark.parametrize("per_token", [131_072, 114_688, 28_672, 2_048, 524_288])
def test_the_cache_holds_a_longest_prompt_and_what_the_engine_keeps(per_token: int) -> None:
    """vLLM takes one block away first, and gives a prompt whole blocks (of up to 128 tokens)."""
    asked = (Engine(), Engine(max_model_len=4096), Engine(max_model_len=65536), Engine(kv_cache_gib=2))
    for settings, longest in itertools.product(asked, (1024, 4096, 32_768, 131_072)):
        context, cache = settings.context(longest, per_token), settings.kv_bytes(longest, per_token)
        assert (-(-context // 128) + 1) * 128 * per_token <= cache, (settings, longest)
        assert cache % GIB == 0
        if settings.max_model_len is not None:
            assert context == min(longest, settings.max_model_len), "what was asked for is had"
        elif context < longest:
            assert context + 64 + 256 > (settings.kv_cache_gib or 4) * GIB // per_token, "no more is lost"


def test_what_fits_no_gpu_is_split_over_the_fewest_that_hold_it() -> None:
    placed = place(gpus(FOUR), LARGE, [], 2)
    assert placed is not None
    assert placed.gpus == (0, 1)
    assert placed.arguments[-4:] == ("--kv-cache-memory-bytes", str(2 * GIB), "--tensor-parallel-size", "2")
    beside = place(gpus(FOUR), LARGE, [placed], 2)
    assert beside is not None
    assert beside.gpus == (2, 3)
    odd = Need("bf16", 132 * GIB, 4 * GIB, (25, 5))  # 25 heads are divided by no power of two
    with pytest.raises(
        PlacementError, match=r"bf16 needs 132\.0 GiB for weights.*GPU 0 79\.2 of 79\.6 GiB free"
    ):
        place(gpus(FOUR), odd, [], 2)


def test_two_engines_on_two_cores_get_one_each() -> None:
    need = Need("bf16", GIB // 4, GIB)
    first = place(TWO_CORES, need, [], 2)
    assert first is not None
    second = place(TWO_CORES, need, [first], 2)
    assert second is not None
    assert first.env == second.env == {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    assert (first.cores, second.cores) == ((0,), (1,))
    alone = place(TWO_CORES, need, [], 1)
    assert alone is not None
    assert alone.env["OMP_NUM_THREADS"] == "1"  # the other core is for the engine's other processes


def test_engines_on_two_nodes_stay_on_their_own() -> None:
    need = Need("bf16", 16 * GIB, 4 * GIB)
    first = place(TWO_NODES, need, [], 2)
    assert first is not None
    second = place(TWO_NODES, need, [first], 2)
    assert second is not None
    assert first.env == {"OMP_NUM_THREADS": "3", "VLLM_CPU_OMP_THREADS_BIND": "0,1,2"}
    assert second.env["VLLM_CPU_OMP_THREADS_BIND"] == "4,5,6"


def test_threads_that_the_user_sets_are_kept_and_counted() -> None:
    need = Need("bf16", GIB // 4, GIB, env={"OMP_NUM_THREADS": "2"})
    first = place(TWO_CORES, need, [], 2)
    assert first is not None
    assert not first.env
    assert place(TWO_CORES, need, [first], 2) is None
    assert place(TWO_CORES, dataclasses.replace(need, env={"OMP_NUM_THREADS": "1"}), [first], 2) is not None


def test_engines_that_want_more_memory_than_there_is() -> None:
    need = Need("bf16", 12 * GIB, 2 * GIB)
    first = place(TWO_CORES, need, [], 2)
    assert first is not None
    assert place(TWO_CORES, need, [first], 2) is None
    with pytest.raises(PlacementError, match=r"needs about 34\.5 GiB of memory \(30\.0 for weights, 1\.5"):
        place(TWO_CORES, Need("bf16", 30 * GIB, 3 * GIB // 2), [], 2)


async def test_who_finds_no_room_waits_for_it() -> None:
    seats = Seats(TWO_CORES, 2)
    need, inside, most = Need("bf16", 12 * GIB, 2 * GIB), 0, 0

    async def engine() -> None:
        nonlocal inside, most
        async with seats.take(need) as placed:
            inside += 1
            most = max(most, inside)
            assert placed.memory > need.weight_bytes
            await asyncio.sleep(0.01)
            inside -= 1

    async with asyncio.timeout(30):
        await asyncio.gather(*(engine() for _ in range(4)))
    assert most == 1
