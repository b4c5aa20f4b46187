"""Calibration data that cannot be used is refused with the line and the fix."""

import json
from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quantize.core.checkpoint import open_checkpoint
from quantize.make.calibration import CalibrationError, read_calibration

MODEL = Path(__file__).parents[2] / "deploy/assistant/model"


class TemplateAlone:
    """The checkpoint's own chat template without transformers, whose import takes ten seconds."""

    def __init__(self, path: Path) -> None:
        def refuse(why: str) -> None:
            raise ValueError(why)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        self.template = environment.from_string((path / "chat_template.jinja").read_text(encoding="utf-8"))

    def apply_chat_template(self, messages: object, **_: object) -> dict[str, list[int]]:
        return {"input_ids": list(self.template.render(messages=messages).encode())}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has 0 conversations; calibration needs 16 or more"),
        ("{\n", ":1: not a conversation"),
        ('{"messages": [{"role": "wizard", "content": "x"}]}\n', "unknown role wizard"),
    ],
)
def test_bad_calibration_data(
    tmp_path: Path, text: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantize.make.calibration.load_tokenizer", TemplateAlone)
    path = tmp_path / "calibration.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CalibrationError, match=sentence):
        read_calibration(path, open_checkpoint(MODEL))
    with pytest.raises(CalibrationError, match="does not exist"):
        read_calibration(tmp_path / "none.jsonl", open_checkpoint(MODEL))


@pytest.mark.parametrize(("mark", "refused"), [("[INST] hello [/INST]", True), ("hello", False)])
def test_conversations_in_a_template_are_refused(
    tmp_path: Path, mark: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be calibrated with two templates around them; one that speaks of marks is no such file."""
    monkeypatch.setattr("quantize.make.calibration.load_tokenizer", TemplateAlone)
    texts = ["what is <|im_start|>?", *[mark] * 20]
    lines = [json.dumps({"messages": [{"role": "user", "content": text}]}) for text in texts]
    path = tmp_path / "calibration.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    if refused:
        with pytest.raises(CalibrationError, match=r"21 of 21 conversations hold a chat template's marks"):
            read_calibration(path, open_checkpoint(MODEL))
    else:
        assert read_calibration(path, open_checkpoint(MODEL)).description.samples == 21
