"""What does not fit is said with the least that helps, and what is said does help. Machines are made up."""

from dataclasses import replace

import pytest

from deploy.fleet.room import helping, side_by_side, too_large
from deploy.placement import GIB, Gpu, Machine, Need, PlacementError, arranged, taken_by


def gpus(*gib: float) -> Machine:
    found = tuple(Gpu(n, "made up", round(one * GIB), round(one * GIB)) for n, one in enumerate(gib))
    return Machine({0: tuple(range(16))}, 128 * GIB, found, "570")


H100 = gpus(79.2)
ONE_24 = gpus(22.0)
TWO_24 = gpus(22.0, 22.0)
CPU_16 = Machine({0: tuple(range(8))}, 14 * GIB)

EIGHT_B = 131_072
"""Bytes of the KV cache of a token of Llama 3.1 8B: 4 GiB hold 32,768, of which the engine keeps some."""
CONTEXT = 32_512


def engine(name: str, weights: float, kv: int = 4, **more: object) -> Need:
    given = {"heads": (32, 8), "token_bytes": EIGHT_B, "context": CONTEXT, **more}
    return Need(name, round(weights * GIB), kv * GIB, **given)  # type: ignore[arg-type]


BF16 = engine("8b:bf16", 15.0, needed=True)
FP8 = engine("8b:fp8", 8.5)
INT4 = engine("8b:int4", 5.3)


def refusal(machine: Machine, *needs: Need) -> str:
    with pytest.raises(PlacementError) as refused:
        side_by_side(machine, needs)
    return str(refused.value)


def test_what_fits_is_placed_and_nothing_is_said() -> None:
    assert [one.where for one in side_by_side(H100, [BF16, FP8, INT4])] == ["GPU 0"] * 3
    assert [one.where for one in side_by_side(TWO_24, [FP8, BF16])] == ["GPU 1", "GPU 0"]
    assert [
        one.where for one in side_by_side(CPU_16, [engine("s:bf16", 1.0, 1), engine("s:int8", 0.5, 1)])
    ] == [
        "3 cores",
        "3 cores",
    ]


def test_the_largest_are_placed_first() -> None:
    """In the order of the file the two small ones would fill both cards half."""
    small = [engine(f"8b:{n}", 4.0) for n in "ab"]
    assert arranged(TWO_24, [*small, BF16]) is not None


def test_two_engines_on_one_card_of_24_gb() -> None:
    text = refusal(ONE_24, BF16, FP8)
    assert text.startswith(
        "8b:bf16, 8b:fp8 do not fit on this machine side by side: they take 35.7 GiB, and 22.0 GiB on GPU 0 "
        "are free. What helps: "
    )
    assert "without 8b:fp8 (models.8b.serve, or served elsewhere: pools)" in text
    assert "13.7 GiB more free memory on every GPU" in text
    assert "kv_cache_gib" not in text  # the weights alone are too many
    assert "FP8" not in text


def test_a_shorter_context_that_is_named_is_one_that_fits() -> None:
    text = refusal(ONE_24, replace(FP8, name="8b:a"), INT4)
    assert (
        "a KV cache of 2 GiB instead of 4 (engine.kv_cache_gib: 2, engine.max_model_len: 16128), for "
        "contexts of 16,128 tokens instead of 32,512" in text
    )
    shorter = [replace(one, kv_bytes=2 * GIB) for one in (FP8, INT4)]
    assert arranged(ONE_24, shorter) is not None
    assert arranged(ONE_24, [replace(one, kv_bytes=3 * GIB) for one in (FP8, INT4)]) is None
    assert "an FP8 KV cache for 8b:a, 8b:int4 (variants made with --kv fp8), for the same contexts" in text


def test_a_cache_that_holds_more_than_one_context_is_lowered_without_shortening_it() -> None:
    wide = [replace(one, kv_bytes=8 * GIB, context=8192) for one in (FP8, INT4)]
    assert (
        "a KV cache of 2 GiB instead of 8 (engine.kv_cache_gib: 2), for the same contexts, fewer at a time"
        in (refusal(ONE_24, *wide))
    )


def test_a_context_too_short_to_be_of_use_is_not_offered() -> None:
    hungry = [replace(one, token_bytes=4 << 20, context=1024) for one in (FP8, INT4)]
    assert "max_model_len" not in refusal(ONE_24, *hungry)


def test_of_variants_to_leave_out_the_fewest_and_cheapest_are_named_and_never_the_reference() -> None:
    text = refusal(TWO_24, BF16, FP8, engine("8b:int8", 8.6), INT4, engine("tiny:bf16", 1.0, 1))
    assert "What helps: " in text
    assert "without 8b:fp8 and 8b:int4 (models.8b.serve, or served elsewhere: pools)" in text
    assert arranged(TWO_24, [BF16, engine("8b:int8", 8.6), engine("tiny:bf16", 1.0, 1)]) is not None
    only = replace(BF16, name="other:bf16", weight_bytes=16 * GIB)
    assert "without" not in refusal(ONE_24, BF16, only)


def test_the_memory_that_is_named_is_enough_and_little_less_is_not() -> None:
    for machine, needs in ((ONE_24, (BF16, FP8)), (TWO_24, (BF16, BF16, FP8)), (CPU_16, (BF16,))):
        (way,) = [one for one in helping(machine, needs) if "more free memory" in one]
        more = float(way.split(" GiB")[0])

        def with_more(gib: float, where: Machine = machine) -> Machine:
            larger = tuple(replace(gpu, free=gpu.free + round(gib * GIB)) for gpu in where.gpus)
            return replace(where, gpus=larger, memory_free=where.memory_free + round(gib * GIB))

        assert arranged(with_more(more), needs) is not None
        assert arranged(with_more(more - 0.2), needs) is None


def test_one_engine_that_fits_not_even_alone() -> None:
    large = engine("70b:bf16", 132.0, heads=(64, 8), needed=True)
    text = refusal(TWO_24, large, INT4)
    assert text.startswith("70b:bf16 needs 132.0 GiB for weights, 4.0 for the KV cache and 1.5 on every GPU")
    assert "more free memory on every GPU" in text
    assert set(too_large(TWO_24, [large, INT4])) == {"70b:bf16"}
    assert too_large(H100, [BF16, FP8, INT4]) == {}
    long = engine("8b:int8", 8.5, 16, context=131_072)
    assert "(engine.kv_cache_gib: 11, engine.max_model_len: 89856)" in too_large(ONE_24, [long])["8b:int8"]


def test_engines_of_a_cpu_share_cores_and_never_memory() -> None:
    two_cores = replace(CPU_16, nodes={0: (0, 1)})
    small = [engine(f"s:{n}", 0.5, 1) for n in range(4)]
    assert [one.where for one in side_by_side(two_cores, small)] == [
        "1 core",
        "1 core",
        *["1 core, shared"] * 2,
    ]
    assert sum(map(taken_by, small)) < CPU_16.memory_free < sum(map(taken_by, [*small, small[0]]))
    text = refusal(two_cores, *small, engine("s:4", 0.5, 1))
    assert text.startswith(
        "s:0, s:1, s:2, s:3, s:4 do not fit on this machine side by side: they take 15.1 GiB"
    )
    assert "14.0 GiB of memory are free" in text
    assert "1.2 GiB more free memory" in text


def test_a_gpu_that_tells_no_memory_is_not_guessed_at() -> None:
    part = Machine({0: (0, 1)}, 64 * GIB, (Gpu(0, "NVIDIA A100-SXM4-80GB", 0, 0),))
    text = refusal(part, INT4)
    assert text.startswith("8b:int4: nvidia-smi tells no memory of NVIDIA A100-SXM4-80GB")
    assert "engine.extra_args" in text
    own = replace(INT4, arguments=("--gpu-memory-utilization", "0.4"))
    assert side_by_side(part, [own])[0].where == "by engine.extra_args"
