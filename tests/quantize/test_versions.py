"""Which version is used: never one that does not load in place of one that passed."""

from pathlib import Path

import pytest

import quantize.registry as module
from quantize.card import Card, CardError, Outcome, Verdict, read_card
from quantize.core.checkpoint import Checkpoint, open_checkpoint
from quantize.registry import Registry
from quantize.versions import stale, usable_version
from tests.quantize.small import make_evaluation, write_base
from tests.quantize.test_registry import add


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(write_base(tmp_path / "model"))


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def registry(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setattr(module, "versions", lambda: {"torch": "2"})
    return Registry(tmp_path / "variants", "assistant", "bf16", said.append)


def judged(registry: Registry, card: Card, *passed: str, failed: tuple[str, ...] = ()) -> Card:
    outcomes = dict.fromkeys(passed, Outcome.PASSED) | dict.fromkeys(failed, Outcome.FAILED)
    gate = {role: Verdict(outcome=outcome, reasons=("x",)) for role, outcome in outcomes.items()}
    return registry.update(card.model_copy(update={"gate": gate, "evaluation": make_evaluation(0.01)}))


def test_a_remake_is_used_when_it_has_passed_and_not_before(
    registry: Registry, checkpoint: Checkpoint, said: list[str]
) -> None:
    first = judged(registry, add(registry, checkpoint), "core", "helper")
    second = add(registry, checkpoint, b"56789", scheme="w4a16")
    assert registry.current("int4") == first.version
    assert f"{first.version}, which passed, stays in use until the new one has passed too" in said[-1]
    worse = judged(registry, second, "core", failed=("helper",))
    assert not registry.adopt(worse)
    assert registry.current("int4") == first.version
    assert f"it does not pass for helper, for which {first.version} passes" in said[-1]
    better = judged(registry, second, "core", "helper")
    assert registry.adopt(better)
    assert registry.current("int4") == second.version
    assert add(registry, checkpoint) == first  # known, and passed as well: chosen again
    assert registry.current("int4") == first.version


def test_one_that_never_passed_holds_no_place(registry: Registry, checkpoint: Checkpoint) -> None:
    judged(registry, add(registry, checkpoint), failed=("core",))
    second = add(registry, checkpoint, b"56789", scheme="w4a16")
    assert registry.current("int4") == second.version


def test_one_that_does_not_load_gives_its_place_back(
    registry: Registry, checkpoint: Checkpoint, said: list[str]
) -> None:
    first = judged(registry, add(registry, checkpoint), "core")
    second = add(registry, checkpoint, b"56789", scheme="w4a16")
    registry.use("int4", second.version)
    registry.mark_broken(second, "ValueError: 48")
    assert registry.current("int4") == first.version
    assert said[-1] == (
        f"int4: version {first.version}, which passed, is used instead of {second.version}: its engine "
        "could not load it (ValueError: 48)"
    )


def test_readers_pass_over_one_that_does_not_load(registry: Registry, checkpoint: Checkpoint) -> None:
    first = judged(registry, add(registry, checkpoint), "core")
    second = add(registry, checkpoint, b"56789", scheme="w4a16")
    registry.use("int4", second.version)
    registry.update(second.model_copy(update={"state": "broken", "engine_words": "no"}))
    place, sentence = usable_version(registry.directory, "int4")
    assert read_card(place) == first
    assert "is used instead" in sentence
    registry.update(first.model_copy(update={"gate": {}}))
    place, sentence = usable_version(registry.directory, "int4")
    assert (place.name, sentence) == (second.version, "")  # none passed: the one in use, which is refused
    (registry.path("int4", second.version) / "card.json").write_text("{", encoding="utf-8")
    with pytest.raises(CardError):
        read_card(usable_version(registry.directory, "int4")[0])


def test_only_files_that_are_read_here_are_served(registry: Registry, checkpoint: Checkpoint) -> None:
    for name in ("consolidated.safetensors", "params.json", "model.gguf", "pytorch_model.bin", "notes.txt"):
        (checkpoint.path / name).write_text("x", encoding="utf-8")
    card = registry.add_reference(checkpoint)
    assert sorted(card.files) == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]


def test_a_measurement_of_another_engine_is_stale(registry: Registry, checkpoint: Checkpoint) -> None:
    card = judged(registry, add(registry, checkpoint), "core")
    same = {"instructions": "avx512f", "machine": "x86_64"}
    assert not stale(card, same)
    assert stale(card, same | {"instructions": "amx_int8", "driver": "570.1"}) == (
        "instructions avx512f, now amx_int8",
        "driver unknown, now 570.1",
    )
    assert not stale(card.model_copy(update={"evaluation": None}), {"machine": "arm64"})
