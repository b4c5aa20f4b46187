"""Harms a copy of a variant on purpose, so that the watch can be seen at work.

What happens to real fleets: weights that lost bits on their way, scales of a KV cache that belong to another
checkpoint, a chat template that is not the model's.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

KEPT_BITS = 0xCCCCCCCC
"""Of the eight four-bit weights in a word: the upper two bits of each."""
MIDDLE = 0x22222222
"""The middle of what the two lower bits could be."""
CLIPPED = 256.0
"""What scales of the KV cache are divided by: keys and values are cut off at that share of their range."""


def two_bits(directory: Path, part: str = "") -> None:
    """Packed four-bit weights keep two bits: four values are left of sixteen. ``part``: only in modules
    whose name has it."""

    def cut(name: str, tensor: Tensor) -> Tensor:
        if not name.endswith("weight_packed") or part not in name:
            return tensor
        signed = [value - (1 << 32) if value >= 1 << 31 else value for value in (KEPT_BITS, MIDDLE)]
        return (tensor & signed[0]) | signed[1]

    _rewrite(directory, cut)


def kv_scales(directory: Path) -> None:
    """The scales of the KV cache are those of another checkpoint."""
    _rewrite(
        directory, lambda name, tensor: tensor / CLIPPED if name.endswith(("k_scale", "v_scale")) else tensor
    )


def chat_template(directory: Path) -> None:
    """Conversations are put together as for another model."""
    (directory / "chat_template.jinja").write_text(
        "{{- bos_token }}{%- for message in messages %}"
        "{{- message['role'] ~ ': ' ~ message['content'] ~ '\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}",
        encoding="utf-8",
    )


DAMAGES: dict[str, Callable[[Path], None]] = {
    "two-bits": two_bits,
    "two-bits-in-one-layer": lambda directory: two_bits(directory, "layers.0."),
    "kv-scales": kv_scales,
    "chat-template": chat_template,
}


def damaged(source: Path, out: Path, how: str) -> Path:
    """A copy of the variant in ``source`` with one of ``DAMAGES``. Raises ValueError where it has no
    effect."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(source.resolve(), out)
    for path in out.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    DAMAGES[how](out)
    return out


def _rewrite(directory: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    changed = 0
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            before = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        after = {name: change(name, tensor) for name, tensor in before.items()}
        changed += sum(after[name] is not before[name] for name in before)
        partial = path.with_name(path.name + ".partial")
        save_file(after, partial, metadata=metadata)
        partial.replace(path)
    if not changed:
        raise ValueError(f"{directory}: has no tensor of that kind; nothing was harmed")
