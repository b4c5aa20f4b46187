"""Versions never change, the one in use is a link, and nothing that is half made is ever seen."""

import json
import multiprocessing
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from quantize import registry as module
from quantize.card import Calibration, CardError, read_card, refuse_broken
from quantize.core.checkpoint import Checkpoint, open_checkpoint
from quantize.core.modules import read_modules
from quantize.core.plan import Plan, uniform
from quantize.make.compress import CalibrationSet
from quantize.registry import Registry
from tests.quantize.small import CONFIG, make_evaluation, write_base

CALIBRATION = CalibrationSet(
    sequences=[[1, 2, 3]],
    description=Calibration(source="c.jsonl", sha256="0" * 64, samples=1, tokens=3),
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(write_base(tmp_path / "model"))


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "variants", "assistant", "bf16")


@pytest.fixture(autouse=True)
def fixed_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "versions", lambda: {"torch": "2"})


def plan(checkpoint: Checkpoint, scheme: str = "w4a16-g32", kv: str = "auto") -> Plan:
    return uniform(read_modules(checkpoint), scheme, kv=kv)


def writes(content: bytes, fail: BaseException | None = None) -> Callable[[Path], None]:
    """A stand-in for llm-compressor: writes one tensor and a tokenizer, and perhaps fails half-way."""

    def make(out: Path) -> None:
        header = json.dumps(
            {"w": {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]}}
        )
        raw = len(header).to_bytes(8, "little") + header.encode() + content
        (out / "model.safetensors").write_bytes(raw)
        (out / "tokenizer.json").write_text("{}", encoding="utf-8")
        if fail is not None:
            raise fail

    return make


def add(registry: Registry, checkpoint: Checkpoint, content: bytes = b"1234", scheme: str = "w4a16-g32"):
    return registry.add(checkpoint, "int4", plan(checkpoint, scheme), CALIBRATION, make=writes(content))


def test_a_card_says_what_was_planned_and_what_it_takes(registry: Registry, checkpoint: Checkpoint) -> None:
    reference = registry.add_reference(checkpoint)
    wanted = plan(checkpoint, kv="fp8")
    card = registry.add(
        checkpoint, "int4", wanted, CALIBRATION, make=writes(b"1234"), target="vllm-cpu", predicted_kl=0.01
    )
    assert card.schemes == dict(wanted.groups)
    assert (card.scheme, card.kv, card.weight_bits, card.weight_bytes) == ("w4a16-g32", "fp8", 4, 4)
    assert card.kv_bytes_per_token * 2 == reference.kv_bytes_per_token
    assert card.bits_per_weight == pytest.approx(wanted.bits_per_weight(read_modules(checkpoint)))
    assert (card.target, card.predicted_kl, card.origin, card.state) == ("vllm-cpu", 0.01, "made", "ready")
    assert (card.parent, card.base_sha256) == (reference.version, reference.base_sha256)
    assert registry.card("int4") == card
    assert registry.variants() == ("bf16", "int4")


def test_other_inputs_add_a_version_and_the_old_one_can_be_used_again(
    registry: Registry, checkpoint: Checkpoint
) -> None:
    first = add(registry, checkpoint, b"1234")
    second = add(registry, checkpoint, b"56789", scheme="w4a16")
    assert registry.versions("int4") == (first.version, second.version)
    assert registry.current("int4") == second.version
    assert os.readlink(registry.directory / "int4/current") == second.version  # moves with the directory
    pinned = registry.path("int4")
    registry.use("int4", first.version)
    assert registry.card("int4") == first
    assert read_card(pinned) == second  # who began with a version keeps it
    assert registry.path("int4", second.version) == pinned
    with pytest.raises(CardError, match=f"no version '0123'; known: {first.version}, {second.version}"):
        registry.use("int4", "0123")


def test_the_same_inputs_are_not_made_twice(registry: Registry, checkpoint: Checkpoint) -> None:
    first = add(registry, checkpoint)
    add(registry, checkpoint, b"56789", scheme="w4a16")
    assert add(registry, checkpoint, b"never written") == first
    assert registry.current("int4") == first.version


def test_equal_files_from_other_inputs_are_one_version(registry: Registry, checkpoint: Checkpoint) -> None:
    first = add(registry, checkpoint)
    second = add(registry, checkpoint, scheme="w4a16")
    assert registry.versions("int4") == (first.version,)
    assert registry.card("int4").inputs_sha256 == second.inputs_sha256 != first.inputs_sha256


def test_files_are_read_only_and_stored_once(registry: Registry, checkpoint: Checkpoint) -> None:
    before = stat.S_IMODE((checkpoint.path / "model.safetensors").stat().st_mode)
    registry.add_reference(checkpoint)
    linked = registry.path("bf16") / "model.safetensors"
    assert linked.samefile(checkpoint.path / "model.safetensors")
    assert stat.S_IMODE(linked.stat().st_mode) == before  # it is somebody else's file as well
    first, second = add(registry, checkpoint), add(registry, checkpoint, b"56789", scheme="w4a16")
    old, new = (registry.path("int4", card.version) for card in (first, second))
    assert stat.S_IMODE((old / "model.safetensors").stat().st_mode) == 0o444
    assert (old / "tokenizer.json").samefile(new / "tokenizer.json")
    assert not (old / "model.safetensors").samefile(new / "model.safetensors")


def test_a_damaged_file_is_neither_served_nor_linked(registry: Registry, checkpoint: Checkpoint) -> None:
    first = add(registry, checkpoint)
    tokenizer = registry.path("int4") / "tokenizer.json"
    tokenizer.chmod(0o644)
    tokenizer.write_text("{ }", encoding="utf-8")
    with pytest.raises(CardError, match=r"does not match card\.json"):
        registry.card("int4")
    second = add(registry, checkpoint, b"56789", scheme="w4a16")
    assert registry.card("int4") == second
    assert add(registry, checkpoint).version == first.version
    assert registry.card("int4").version == first.version


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_an_interrupted_run_leaves_nothing_that_looks_finished(
    registry: Registry, checkpoint: Checkpoint, failure: BaseException
) -> None:
    with pytest.raises(type(failure)):
        registry.add(checkpoint, "int4", plan(checkpoint), CALIBRATION, make=writes(b"12", failure))
    assert [path.name for path in registry.directory.iterdir()] == [".locks"]
    with pytest.raises(CardError, match="tiercel quantize"):
        registry.card("int4")


def test_what_a_killed_run_left_is_removed_by_the_next_of_that_variant_alone(
    registry: Registry, checkpoint: Checkpoint
) -> None:
    mine, other = registry.directory / ".partial-int4@abc", registry.directory / ".partial-int4-kv8@abc"
    for partial in (mine, other):
        partial.mkdir(parents=True)
        (partial / "model.safetensors").write_bytes(b"half")
    assert registry.variants() == ()
    add(registry, checkpoint)
    assert not mine.exists()
    assert other.exists()


def _make_slowly(directory: Path, base: Path, started: Path) -> None:
    module.versions = lambda: {"torch": "2"}  # type: ignore[assignment]
    checkpoint = open_checkpoint(base)

    def make(out: Path) -> None:
        with started.open("a", encoding="utf-8") as file:
            file.write("made\n")
        time.sleep(0.5)
        writes(b"1234")(out)

    Registry(directory, "assistant", "bf16").add(checkpoint, "int4", plan(checkpoint), CALIBRATION, make=make)


def test_two_processes_that_make_the_same_variant_make_it_once(
    registry: Registry, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    started = tmp_path / "started"
    arguments = (registry.directory, checkpoint.path, started)
    others = [context.Process(target=_make_slowly, args=arguments) for _ in range(2)]
    for other in others:
        other.start()
    for other in others:
        other.join(60)
    assert [other.exitcode for other in others] == [0, 0]
    assert started.read_text(encoding="utf-8") == "made\n"
    assert len(registry.versions("int4")) == 1
    assert registry.card("int4").weight_bytes == 4


def test_delete_says_what_it_freed_and_keeps_what_is_needed(
    registry: Registry, checkpoint: Checkpoint
) -> None:
    registry.add_reference(checkpoint)
    first, second = add(registry, checkpoint), add(registry, checkpoint, b"56789", scheme="w4a16")
    with pytest.raises(CardError, match="is in use; choose another version first"):
        registry.delete("int4", second.version)
    weights = (registry.path("int4", first.version) / "model.safetensors").stat().st_size
    card_json = (registry.path("int4", first.version) / "card.json").stat().st_size
    measured = registry.measurement_path(first, "f" * 64)
    measured.parent.mkdir()
    measured.write_bytes(b"answers")
    gone = registry.delete("int4", first.version)
    assert gone.versions == (first.version,)
    assert gone.bytes == weights + card_json + len(b"answers")  # the tokenizer is the other version's too
    assert not measured.exists()
    assert registry.versions("int4") == (second.version,)
    assert registry.card("int4") == second
    assert "freed" in str(registry.delete("int4"))
    with pytest.raises(CardError, match=r"there is no variant 'int4' .*known: bf16"):
        registry.delete("int4")


def test_the_reference_stays_while_others_were_compared_with_it(
    registry: Registry, checkpoint: Checkpoint
) -> None:
    registry.add_reference(checkpoint)
    card = add(registry, checkpoint)
    registry.update(card.model_copy(update={"evaluation": make_evaluation(0.01)}))
    with pytest.raises(CardError, match=f"int4 {card.version} was compared with it; delete int4 first"):
        registry.delete("bf16")
    registry.delete("int4")
    registry.delete("bf16")
    assert registry.variants() == ()
    assert (checkpoint.path / "model.safetensors").exists()


def test_a_broken_variant_says_why(registry: Registry, checkpoint: Checkpoint) -> None:
    card = add(registry, checkpoint)
    refuse_broken(card)
    broken = registry.mark_broken(card, "ValueError: group size 48 is not supported")
    assert registry.card("int4") == broken
    with pytest.raises(CardError, match=r"is broken: .*group size 48 is not supported.*take it out of serve"):
        refuse_broken(broken)


def test_older_layouts_and_bad_names_are_refused(registry: Registry, checkpoint: Checkpoint) -> None:
    flat = registry.directory / "int4"
    flat.mkdir(parents=True)
    (flat / "card.json").write_text("{}", encoding="utf-8")
    for work in (registry.variants, lambda: registry.card("int4"), lambda: add(registry, checkpoint)):
        with pytest.raises(CardError, match="older layout, without versions; remove it"):
            work()
    for name in ("../model", ".logs", "a/b", ""):
        with pytest.raises(CardError, match="cannot be used"):
            registry.path(name)


def test_a_directory_of_another_model_is_refused(registry: Registry, checkpoint: Checkpoint) -> None:
    registry.add_reference(checkpoint)
    with pytest.raises(CardError, match="holds assistant:bf16, not other:bf16"):
        Registry(registry.directory, "other", "bf16").card("bf16")


def test_the_reference_is_the_checkpoint_itself(registry: Registry, checkpoint: Checkpoint) -> None:
    card = registry.add_reference(checkpoint)
    assert (card.variant, card.weight_bits, card.method) == ("bf16", 16, "none")
    assert card.kv_bytes_per_token == 2 * 2 * CONFIG["num_hidden_layers"] * 2 * 16
    assert registry.card("bf16") == card


def test_an_edited_card_is_measured_again_from_nothing(registry: Registry, checkpoint: Checkpoint) -> None:
    """Figures and verdicts that somebody wrote into it are gone; what the files are stays."""
    registry.add_reference(checkpoint)
    card = registry.add(checkpoint, "int4", plan(checkpoint), CALIBRATION, make=writes(b"a"))
    card = registry.update(card.model_copy(update={"evaluation": make_evaluation(0.01), "doubts": ("why",)}))
    path = registry.path("int4") / "card.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"why"', '"fine"'), encoding="utf-8")
    with pytest.raises(CardError, match="was edited"):
        registry.card("int4")
    again = registry.to_measure("int4")
    assert again == registry.card("int4")
    assert (again.evaluation, again.doubts, again.files) == (None, (), card.files)
    assert registry.to_measure("int4") == again
    path.write_text("{", encoding="utf-8")
    with pytest.raises(CardError, match="make the variant again"):
        registry.to_measure("int4")


def test_an_edited_card_does_not_count_as_made(registry: Registry, checkpoint: Checkpoint) -> None:
    registry.add_reference(checkpoint)
    card = registry.add(checkpoint, "int4", plan(checkpoint), CALIBRATION, make=writes(b"a"))
    path = registry.path("int4") / "card.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"ready"', '"broken"'), encoding="utf-8")
    made = registry.add(checkpoint, "int4", plan(checkpoint), CALIBRATION, make=writes(b"a"))
    assert (made.version, registry.card("int4").state) == (card.version, "ready")


def test_what_is_there_is_not_to_be_made_again(registry: Registry, checkpoint: Checkpoint) -> None:
    """Room on the disk is asked for what is missing alone."""
    plans = {"int4": plan(checkpoint), "int8": plan(checkpoint, "w8a8")}
    assert not registry.has_reference(checkpoint)
    assert registry.missing(checkpoint, plans, CALIBRATION) == plans
    registry.add_reference(checkpoint)
    registry.add(checkpoint, "int4", plans["int4"], CALIBRATION, make=writes(b"a"))
    assert registry.has_reference(checkpoint)
    assert registry.missing(checkpoint, plans, CALIBRATION) == {"int8": plans["int8"]}
    assert registry.missing(checkpoint, plans, None) == plans
