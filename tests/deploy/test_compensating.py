"""`tiercel train compensate` on a random model: the variant that carries the adapter, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.deploy.test_qat import place, registry, run

__all__ = ["place"]

QUICK = ["--rank", "8", "--no-evaluate"]


def refused(place: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        run(place, "train", "compensate", *arguments, "--no-evaluate")
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_a_variant_carries_what_makes_up_for_its_loss(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(place, "quantize", "make", "--scheme", "w4a16-g32-asym", "--name", "four", "--no-evaluate")
    run(place, "train", "compensate", "four", *QUICK)
    told = capsys.readouterr().err
    assert "four-r8: an adapter of rank 8, " in told
    before, card = registry(place).card("four"), registry(place).card("four-r8")
    assert card.adapter is not None
    assert (card.adapter.rank, card.adapter.carrier) == (8, f"small:four@{before.version}")
    assert card.weight_bytes == before.weight_bytes + card.adapter.bytes
    assert (card.schemes, card.method, card.model) == (before.schemes, before.method, "small")
    assert card.parent == before.parent
    run(place, "train", "compensate", "four", *QUICK)
    assert registry(place).versions("four-r8") == (card.version,), "the same is taken in once"
    assert "carries an adapter already; name small:four@" in refused(place, capsys, "four-r8", "--rank", "8")


def test_bits_that_no_engine_here_serves_are_reported_and_become_no_variant(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(place, "train", "compensate", "w2a16-g32-asym", "--method", "imatrix", *QUICK, "--json")
    told = capsys.readouterr()
    assert "simulated: " in told.err
    found = json.loads(told.out)
    assert 0 < found["simulated"]["after"]["kl"] < found["simulated"]["before"]["kl"]
    assert all(row["after"] < row["before"] for row in found["matrices"])
    assert registry(place).variants() == ("bf16",)
    assert not list((place / "variants/.compensation").glob(".simulated*"))


def test_what_gets_no_adapter_is_said_in_a_sentence(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the whole matrix; take less" in refused(place, capsys, "w4a16-g32-asym", "--rank", "64")
    assert "is the reference, which is not quantized" in refused(place, capsys, "bf16", "--rank", "4")
    named = refused(place, capsys, "w4a16-g32-asym", "--rank", "4", "--name", "bf16")
    assert "--name bf16: is the reference's name" in named
    assert "no variant and no recipe" in refused(place, capsys, "nothing", "--rank", "4")
