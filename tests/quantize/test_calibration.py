"""Calibration data that cannot be used is refused with the line and the fix."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quantize.core.checkpoint import open_checkpoint
from quantize.make.calibration import CalibrationError, calibration_of, read_calibration

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


def written(path: Path, contents: list[str]) -> Path:
    lines = [json.dumps({"messages": [{"role": "user", "content": one}]}) for one in contents]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(("takes", "longest"), [(256, 255), (512, 511), (513, 512), (4096, 512)])
def test_what_the_model_does_not_take_is_cut(
    tmp_path: Path, takes: int, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine refuses a prompt of the whole length that it is given."""
    checkpoint = open_checkpoint(MODEL)
    checkpoint = replace(checkpoint, text_config={**checkpoint.text_config, "max_position_embeddings": takes})
    monkeypatch.setattr("quantize.make.calibration.load_tokenizer", TemplateAlone)
    path = written(tmp_path / "calibration.jsonl", ["word " * 1000] * 20)
    sequences = [
        *read_calibration(path, checkpoint).sequences,
        *calibration_of([[{"role": "user", "content": "word " * 1000}]] * 20, "here", checkpoint).sequences,
    ]
    assert {len(one) for one in sequences} == {longest}


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages[0].content[:1] }}", "no conversation has more than one token"),
        ("{{ messages[0].content if messages[0].content != 'word 3' }}", "makes conversation 4 empty"),
    ],
)
def test_a_template_that_leaves_nothing_is_refused(
    tmp_path: Path, template: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Leaves(TemplateAlone):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            self.template = ImmutableSandboxedEnvironment().from_string(template)

    monkeypatch.setattr("quantize.make.calibration.load_tokenizer", Leaves)
    path = written(tmp_path / "calibration.jsonl", [f"word {number}" for number in range(20)])
    with pytest.raises(CalibrationError, match=said):
        read_calibration(path, open_checkpoint(MODEL))
