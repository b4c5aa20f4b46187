"""A random encoder of a few thousand parameters, and texts for a classifier on it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

TEXTS = [f"{verb} the {noun} {when}" for verb in ("open", "close", "paint", "sell")
         for noun in ("door", "window", "gate") for when in ("now", "later", "soon")]  # fmt: skip
ROWS = [(text, text.split()[0]) for text in TEXTS]
"""Texts and their labels: the verb."""


def make_encoder(directory: Path, texts: Sequence[str] = TEXTS, width: int = 64) -> Path:
    """Write it, in transformers' form, with a tokenizer of the texts' whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)})
    vocabulary = {word: at for at, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=512 if len(vocabulary) <= 512 else max(1024, len(vocabulary)),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(directory)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}\n', encoding="utf-8"
    )
    return directory
