"""Checkpoints as somebody else would make them: with plain llm-compressor, and with plain AutoRound.

Nothing of Tiercel is used here. The results are what ``tiercel quantize register`` is for.

    python -m benchmarks.quantization.outside --maker llmcompressor --out var/outside/llmcompressor
    python -m benchmarks.quantization.outside --maker auto_round --out var/outside/auto_round

``--maker`` may also be ``auto_gptq`` or ``auto_awq``: AutoRound's numbers in the two older formats.
Each takes a minute or two on one core for the demo model.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "deploy/assistant/model"
CALIBRATION = ROOT / "deploy/assistant/data/calibration.jsonl"
ROW_TOKENS = 128
"""AutoRound drops samples that are shorter than its sequence length, so conversations are joined."""


def encode(model: Path, conversations: Path) -> list[list[int]]:
    """Token ids of every conversation, by the model's own chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    lines = conversations.read_text(encoding="utf-8").splitlines()
    return [
        list(tokenizer.apply_chat_template(json.loads(line)["messages"], return_dict=True)["input_ids"])
        for line in lines
    ]


def by_llmcompressor(model: Path, conversations: Path, out: Path, group_size: int) -> None:
    """GPTQ, 4-bit weights, symmetric groups: llm-compressor's README example with a group size."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = encode(model, conversations)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, local_files_only=True)
    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=group_size
    )
    oneshot(
        model=loaded,
        dataset=Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in rows]),
        recipe=GPTQModifier(
            config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
            ignore=["lm_head"],
        ),
        num_calibration_samples=len(rows),
        max_seq_length=512,
    )
    loaded.save_pretrained(out, save_compressed=True)
    AutoTokenizer.from_pretrained(model, local_files_only=True).save_pretrained(out)


def by_auto_round(
    model: Path, conversations: Path, out: Path, group_size: int, iterations: int, kind: str
) -> None:
    """AutoRound, 4-bit symmetric groups, saved as ``kind``: auto_round, auto_gptq or auto_awq."""
    import torch
    from auto_round import AutoRound
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = [token for row in encode(model, conversations) for token in row]
    rows = [tokens[at : at + ROW_TOKENS] for at in range(0, len(tokens) - ROW_TOKENS + 1, ROW_TOKENS)]
    samples: list[dict[str, Any]] = [{"input_ids": torch.tensor(row)} for row in rows]
    rounding = AutoRound(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, local_files_only=True),
        AutoTokenizer.from_pretrained(model, local_files_only=True),
        bits=4,
        group_size=group_size,
        sym=True,
        iters=iterations,
        seqlen=ROW_TOKENS,
        nsamples=len(rows),
        dataset=DataLoader(samples, batch_size=8),
        device_map="cpu",
        enable_torch_compile=False,
    )
    rounding.quantize_and_save(str(out), format=kind)
    for nested in [path for path in out.iterdir() if path.is_dir()]:  # it adds a folder named by the bits
        for path in nested.iterdir():
            path.rename(out / path.name)
        nested.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    makers = ("llmcompressor", "auto_round", "auto_gptq", "auto_awq")
    parser.add_argument("--maker", choices=makers, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a directory that is written")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--calibration", type=Path, default=CALIBRATION, help="JSON Lines of conversations")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=20, help="of AutoRound, per block")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    made = (options.model, options.calibration, options.out, options.group_size)
    if options.maker == "llmcompressor":
        by_llmcompressor(*made)
    else:
        by_auto_round(*made, options.iterations, options.maker)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
