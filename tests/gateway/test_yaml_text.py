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


@pytest.mark.parametrize(
    "text",
    [
        'password: "open-sesame',
        "{key: open-sesame",
        "a: open-sesame\x00",
        "a: *open-sesame",
        "a: !open-sesame x",
    ],
)
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


READ = {
    "12e45": "12e45",
    "1.5": 1.5,
    "0x10": 16,
    "-7": -7,
    "1_000": 1000,
    ".5": 0.5,
    "2.0e-3": 0.002,
    "12:30:00": "12:30:00",
    "010": 8,
    "-.inf": float("-inf"),
    "on": True,
}


@pytest.mark.parametrize(("text", "value"), READ.items())
def test_other_values_are_read_as_ever(text: str, value: object) -> None:
    assert read_yaml(f"a: {text}") == {"a": value}
