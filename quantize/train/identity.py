"""What a run's result depends on, by name and as digests: so a checkpoint or an adapter is known again."""

from __future__ import annotations

import hashlib

from quantize.core.checkpoint import TOKENIZER_FILES, Checkpoint
from quantize.core.files import sha256_of

TEXT_FILES = (
    *TOKENIZER_FILES,
    "merges.txt",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
)


def tokenizer_sha256(checkpoint: Checkpoint) -> str:
    """Of the files that turn a conversation into tokens: the tokenizer's, and the chat template."""
    found = [
        f"{name} {sha256_of(checkpoint.path / name)}"
        for name in TEXT_FILES
        if (checkpoint.path / name).is_file()
    ]
    return hashlib.sha256("\n".join(found).encode()).hexdigest()
