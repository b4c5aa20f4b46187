"""Checkpoints as somebody else would make them: with plain llm-compressor, and with plain AutoRound.

Nothing of Tiercel is used here. The results are what ``tiercel quantize register`` is for.

    python -m benchmarks.quantization.outside --maker llmcompressor --out var/outside/llmcompressor
    python -m benchmarks.quantization.outside --maker auto_round --out var/outside/auto_round

``--maker`` may also be ``awq`` (llm-compressor's), or ``auto_gptq`` or ``auto_awq``: AutoRound's numbers in
the two older formats. Each takes a minute or two on one core for the demo model. A real one, on its texts:

    W=var/benchmarks/real
    python -m benchmarks.quantization.outside --maker awq --model $W/model --texts $W/texts.json \
        --group-size 32 --zero-points --out $W/awq
    python -m benchmarks.quantization.real --only nothing --checkpoint "awq=$W/awq"

Seconds (with imports) and the largest resident memory are written to ``made.json`` beside the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quantization import real_data

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "deploy/assistant/model"
CALIBRATION = ROOT / "deploy/assistant/data/calibration.jsonl"
ROW_TOKENS = 128
"""AutoRound drops samples that are shorter than its sequence length, so conversations are joined."""
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
Sequences = Sequence[Sequence[int]]


def encode(model: Path, conversations: Path) -> list[list[int]]:
    """Token ids of every conversation, by the model's own chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    lines = conversations.read_text(encoding="utf-8").splitlines()
    return [
        list(tokenizer.apply_chat_template(json.loads(line)["messages"], return_dict=True)["input_ids"])
        for line in lines
    ]


def by_llmcompressor(
    model: Path, sequences: Sequences, out: Path, group_size: int, zero_points: bool, awq: bool
) -> None:
    """GPTQ as in llm-compressor's README with groups, or AWQ with its defaults and ranges from extremes."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM, GenerationConfig

    if not torch.accelerator.is_available():  # it pins memory for an accelerator even where there is none
        IntermediatesCache.pin_memory = lambda *_, **__: None
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, local_files_only=True)
    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=not zero_points, strategy="group", group_size=group_size
    )
    how: Any = {
        "config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": ["lm_head"],
    }
    rows = [{"input_ids": list(ids), "attention_mask": [1] * len(ids)} for ids in sequences]
    oneshot(
        model=loaded,
        dataset=Dataset.from_list(rows),
        recipe=[AWQModifier(), QuantizationModifier(**how)] if awq else GPTQModifier(**how),
        num_calibration_samples=len(rows),
        max_seq_length=max(map(len, sequences)),
    )
    loaded.generation_config = GenerationConfig()  # it refuses to save one that samples without saying so
    loaded.save_pretrained(out, save_compressed=True)


def by_auto_round(
    model: Path,
    sequences: Sequences,
    out: Path,
    group_size: int,
    zero_points: bool,
    iterations: int,
    kind: str,
) -> None:
    """AutoRound, 4-bit groups, saved as ``kind``: auto_round, auto_gptq or auto_awq."""
    import torch
    from auto_round import AutoRound
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = [token for row in sequences for token in row]
    rows = [tokens[at : at + ROW_TOKENS] for at in range(0, len(tokens) - ROW_TOKENS + 1, ROW_TOKENS)]
    samples: list[dict[str, Any]] = [{"input_ids": torch.tensor(row)} for row in rows]
    rounding = AutoRound(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, local_files_only=True),
        AutoTokenizer.from_pretrained(model, local_files_only=True),
        bits=4,
        group_size=group_size,
        sym=not zero_points,
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
    makers = ("llmcompressor", "awq", "auto_round", "auto_gptq", "auto_awq")
    parser.add_argument("--maker", choices=makers, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a directory that is written")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--calibration", type=Path, default=CALIBRATION, help="JSON Lines of conversations")
    parser.add_argument(
        "--texts", type=Path, help="the real model's texts instead, as its benchmark keeps them"
    )
    parser.add_argument("--count", type=int, help="of conversations, the first ones (default: all)")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--zero-points", action="store_true")
    parser.add_argument("--iterations", type=int, default=20, help="of AutoRound, per block")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    began = time.monotonic()
    sequences: Sequences = (
        [tokens for tokens, _ in real_data.texts(options.model, options.texts).calibrating]
        if options.texts
        else encode(options.model, options.calibration)
    )
    made = (
        options.model, sequences[: options.count], options.out, options.group_size, options.zero_points
    )  # fmt: skip
    if options.maker in ("llmcompressor", "awq"):
        by_llmcompressor(*made, awq=options.maker == "awq")
    else:
        by_auto_round(*made, options.iterations, options.maker)
    for name in COMPANIONS:
        if (options.model / name).is_file():
            shutil.copyfile(options.model / name, options.out / name)
    used = resource.getrusage(resource.RUSAGE_SELF)
    figures = {
        "wall_s": round(time.monotonic() - began, 1),
        "cpu_s": round(used.ru_utime + used.ru_stime, 1),
        "peak_mb": round(used.ru_maxrss * 1024 / 1e6),
        "tokens": sum(map(len, made[1])),
    }
    (options.out / "made.json").write_text(json.dumps(figures) + "\n", encoding="utf-8")
    print(f"wrote {options.out}: {figures}")


if __name__ == "__main__":
    main()
