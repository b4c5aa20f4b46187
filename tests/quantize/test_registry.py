"""Making a variant is all or nothing, and never done twice."""

import json
from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quantize import registry as module
from quantize.card import Calibration, CardError
from quantize.checkpoint import Checkpoint, open_checkpoint
from quantize.compress import CalibrationSet, QuantizeError, read_calibration
from quantize.registry import Registry
from quantize.schemes import RECIPES
from tests.quantize.test_checkpoint import CONFIG, write_safetensors

CALIBRATION = CalibrationSet(
    sequences=[[1, 2, 3]],
    description=Calibration(source="c.jsonl", sha256="0" * 64, samples=1, tokens=3),
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    (path / "tokenizer.json").write_text("{}", encoding="utf-8")
    write_safetensors(path / "model.safetensors", {"w": b"12345678"})
    return open_checkpoint(path)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "variants", "assistant", "bf16")


def pretend(monkeypatch: pytest.MonkeyPatch, fail: BaseException | None = None) -> list[Path]:
    """Replace llm-compressor by something that writes a file, and perhaps fails half-way."""
    made: list[Path] = []

    def compress(checkpoint, recipe, calibration, out: Path, log: Path) -> dict[str, int]:
        made.append(out)
        write_safetensors(out / "model.safetensors", {"w": b"1234"})
        if fail is not None:
            raise fail
        return {"layers.0.up": recipe.weight_bits}

    monkeypatch.setattr(module, "compress", compress)
    return made


def test_a_variant_is_made_once_and_made_again_when_its_inputs_change(
    monkeypatch: pytest.MonkeyPatch, registry: Registry, checkpoint: Checkpoint
) -> None:
    made = pretend(monkeypatch)
    card = registry.add(checkpoint, RECIPES["int4"], CALIBRATION)
    assert (card.weight_bytes, card.weight_bits, card.kv_bytes_per_token) == (4, 4, 2048)
    assert registry.card("int4") == card
    assert registry.add(checkpoint, RECIPES["int4"], CALIBRATION) == card
    assert len(made) == 1
    write_safetensors(checkpoint.path / "model.safetensors", {"w": b"87654321"})
    registry.add(checkpoint, RECIPES["int4"], CALIBRATION)
    assert len(made) == 2


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_an_interrupted_run_leaves_nothing_that_looks_finished(
    monkeypatch: pytest.MonkeyPatch, registry: Registry, checkpoint: Checkpoint, failure: BaseException
) -> None:
    pretend(monkeypatch, failure)
    with pytest.raises(type(failure)):
        registry.add(checkpoint, RECIPES["int4"], CALIBRATION)
    assert list(registry.directory.iterdir()) == []
    with pytest.raises(CardError):
        registry.card("int4")


def test_what_a_killed_run_left_is_removed_by_the_next(
    monkeypatch: pytest.MonkeyPatch, registry: Registry, checkpoint: Checkpoint
) -> None:
    killed = registry.directory / ".partial-int4-abc"
    killed.mkdir(parents=True)
    (killed / "model.safetensors").write_bytes(b"half")
    pretend(monkeypatch)
    registry.add(checkpoint, RECIPES["int4"], CALIBRATION)
    assert not killed.exists()


def test_the_reference_is_the_checkpoint_itself(registry: Registry, checkpoint: Checkpoint) -> None:
    card = registry.add_reference(checkpoint)
    assert (card.variant, card.weight_bits, card.weight_bytes) == ("bf16", 16, 8)
    assert registry.card("bf16") == card


def test_a_directory_of_another_model_is_refused(registry: Registry, checkpoint: Checkpoint) -> None:
    registry.add_reference(checkpoint)
    with pytest.raises(CardError, match="holds assistant:bf16, not other:bf16"):
        Registry(registry.directory, "other", "bf16").card("bf16")


MODEL = Path(module.__file__).parents[1] / "deploy/assistant/model"


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
    monkeypatch.setattr("quantize.compress.load_tokenizer", TemplateAlone)
    path = tmp_path / "calibration.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(QuantizeError, match=sentence):
        read_calibration(path, open_checkpoint(MODEL))
    with pytest.raises(QuantizeError, match="does not exist"):
        read_calibration(tmp_path / "none.jsonl", open_checkpoint(MODEL))
