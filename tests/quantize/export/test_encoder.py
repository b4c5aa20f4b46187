"""Encoders as ONNX: the same rows as torch, a quarter of the bytes, and classifiers trained on them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from quantize.core.checkpoint import open_checkpoint
from quantize.export import classifier as classifier_module
from quantize.export.classifier import embeddings, train_classifier
from quantize.export.encoder import (
    DYNAMIC,
    FLOAT,
    STATIC,
    Session,
    Tokens,
    export_encoder,
    in_batches,
    load_encoder,
    open_encoder,
    refuse_other_rows,
)
from quantize.export.encoder_variant import add_classifier
from quantize.export.labelled import labelled_rows
from quantize.export.types import ExportError
from quantize.registry import Registry
from tests.quantize.small_encoder import ROWS, TEXTS, make_encoder
from tests.quantize.tiny import change_config


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder") / "encoder")


@pytest.fixture(scope="module")
def classifier(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("classifier") / "classifier"
    trained = train_classifier(open_encoder(directory), ROWS, out)
    assert trained.seen == 1.0
    return out


def test_onnx_computes_what_torch_computes_and_8_bits_are_near_it(directory: Path, tmp_path: Path) -> None:
    encoder = open_encoder(directory)
    ids = [Tokens(encoder).whole(text) for text in TEXTS]
    expected = embeddings(load_encoder(encoder), ids).numpy()
    sizes = {}
    for kind, least in ((FLOAT, 0.99999), (DYNAMIC, 0.98), (STATIC, 0.9)):
        path = tmp_path / kind / "model.onnx"
        export_encoder(encoder, kind, path, TEXTS)
        rows = in_batches(Session(path, 1), ids)
        assert ((rows * expected).sum(-1) / np.linalg.norm(rows, axis=-1)).min() > least
        sizes[kind] = path.stat().st_size
    assert sizes[DYNAMIC] < sizes[FLOAT] / 2.5, "small models have more beside their matrices"
    assert [path.name for path in tmp_path.rglob("*") if path.name.startswith(".partial")] == []


def test_what_a_run_that_was_killed_left_goes_with_the_next(directory: Path, tmp_path: Path) -> None:
    (tmp_path / ".partial-model.onnx").mkdir()
    (tmp_path / ".partial-model.onnx/whole.onnx").write_bytes(b"half")
    export_encoder(open_encoder(directory), FLOAT, tmp_path / "model.onnx")
    assert [one.name for one in tmp_path.iterdir()] == ["model.onnx"]


def test_padding_changes_no_row(directory: Path, tmp_path: Path) -> None:
    encoder, path = open_encoder(directory), tmp_path / "model.onnx"
    export_encoder(encoder, FLOAT, path)
    session, ids = (
        Session(path, 1),
        [Tokens(encoder).whole(text) for text in ("hi", "a much longer text here")],
    )
    together, alone = session.run(ids), session.run(ids[:1])
    assert np.allclose(together[0], alone[0], atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "padding", "longest"), [("roberta", 1, 22), ("xlm-roberta", 0, 23), ("mpnet", 0, 22)]
)
def test_encoders_that_count_places_after_the_paddings_id_take_fewer_tokens(
    kind: str, padding: int, longest: int, directory: Path, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModel

    changed = shutil.copytree(directory, tmp_path / "encoder")
    sizes = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        kind, **sizes, intermediate_size=64, max_position_embeddings=24, pad_token_id=padding
    )
    AutoModel.from_config(config).save_pretrained(changed)
    encoder, path = open_encoder(changed), tmp_path / "model.onnx"
    model, ids = load_encoder(encoder), [Tokens(encoder).whole(text) for text in (" ".join(TEXTS), TEXTS[1])]
    assert encoder.longest == len(ids[0]) == longest
    export_encoder(encoder, FLOAT, path)
    assert np.allclose(in_batches(Session(path, 1), ids), embeddings(model, ids).numpy(), atol=1e-5)
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
        embeddings(model, [[*ids[0], ids[0][-2]]])


def test_a_classifier_says_the_labels_it_was_trained_on(classifier: Path, tmp_path: Path) -> None:
    encoder, path = open_encoder(classifier), tmp_path / "model.onnx"
    export_encoder(encoder, FLOAT, path)
    rows = in_batches(Session(path, 1), [Tokens(encoder).whole(text) for text, _ in ROWS])
    assert [encoder.labels[at] for at in rows.argmax(-1)] == [label for _, label in ROWS]


def test_a_classifier_is_a_model_of_the_fleet(classifier: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(classifier)
    registry = Registry(tmp_path / "variants", "intents", "fp32")
    whole = add_classifier(registry, checkpoint, "fp32", FLOAT)
    small = add_classifier(registry, checkpoint, DYNAMIC, DYNAMIC)
    assert (whole.target, small.target) == ("onnxruntime", "onnxruntime")
    assert (whole.weight_bits, small.weight_bits) == (32, 8)
    assert small.weight_bytes < whole.weight_bytes / 2.5
    assert small.reference == "fp32"
    assert add_classifier(registry, checkpoint, DYNAMIC, DYNAMIC).version == small.version
    with pytest.raises(ExportError, match="reference 'fp32'"):
        add_classifier(registry, checkpoint, "fp32", DYNAMIC)


def test_what_is_no_encoder_is_refused(directory: Path, tmp_path: Path) -> None:
    other = shutil.copytree(directory, tmp_path / "other")
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    with pytest.raises(ExportError, match="'llama' is no encoder"):
        open_encoder(other)
    with pytest.raises(ExportError, match=r"nothing has no config\.json"):
        open_encoder(tmp_path / "nothing")
    encoder = open_encoder(directory)
    with pytest.raises(ExportError, match="needs texts"):
        export_encoder(encoder, STATIC, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="not made here"):
        export_encoder(encoder, "int4", tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([("a", "x"), ("b", "x")], "have 1 labels"),
        ([("a", "x"), ("b", "x"), ("c", "y")], "'y' has 1 text"),
    ],
)
def test_too_little_to_learn_from_is_refused_before_work(
    rows: list[tuple[str, str]], said: str, directory: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=said):
        train_classifier(open_encoder(directory), rows, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_are_read_of_items_and_conversations_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    user = {"role": "user", "content": "hi"}
    lines = [
        {"text": "a", "label": "x"},
        {"messages": [user], "expected": "greeting", "check": "exact"},
        {"messages": [user, {"role": "assistant", "content": "greeting"}]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert labelled_rows(path) == [("a", "x"), ("hi", "greeting"), ("hi", "greeting")]
    parts = {**user, "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "there"}]}
    path.write_text(json.dumps({"messages": [parts], "expected": "x"}) + '\n{"text": "b", "label": 3}\n')
    assert labelled_rows(path) == [("hi\nthere", "x"), ("b", "3")]


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "a"}',
        '{"text": null, "label": "x"}',
        '{"text": "a", "label": null}',
        '{"text": "a", "label": " "}',
        '{"text": "a", "label": ["x"]}',
        '{"messages": [{"role": "user", "content": null}], "expected": "x"}',
    ],
)
def test_rows_without_a_text_or_a_label_are_refused(line: str, tmp_path: Path) -> None:
    """Null would be learnt as the word None."""
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(ExportError, match=r"rows.jsonl:1: has no text and label"):
        labelled_rows(path)


def test_nothing_is_said_of_texts_that_were_not_held_out(directory: Path, tmp_path: Path) -> None:
    assert train_classifier(open_encoder(directory), ROWS[:4] + ROWS[-4:], tmp_path / "few").held_out is None


def test_a_classifier_that_cannot_be_written_leaves_nothing(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / ".partial-out").mkdir()
    monkeypatch.setattr(classifier_module, "write_whole", full)
    with pytest.raises(OSError, match="No space left"):
        train_classifier(open_encoder(directory), ROWS, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_rows_that_are_no_means_are_not_exported_as_such(directory: Path, tmp_path: Path) -> None:
    other = shutil.copytree(directory, tmp_path / "encoder")
    refuse_other_rows(open_encoder(other))
    (other / "1_Pooling").mkdir()
    pooling = other / "1_Pooling/config.json"
    pooling.write_text('{"pooling_mode_mean_tokens": true}', encoding="utf-8")
    refuse_other_rows(open_encoder(other))
    pooling.write_text(
        '{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}', encoding="utf-8"
    )
    with pytest.raises(ExportError, match="no means of hidden states"):
        refuse_other_rows(open_encoder(other))
    change_config(other, architectures=["BertForSequenceClassification"])
    with pytest.raises(ExportError, match="head of a BertForSequenceClassification is not exported"):
        refuse_other_rows(open_encoder(other))
