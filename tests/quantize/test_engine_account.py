"""An engine's account against the card: what is served has to be what the card says."""

from typing import Any

import pytest

from quantize.account import account_of_log, account_of_workers, differences, suspicion
from quantize.card import Card

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj")


def card(bits: int = 4, kv: str = "auto", variant: str = "int4") -> Card:
    names = [f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in LINEAR]
    return Card(
        model="m",
        variant=variant,
        reference="bf16",
        scheme="w4a16-g64",
        method="rtn",
        kv=kv,
        weight_bits=bits,
        module_bits=dict.fromkeys(names, bits) if variant != "bf16" else {},
        weight_bytes=100,
        kv_bytes_per_token=8,
        max_model_len=64,
        versions={},
        created="2026-11-26",
        files={},
    )


def module(bits: int, size: int = 100) -> dict[str, Any]:
    quantized = bits < 16
    return {
        "method": "CompressedTensorsLinearMethod" if quantized else "UnquantizedLinearMethod",
        "scheme": "CompressedTensorsWNA16" if quantized else "",
        "kernel": "CPUWNA16LinearKernel" if quantized else "",
        "parameters": {"weight_packed": ["int32", size]} if quantized else {"weight": ["bfloat16", 0]},
        "bits": bits,
        "in_kernel": 0 if quantized else 4 * size,
    }


def answer(bits: int = 4, kv: str = "bfloat16", prefix: str = "", ranks: int = 1) -> dict[str, Any]:
    modules = {
        f"{prefix}model.layers.{layer}.self_attn.{name}": module(bits)
        for layer in (0, 1)
        for name in ("qkv_proj", "o_proj")
    }
    rank = {
        "quantization": "compressed-tensors" if bits < 16 else None,
        "kv_dtypes": [kv],
        "modules": modules,
        "weight_bytes": 1000,
        "device_bytes": None,
    }
    return {"version": "0.32.0", "torch": "2.13.0", "ranks": [rank] * ranks}


def differ(of: Card, told: dict[str, Any]) -> list[str]:
    return differences(of, account_of_workers(told), told)


def test_what_is_served_is_told_in_few_words() -> None:
    account = account_of_workers(answer(ranks=2))
    assert list(account.kernels) == ["CompressedTensorsWNA16/CPUWNA16LinearKernel"]
    kernel = account.kernels["CompressedTensorsWNA16/CPUWNA16LinearKernel"]
    assert (kernel.count, kernel.bits, kernel.bytes) == (4, 4, 800)  # modules once, bytes of both ranks
    assert (account.weight_bytes, account.ranks, account.kv_dtype) == (2000, 2, "bfloat16")
    whole = account_of_workers(answer(16)).kernels["UnquantizedLinearMethod"]
    assert whole.bytes == 4 * 400  # taken over by the kernel, so that the parameter is empty


def test_a_variant_as_its_card_says() -> None:
    assert not differ(card(), answer())
    assert not differ(card(), answer(prefix="language_model."))
    assert not differ(card(16, variant="bf16"), answer(16))
    assert not differ(card(kv="fp8"), answer(kv="fp8_e4m3"))


def test_a_variant_that_is_served_whole() -> None:
    told = answer(16)
    found = differ(card(), told)
    assert found[0] == "the engine found no quantization config, the card says w4a16-g64 by rtn"
    assert found[1] == (
        "layer 0 self_attn.qkv_proj is served with 16 bits (UnquantizedLinearMethod), the card says 4"
    )
    assert found[-1] == "and 1 more modules"


def test_one_module_that_is_skipped() -> None:
    told = answer()
    told["ranks"][0]["modules"]["model.layers.1.self_attn.o_proj"] = module(16)
    (line,) = differ(card(), told)
    assert line.startswith("layer 1 self_attn.o_proj is served with 16 bits")
    del told["ranks"][0]["modules"]["model.layers.1.self_attn.o_proj"]
    assert differ(card(), told) == ["the engine has no layer 1 self_attn.o_proj"]


def test_a_reference_that_is_not_whole_and_another_kv_cache() -> None:
    assert differ(card(16, variant="bf16"), answer(4))[0].startswith(
        "the engine loaded it as compressed-tensors"
    )
    assert differ(card(), answer(kv="fp8")) == ["the KV cache is fp8, the card says 16 bits"]
    assert differ(card(kv="fp8"), answer()) == ["the KV cache is bfloat16, the card says fp8"]


LOG = (
    "(EngineCore pid=7) INFO 11-26 06:40:11 [core.py:93] Initializing a V1 LLM engine (v0.32.0) with "
    "config: model='/v/int4', dtype=torch.bfloat16, quantization={}, kv_cache_dtype=fp8, seed=0\n"
    "(EngineCore pid=7) INFO 11-26 06:40:12 [compressed_tensors_wNa16.py:138] Using MacheteLinearKernel for "
    "CompressedTensorsWNA16\n"
)


def test_a_stock_server_tells_by_its_log() -> None:
    account = account_of_log(LOG.format("compressed-tensors"))
    assert account is not None
    assert (account.source, account.engine, account.kv_dtype) == ("log", "0.32.0", "fp8")
    assert list(account.kernels) == ["CompressedTensorsWNA16/MacheteLinearKernel"]
    assert not differences(card(kv="fp8"), account)
    whole = account_of_log(LOG.format("None"))
    assert whole is not None
    assert differences(card(kv="fp8"), whole) == [
        "the engine found no quantization config, the card says w4a16-g64 by rtn"
    ]
    assert account_of_log("INFO: started\n") is None


@pytest.mark.parametrize("known", [True, False])
def test_equal_bits_are_said_to_be_suspicious(known: bool) -> None:
    text = suspicion(card(), account_of_workers(answer()) if known else None)
    assert "equal the reference's in every bit" in text
    assert ("CPUWNA16LinearKernel" in text) == known
