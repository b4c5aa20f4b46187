"""A fleet plan is written into the file that it was made from, and what else is in the file stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.fleet.apply import apply
from gateway.config import ConfigError, load_config

FILE = """# ours
models:
  small:  # the little one
    path: small
    serve: [bf16, int8]  # for now
  large:
    path: large
    serve:
      - bf16
      # a thought
      - int4
    engine: {max_model_len: 2048}
variants_dir: variants
roles: {core: {}}  # one
default_role: core
watch: {reference: none}
"""


def written(directory: Path) -> Path:
    path = directory / "tiercel.yaml"
    path.write_text(FILE)
    return path


def test_lists_are_replaced_and_comments_stay(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert apply(path, ["small:int8", "large:int8", "large:int4"]) == {
        "small": ("int8",),
        "large": ("int8", "int4"),
    }
    text = path.read_text()
    assert "# ours" in text
    assert "serve: [int8]  # for now" in text
    assert "roles: {core: {}}  # one" in text
    assert load_config(path).served == ("small:int8", "large:int8", "large:int4")
    assert load_config(path).of("large").engine.max_model_len == 2048


def test_a_plan_that_the_file_does_not_allow_leaves_it_as_it_was(tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_text(FILE.replace("reference: none", "reference: live"))
    before = path.read_text()
    with pytest.raises(ConfigError, match=r"models.small.serve: must contain the reference"):
        apply(path, ["small:int8"])
    with pytest.raises(ConfigError, match=r"models.other is not there"):
        apply(path, ["other:int8"])
    assert path.read_text() == before
    assert not list(tmp_path.glob("*.partial"))
