"""Encoders as ONNX, in 32 bits and in 8: what onnxruntime computes of a BERT-like checkpoint.

Text goes in as token ids with a mask, and one row comes out: the mean of the last hidden states, of length 1,
or with a classifier's head one logit per label.

============== =======================================================================================
``fp32``       as trained
``int8-dynamic`` weights of matrices and embeddings in 8 bits, inputs scaled as they come
``int8-static``  the same, with scales of inputs from calibration, but for those of narrowing matrices
============== =======================================================================================
"""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.core.companions import read_object
from quantize.core.files import writing
from quantize.export.types import ExportError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FLOAT, DYNAMIC, STATIC = "fp32", "int8-dynamic", "int8-static"
ENCODER_TYPES = (FLOAT, DYNAMIC, STATIC)
MODEL_FILE = "model.onnx"
HEAD = ("classifier.weight", "classifier.bias")
"""Tensors of a head on the mean of the hidden states, beside the encoder's own."""
QUANTIZED = ["MatMul", "Gather"]
LONGEST = 512
LONGEST_PIECE = 64
"""Characters of a token, and of the space around it."""
BATCH = 32
CALIBRATED = 128
"""Texts that scales of inputs are taken from."""
OFFSET = ("roberta", "xlm-roberta", "mpnet")
"""Encoders that count places from the one after the padding's id."""
PADDING = 1
"""The padding's id in those, where their configuration names none; in MPNet always."""
KNOWN = ("bert", "roberta", "xlm-roberta", "distilbert", "mpnet", "electra")


@dataclass(frozen=True)
class Encoder:
    """A checkpoint directory of an encoder; with ``labels`` it has a classifier's head."""

    path: Path
    config: Mapping[str, Any]
    labels: tuple[str, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        places = int(self.config.get("max_position_embeddings") or LONGEST)
        if (kind := self.config.get("model_type")) in OFFSET:
            padding = None if kind == "mpnet" else self.config.get("pad_token_id")
            places -= 1 + (PADDING if padding is None else int(padding))
        return min(LONGEST, places)


def is_encoder(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint of that configuration reads and does not write."""
    return config.get("model_type") in KNOWN


def open_encoder(path: Path) -> Encoder:
    """Raises ExportError for what is no encoder that is known here."""
    config = read_object(path / "config.json")
    if not config:
        raise ExportError(f"{path} has no config.json; give the directory of an encoder's checkpoint")
    if not is_encoder(config):
        kind = config.get("model_type")
        raise ExportError(
            f"{path}: model_type {kind!r} is no encoder that is exported here; known: {', '.join(KNOWN)}"
        )
    if not (path / "tokenizer.json").is_file():
        raise ExportError(f"{path} has no tokenizer.json; save the encoder's tokenizer beside it")
    if not any((path / name).is_file() for name in ("model.safetensors", MODEL_FILE)):
        raise ExportError(f"{path} has no model.safetensors; save the encoder in that format")
    named = config.get("id2label") if config.get("classifier_on") == "mean" else None
    labels = tuple(named[str(number)] for number in range(len(named))) if named else ()
    return Encoder(path, config, labels)


def open_encoder_variant(path: Path) -> Encoder:
    """An exported classifier, with an ONNX file in place of tensors. Raises ExportError."""
    encoder = open_encoder(path)
    if not (path / MODEL_FILE).is_file() or not encoder.labels:
        raise ExportError(f"{path} holds no exported classifier; make one with `tiercel export encoder`")
    return encoder


class Tokens:
    """An encoder's tokenizer, by ``tokenizers`` alone."""

    def __init__(self, encoder: Encoder) -> None:
        from tokenizers import Tokenizer

        self._tokenizer: Any = Tokenizer.from_file(str(encoder.path / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._longest = encoder.longest

    def plain(self, text: str) -> list[int]:
        """Ids without the special tokens around them."""
        return list(self._tokenizer.encode(self._beginning(text), add_special_tokens=False).ids)

    def whole(self, text: str) -> list[int]:
        """Ids as the encoder reads them, cut to the longest that it takes."""
        return self._cut(list(self._tokenizer.encode(self._beginning(text)).ids))

    def around(self, ids: Sequence[int]) -> list[int]:
        """Ids of a text (:meth:`plain`) with the special tokens around them, cut in the same way."""
        none = self._tokenizer.encode("").ids
        return self._cut([*none[:-1], *ids, *none[-1:]])

    def _cut(self, ids: list[int]) -> list[int]:
        return ids if len(ids) <= self._longest else [*ids[: self._longest - 1], ids[-1]]

    def _beginning(self, text: str) -> str:
        """What of a text may be read at all: the rest is not even made tokens."""
        return text[: LONGEST_PIECE * self._longest]


class Session:
    """An ONNX file in onnxruntime."""

    def __init__(self, path: Path, threads: int = 0) -> None:
        """``threads``: 0 for all. Raises ExportError where onnxruntime does not load it."""
        try:
            import onnxruntime
        except ImportError:
            raise ExportError(
                "onnxruntime is not installed; install it: pip install 'tiercel[edge]'"
            ) from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime has a type of its own for each reason
            raise ExportError(f"{path}: onnxruntime does not load it: {error}") from None

    def run(self, ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """One row per text."""
        found: NDArray[np.float32] = self._session.run(None, padded(ids))[0]
        return found


def padded(ids: Sequence[Sequence[int]]) -> dict[str, NDArray[np.int64]]:
    """What an exported encoder takes: ids (n, longest) and the mask of those that are none of the padding."""
    import numpy as np

    longest = max(map(len, ids))
    made = np.zeros((len(ids), longest), np.int64)
    mask = np.zeros((len(ids), longest), np.int64)
    for row, one in enumerate(ids):
        made[row, : len(one)], mask[row, : len(one)] = one, 1
    return {"input_ids": made, "attention_mask": mask}


def in_batches(session: Session, ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
    """Rows of all texts, those of like length together."""
    import numpy as np

    order = sorted(range(len(ids)), key=lambda at: len(ids[at]))
    parts = [session.run([ids[at] for at in order[n : n + BATCH]]) for n in range(0, len(order), BATCH)]
    rows = np.concatenate(parts)
    return rows[np.argsort(order)]


def export_encoder(encoder: Encoder, kind: str, path: Path, texts: Sequence[str] = ()) -> None:
    """Write ``encoder`` to ``path`` as ONNX. ``texts`` give ``int8-static`` its scales of inputs.

    A reader sees the whole file or none. Raises ExportError.
    """
    if kind not in ENCODER_TYPES:
        raise ExportError(f"--type: {kind!r} is not made here; known: {', '.join(ENCODER_TYPES)}")
    if kind == STATIC and not texts:
        raise ExportError(f"{STATIC} needs texts to take scales from; give --calibration")
    path.parent.mkdir(parents=True, exist_ok=True)
    size = (encoder.path / "model.safetensors").stat().st_size
    with _beside(path) as beside:
        whole, made = beside / "whole.onnx", beside / "made.onnx"
        with writing(whole, size), _quiet():
            _write_float(encoder, whole)
            if kind == DYNAMIC:
                _dynamic(whole, made)
            elif kind == STATIC:
                _static(encoder, whole, made, texts)
        (whole if kind == FLOAT else made).replace(path)


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A directory for what lies between. What a run that was killed left there goes when the next begins."""
    directory = path.with_name(f".partial-{path.name}")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def refuse_other_rows(encoder: Encoder) -> None:
    """Raise ExportError for an encoder whose rows are not the mean of its hidden states."""
    named = str((encoder.config.get("architectures") or [""])[0])
    if "Classification" in named and not encoder.labels:
        raise ExportError(
            f"{encoder.path}: the head of a {named} is not exported; train a classifier on the encoder with "
            "`tiercel export classifier`"
        )
    pooling = read_object(encoder.path / "1_Pooling" / "config.json")
    if pooling and not pooling.get("pooling_mode_mean_tokens", pooling.get("pooling_mode") == "mean"):
        raise ExportError(
            f"{encoder.path}/1_Pooling/config.json: its rows are no means of hidden states, and no others "
            "are exported"
        )


def load_encoder(encoder: Encoder) -> Any:
    """The encoder in torch, without its head. Raises ExportError where tensors are missing."""
    from transformers import AutoModel

    from quantize.core.model_config import quiet_transformers

    with quiet_transformers():
        model, report = AutoModel.from_pretrained(
            encoder.path, local_files_only=True, output_loading_info=True
        )
    lost = [name for name in report["missing_keys"] if "pooler" not in name]
    if lost:
        raise ExportError(f"{encoder.path}: {lost[0]} is missing; download the encoder again")
    return model.float().eval()


def mean_of(hidden: Any, mask: Any) -> Any:
    """The mean of hidden states (n, length, width) over real tokens, of length 1: (n, width)."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * weights).sum(1) / weights.sum(1)
    return mean / mean.norm(dim=-1, keepdim=True)


def _write_float(encoder: Encoder, path: Path) -> None:
    import torch

    model, head = load_encoder(encoder), head_of(encoder)

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            mean = mean_of(hidden, attention_mask)
            return mean if head is None else mean @ head[0].T + head[1]

    model.config._attn_implementation = "eager"
    axes = {0: "texts", 1: "tokens"}
    example = torch.ones((2, 8), dtype=torch.int64)
    torch.onnx.export(
        Whole().eval(),
        (example, example),
        str(path),
        dynamo=False,
        input_names=["input_ids", "attention_mask"],
        output_names=["rows"],
        dynamic_axes={"input_ids": axes, "attention_mask": axes, "rows": {0: "texts"}},
        opset_version=17,
    )


def head_of(encoder: Encoder) -> tuple[Any, Any] | None:
    """A classifier's weight (labels, width) and bias (labels,); None of an encoder without one."""
    if not encoder.labels:
        return None
    from safetensors import safe_open

    with safe_open(encoder.path / "model.safetensors", "pt") as file:
        if not set(HEAD) <= set(file.keys()):
            raise ExportError(f"{encoder.path}: {HEAD[0]} is missing; train the classifier again")
        return file.get_tensor(HEAD[0]).float(), file.get_tensor(HEAD[1]).float()


def _dynamic(whole: Path, made: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        whole, made, per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=QUANTIZED
    )


def _static(encoder: Encoder, whole: Path, made: Path, texts: Sequence[str]) -> None:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    tokens = Tokens(encoder)
    given = [tokens.whole(text) for text in texts[:CALIBRATED]]

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left: Iterator[dict[str, Any]] = iter([padded([one]) for one in given])

        def get_next(self) -> dict[str, Any] | None:
            return next(self._left, None)

    narrowing, fixed = _narrowing(whole), whole.with_name("fixed.onnx")
    quantize_static(
        whole,
        fixed,
        Reader(),
        nodes_to_exclude=narrowing,
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
        op_types_to_quantize=QUANTIZED,
    )
    quantize_dynamic(
        fixed,
        made,
        per_channel=True,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul"],
        nodes_to_quantize=narrowing,
    )


def _narrowing(whole: Path) -> list[str]:
    """Names of the products whose matrices make rows narrower: the second one of every layer's MLP. What goes
    into it has a few values far out, which one scale for all texts does not fit (docs/edge.md)."""
    import onnx

    graph = onnx.load(whole).graph
    shapes = {one.name: one.dims for one in graph.initializer}
    return [
        node.name
        for node in graph.node
        if node.op_type == "MatMul" and len(dims := shapes.get(node.input[1], ())) == 2 and dims[0] > dims[1]
    ]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say of themselves: that they are old, and what shapes they do not know."""
    import logging

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
