"""A version that is put to use while the stack runs: what is taken over, and what is not."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from deploy.following import Following
from quantize.card import Card, CardError, Outcome, Verdict, write_card
from quantize.core.files import point
from tests.deploy.test_supervisor import until

PASSED = {"core": Verdict(outcome=Outcome.PASSED, reasons=("x",))}


def version(place: Path, name: str, **more: Any) -> Path:
    """A version of int8 on disk, in use from now on."""
    card = Card(
        **{
            "model": "m", "variant": "int8", "reference": "bf16", "scheme": "w8a8", "method": "rtn",
            "weight_bits": 8, "module_bits": {}, "weight_bytes": 1, "kv_bytes_per_token": 1,
            "max_model_len": 64, "versions": {}, "created": name, "files": {"model.safetensors": name},
        }
        | more
    )  # fmt: skip
    directory = place / card.version
    directory.mkdir(parents=True, exist_ok=True)
    write_card(card, directory)
    point(place / "current", card.version)
    return directory


class Fixture:
    def __init__(self, place: Path) -> None:
        self.place = place
        self.first = version(place, "1", gate=PASSED)
        self.said: list[str] = []
        self.taken: list[Path] = []
        self.error: Exception | None = None
        self.goes_back = False
        self.following = Following({"m:int8": self.first}, self._take_over, self.said.append)

    async def _take_over(self, variant: str, directory: Path) -> None:
        assert variant == "m:int8"
        self.taken.append(directory)
        if self.error:
            raise self.error
        if self.goes_back:
            point(self.place / "current", self.first.name)

    async def look(self) -> None:
        await self.following.look("m:int8")


@pytest.fixture
def one(tmp_path: Path) -> Fixture:
    return Fixture(tmp_path / "int8")


async def test_a_proven_version_is_taken_over_once(one: Fixture) -> None:
    await one.look()
    assert one.taken == []
    second = version(one.place, "2", gate=PASSED)
    await one.look()
    await one.look()
    assert one.taken == [second]
    point(one.place / "current", one.first.name)  # and back again
    await one.look()
    assert one.taken == [second, one.first]
    assert one.said[0] == f"m:int8: {second.name} is in use now; its engine takes it over"


async def test_one_that_no_gate_has_passed_waits_for_its_gate(one: Fixture) -> None:
    second = version(one.place, "2")
    for _ in range(3):
        await one.look()
    assert one.taken == []
    assert one.said == [f"m:int8: {second.name} is in use now and not taken over, no gate has passed it"]
    version(one.place, "2", gate=PASSED)
    card = second / "card.json"
    os.utime(card, ns=(card.stat().st_atime_ns, card.stat().st_mtime_ns + 1))
    await one.look()
    assert one.taken == [second]


async def test_one_that_does_not_load_is_not_tried_again(one: Fixture) -> None:
    version(one.place, "2", gate=PASSED)
    one.goes_back = True  # as the stack does then
    for _ in range(3):
        await one.look()
    assert len(one.taken) == 1


async def test_a_defect_of_a_version_stops_nobody(one: Fixture) -> None:
    version(one.place, "2", gate=PASSED)
    one.error = CardError("model.safetensors does not match card.json")
    await one.look()
    assert "not taken over: model.safetensors does not match card.json" in one.said[-1]
    one.error = None
    third = version(one.place, "3", gate=PASSED)
    await one.look()
    assert one.taken[-1] == third
    broken = version(one.place, "4", gate=PASSED, state="broken", engine_words="ValueError: group size 48")
    await one.look()
    assert one.taken[-1] == third
    assert one.said[-1] == f"m:int8: {broken.name} is in use now and not taken over, broken: " + (
        "ValueError: group size 48"
    )
    (one.place / "current").unlink()  # between two links there may be none
    await one.look()


async def test_what_an_engine_was_given_otherwise_is_left_alone(tmp_path: Path) -> None:
    """The demo harms a copy: the link has not moved, so nothing is put right."""
    place = tmp_path / "int8"
    version(place, "1", gate=PASSED)
    taken: list[Path] = []

    async def take_over(_: str, directory: Path) -> None:
        taken.append(directory)

    following = Following({"m:int8": place / "current"}, take_over, lambda _: None)
    await following.look("m:int8")
    assert taken == []


async def test_what_one_variant_meets_with_does_not_end_following(
    one: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.following.LOOK_S", 0.01)
    one.error = RuntimeError("nvidia-smi does not answer")
    running = asyncio.create_task(one.following.run())
    second = version(one.place, "2", gate=PASSED)
    await until(lambda: one.taken == [second])
    await until(lambda: "nvidia-smi does not answer" in one.said[-1])
    one.error = None
    third = version(one.place, "3", gate=PASSED)
    await until(lambda: one.taken == [second, third])
    running.cancel()
