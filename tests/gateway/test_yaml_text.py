"""YAML is read whole, or refused: no key stands in another's place, no secret in an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config.load import load_config
from gateway.config.section import HIDDEN, ConfigError
from gateway.config.shown import with_secrets
from gateway.config.yaml_text import YamlError, read_yaml

TWICE = "roles:\n  core: { budget: { max_kl: 0.01 } }\n  other: {}\n  core: {}\n"


def test_a_role_that_is_named_twice_is_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "tiercel.yaml"
    path.write_text(TWICE, encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"tiercel.yaml is not valid YAML: line 4, column 3: the key 'core' is in line 2"
    ):
        load_config(path)


@pytest.mark.parametrize("text", ["{a: 1, 'a': 2}", "a: 1\nb: 2\na: 1", "[{a: {b: 1, b: 1}}]"])
def test_wherever_it_stands(text: str) -> None:
    with pytest.raises(YamlError, match="already"):
        read_yaml(text)


def test_what_is_merged_may_be_set_anew() -> None:
    text = "base: &base {a: 1, b: 2}\none:\n  <<: *base\n  b: 3\ntwo: {<<: *base, 1: x, '1': y}\n"
    assert read_yaml(text) == {
        "base": {"a": 1, "b": 2},
        "one": {"a": 1, "b": 3},
        "two": {"a": 1, "b": 2, 1: "x", "1": "y"},
    }


@pytest.mark.parametrize("text", ['password: "open-sesame', "{key: open-sesame", "a: open-sesame\x00"])
def test_an_error_shows_nothing_of_the_text(text: str) -> None:
    with pytest.raises(YamlError) as raised:
        read_yaml(text)
    assert "open-sesame" not in str(raised.value)


def test_what_was_shown_and_is_sent_back_keeps_its_error() -> None:
    """Secrets are put back into a copy that is written anew; of a key given twice it would hold the last."""
    text = f"a: '{HIDDEN}'\n{TWICE}"
    assert with_secrets(text, None) == text  # type: ignore[arg-type]  # nothing is looked up


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("roles: {core: {budget: {max_kl: yes}}}", r"roles\.core\.budget: max_kl: true is a yes or no"),
        ("gateway: {port: on}", "gateway: port: true is a yes or no"),
        ("roles: {core: {budget: {max_kl: 1:30}}}", r"max_kl: .* got '1:30'"),
        ("roles: {core: {budget: {max_kl: .inf}}}", r"max_kl: .*finite"),
        ("a: " + "9" * 5000, "Exceeds the limit"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_numbers_are_what_a_person_takes_them_for(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "tiercel.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        load_config(path)


def test_other_numbers_are_read_as_ever() -> None:
    text = "{a: 12e45, b: 1.5, c: 0x10, d: -7, e: 1_000, f: .5, g: 2.0e-3, h: 12:30:00, i: 010, j: -.inf, k: 1.0e-6}"
    assert read_yaml(text) == {
        **{"a": "12e45", "b": 1.5, "c": 16, "d": -7, "e": 1000, "f": 0.5, "g": 0.002, "h": "12:30:00"},
        **{"i": 8, "j": float("-inf"), "k": 1e-6},
    }
