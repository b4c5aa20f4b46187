"""A card is the contract between quantize and gateway: it must not lie about its files."""

import json
from pathlib import Path

import pytest

from quantize.card import Card, CardError, hash_files, read_card, verify_files, write_card


def make_variant(directory: Path) -> Card:
    (directory / "model.safetensors").write_bytes(b"weights")
    (directory / "config.json").write_text("{}", encoding="utf-8")
    card = Card(
        model="assistant",
        variant="int8",
        reference="bf16",
        scheme="w8a8",
        method="gptq",
        weight_bits=8,
        module_bits={"model.layers.0.mlp.up_proj": 8},
        weight_bytes=7,
        kv_bytes_per_token=2048,
        max_model_len=1024,
        versions={},
        created="2026-01-01T00:00:00+00:00",
        files=hash_files(directory),
    )
    write_card(card, directory)
    return card


def test_written_card_is_read_back_and_matches_its_files(tmp_path: Path) -> None:
    card = make_variant(tmp_path)
    assert read_card(tmp_path) == card
    verify_files(card, tmp_path)
    assert not list(tmp_path.glob("*.partial"))


def test_version_changes_with_the_files(tmp_path: Path) -> None:
    card = make_variant(tmp_path)
    (tmp_path / "config.json").write_text('{"a": 1}', encoding="utf-8")
    changed = card.model_copy(update={"files": hash_files(tmp_path)})
    assert changed.version != card.version


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda d: (d / "model.safetensors").write_bytes(b"other"), "does not match card.json"),
        (lambda d: (d / "config.json").unlink(), "config.json is listed in card.json but missing"),
        (lambda d: (d / "extra.bin").write_bytes(b"x"), "extra.bin is not listed"),
    ],
)
def test_card_that_does_not_match_its_files_is_refused(tmp_path: Path, spoil, sentence: str) -> None:
    card = make_variant(tmp_path)
    spoil(tmp_path)
    with pytest.raises(CardError, match=sentence):
        verify_files(card, tmp_path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "make the variant again"),
        ('{"model": "m"}', "Field required"),
        ('{"surprise": 1}', "make the variant again"),
    ],
)
def test_malformed_card_names_the_file_and_the_fix(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "card.json").write_text(text, encoding="utf-8")
    with pytest.raises(CardError, match=sentence):
        read_card(tmp_path)


def test_a_card_of_an_older_format_says_so(tmp_path: Path) -> None:
    make_variant(tmp_path)
    path = tmp_path / "card.json"
    older = path.read_text(encoding="utf-8").replace('"format": 5', '"format": 1')
    path.write_text(older, encoding="utf-8")
    with pytest.raises(CardError, match=r"format 1 is none of 2, 3, 4, .*make the variant again"):
        read_card(tmp_path)


def test_missing_card_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(CardError, match="tiercel quantize"):
        read_card(tmp_path / "int8")


@pytest.mark.parametrize("older", [2, 3])
def test_a_card_of_a_format_before_is_read(tmp_path: Path, older: int) -> None:
    card = make_variant(tmp_path)
    path = tmp_path / "card.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["seal"]  # which those had not
    path.write_text(json.dumps(content | {"format": older}), encoding="utf-8")
    assert read_card(tmp_path).version == card.version
    assert read_card(tmp_path).format == 5


def test_a_variant_has_a_name_among_those_of_other_models(tmp_path: Path) -> None:
    card = make_variant(tmp_path)
    assert card.id == f"{card.model}:{card.variant}"


EDITS: dict[str, object] = {
    "gate": {"core": {"outcome": "passed", "reasons": []}},
    "account": {"source": "log", "engine": "0.32", "quantization": "none"},
    "doubts": ["none"],
    "state": "broken",
    "weight_bytes": 6,
    "format": 3,
}


@pytest.mark.parametrize("field", EDITS)
def test_a_card_that_was_edited_names_the_file_and_the_fix(tmp_path: Path, field: str) -> None:
    """A gate is what was measured, not what somebody wrote into the card."""
    make_variant(tmp_path)
    path = tmp_path / "card.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | {field: EDITS[field]}), encoding="utf-8")
    with pytest.raises(CardError, match=r"card.json was edited .*`tiercel quantize measure int8`"):
        read_card(tmp_path)


def test_a_seal_that_was_taken_out_is_an_edit_and_another_order_of_fields_is_none(tmp_path: Path) -> None:
    card = make_variant(tmp_path)
    path = tmp_path / "card.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(dict(reversed(content.items()))), encoding="utf-8")
    assert read_card(tmp_path) == card
    del content["seal"]
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CardError, match="does not match its own seal"):
        read_card(tmp_path)
