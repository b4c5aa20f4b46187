"""`tiercel train qat` on a random model: what it makes, and what it refuses before work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from deploy.cli import main
from deploy.models import one_model, registry_of
from gateway.config import load_config
from quantize.card import Card
from quantize.core.dequantize import read_tensor
from quantize.core.tensors import read_parts
from quantize.registry import Registry
from tests.quantize.tiny import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "deploy/assistant/data"
QUICK = ["--steps", "4", "--block-steps", "2", "--batch", "4", "--rate", "0.2", "--no-evaluate"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "model", max_position_embeddings=512)
    lines = (DATA / "calibration.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "calibration.jsonl").write_text("".join(lines[:36]), encoding="utf-8")
    (tmp_path / "tiercel.yaml").write_text(
        f"""
models: {{small: {{path: model, serve: [bf16], calibration: calibration.jsonl}}}}
variants_dir: variants
roles: {{core: {{tasks: {DATA}/core.jsonl}}}}
default_role: core
""",
        encoding="utf-8",
    )
    return tmp_path


def run(place: Path, *arguments: str) -> None:
    main([*arguments, "--config", str(place / "tiercel.yaml")])


def registry(place: Path) -> Registry:
    return registry_of(one_model(load_config(place / "tiercel.yaml")))


def refused(place: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        run(place, "train", "qat", *arguments, *QUICK)
    assert ended.value.code == 2
    return capsys.readouterr().err


def integers(place: Path, card: Card) -> dict[str, torch.Tensor]:
    parts = read_parts(registry(place).path(card.variant, card.version))
    return {name: read_tensor(part) for name, part in parts.items() if name.endswith("weight_packed")}


def test_a_variant_is_trained_from_another_and_its_card_says_so(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(place, "quantize", "make", "--scheme", "w4a16-g32-asym", "--name", "four", "--no-evaluate")
    run(place, "train", "qat", "four", *QUICK)
    told = capsys.readouterr()
    assert "stored tensors are what was trained, bit for bit" in told.err
    begun, card = registry(place).card("four"), registry(place).card("four-qat")
    assert card.method == "smooth+imatrix+gptaq+qat"
    assert card.schemes == begun.schemes
    assert card.weight_bytes == begun.weight_bytes
    assert card.training is not None
    assert card.training.base == f"four@{begun.version}"
    assert card.training.tensors == 14 + 4, "matrices and norms"
    assert card.training.settings["steps"] == 4
    before, after = integers(place, begun), integers(place, card)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    run(place, "variants", "list")
    assert "four-qat" in capsys.readouterr().out
    run(place, "variants", "show", "four-qat")
    assert "smooth+imatrix+gptaq+qat" in capsys.readouterr().out
    run(place, "train", "qat", "four", *QUICK)
    assert registry(place).versions("four-qat") == (card.version,), "the same is not trained twice"
    assert not list((place / "variants/.training").glob("*/whole")), "checkpoints are not kept"


def test_a_mixture_is_trained_from_schemes(place: Path) -> None:
    more = ("--attention", "w8a8", "--name", "mixed")
    run(place, "train", "qat", "w4a16-g32-asym", *more, *QUICK)
    card = registry(place).card("mixed")
    assert {card.schemes[name] for name in card.schemes if "self_attn" in name} == {"w8a8"}
    assert {card.schemes[name] for name in card.schemes if "mlp" in name} == {"w4a16-g32-asym"}


def test_bits_that_no_engine_here_serves_are_trained_and_reported_and_become_no_variant(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(place, "train", "qat", "w2a16-g16-asym", "--method", "imatrix+gptq", *QUICK, "--json")
    told = capsys.readouterr()
    assert "simulated: " in told.err
    found = json.loads(told.out)
    assert found["items"]["core"]["before_kl"] > 0
    assert registry(place).variants() == ("bf16",)
    assert not list((place / "variants/.training").glob("w2*/*.safetensors"))
    run(place, "train", "qat", "w2a16-g16-asym", "--method", "imatrix+gptq", *QUICK, "--json")
    assert json.loads(capsys.readouterr().out) == found, "what was reported is not trained again"


def test_nothing_is_trained_on_what_judges(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    item = json.loads((DATA / "core.jsonl").read_text(encoding="utf-8").splitlines()[3])
    answered = [*item["messages"], {"role": "assistant", "content": item["expected"]}]
    (place / "more.jsonl").write_text(json.dumps({"messages": answered}) + "\n", encoding="utf-8")
    told = refused(place, capsys, "w4a16-g32-asym", "--data", str(place / "more.jsonl"))
    assert "more.jsonl:1: is an item that role core is judged by" in told


def test_data_without_answers_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = json.dumps({"messages": [{"role": "user", "content": "hello"}]})
    (place / "more.jsonl").write_text(line + "\n", encoding="utf-8")
    assert "there is no answer" in refused(
        place, capsys, "w4a16-g32-asym", "--data", str(place / "more.jsonl")
    )


@pytest.mark.parametrize(
    ("begin", "words"),
    [
        ("bf16", "is the reference"),
        ("nothing", "is no variant and no recipe"),
        ("nvfp4", "nvfp4 is not trained here"),
        ("fp8-block", "take fp8-dynamic"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    begin: str, words: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(place, capsys, begin)


def test_a_trained_variant_is_not_trained_on(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(place, "train", "qat", "w4a16-g32-asym", "--name", "once", *QUICK)
    assert "was trained already" in refused(place, capsys, "once")


def test_a_variant_of_another_tokenizer_or_checkpoint_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(place, "quantize", "make", "--scheme", "w4a16-g32", "--name", "four", "--no-evaluate")
    template = place / "model/chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8") + "{# another #}", encoding="utf-8")
    assert "another tokenizer or chat template" in refused(place, capsys, "four")
    shutil.rmtree(place / "model")
    make_checkpoint(place / "model", seed=1, max_position_embeddings=512)
    assert "was made from other weights" in refused(place, capsys, "four")


def test_a_checkpoint_that_is_quantized_already_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(place, "quantize", "make", "--scheme", "w4a16-g32", "--name", "four", "--no-evaluate")
    card = registry(place).card("four")
    text = (place / "tiercel.yaml").read_text(encoding="utf-8")
    made = registry(place).path("four", card.version)
    text = text.replace("path: model", f"path: {made}").replace(
        "variants_dir: variants", "variants_dir: other"
    )
    (place / "tiercel.yaml").write_text(text, encoding="utf-8")
    assert "quantized already" in refused(place, capsys, "w4a16-g32")


def test_the_method_is_not_one_that_making_takes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(place, "quantize", "make", "--scheme", "w4a16-g32", "--method", "gptq+qat", "--no-evaluate")
    assert ended.value.code == 2
    assert "`tiercel train qat` does that" in capsys.readouterr().err
