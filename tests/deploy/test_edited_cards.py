"""A card that was edited by hand, or that cannot show that it was not, is never listed without a word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.cli import main
from deploy.commands import NOT_WELL
from quantize.card import CARD_NAME
from quantize.core.checkpoint import open_checkpoint
from quantize.registry import Registry
from tests.quantize.small import make_evaluation, write_base


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Of one model with its reference, which was measured."""
    model = write_base(tmp_path / "model")
    registry = Registry(tmp_path / "variants/m", "m", "bf16")
    card = registry.add_reference(open_checkpoint(model))
    registry.update(card.model_copy(update={"evaluation": make_evaluation(0.0)}))
    path = tmp_path / "tiercel.yaml"
    path.write_text(
        f"models: {{m: {{path: {model}, serve: [bf16]}}}}\nroles: {{core: {{}}}}\ndefault_role: core\n"
        f"engine: {{python: {tmp_path}/none}}\nvariants_dir: {tmp_path}/variants\n",
        encoding="utf-8",
    )
    return path


def edit(config: Path, **changes: object) -> Path:
    """Change fields of the card as somebody with an editor would; None removes one."""
    path = config.parent / "variants/m/bf16/current" / CARD_NAME
    fields = json.loads(path.read_text(encoding="utf-8")) | changes
    kept = {name: value for name, value in fields.items() if value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")
    return path


def listed(config: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, str, int]:
    """What ``variants list`` prints, what it says aside, and its exit status."""
    status = 0
    try:
        main(["variants", "list", "--config", str(config)])
    except SystemExit as ended:
        status = int(ended.code or 0)
    out, err = capsys.readouterr()
    return out, err, status


def test_a_card_as_it_was_written_is_listed(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err, status = listed(config, capsys)
    assert (status, err) == (0, "")
    assert "bf16" in out
    assert "seal" not in out


def test_an_edited_one_is_left_out_and_named(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = edit(config, weight_bytes=7)
    out, err, status = listed(config, capsys)
    assert status == NOT_WELL
    assert "no variants that can be read" in out
    assert f"{path.resolve()} was edited after it was written" in err
    assert "`tiercel quantize measure bf16` measures again" in err


def test_one_without_a_seal_says_so(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(config, seal=None, format=3, weight_bytes=7)
    out, _, status = listed(config, capsys)
    assert status == 0
    assert "bf16: its card has no seal" in out
