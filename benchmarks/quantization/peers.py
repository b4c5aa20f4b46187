"""The real model at 4 bits as llm-compressor's AWQ and AutoRound make it, on the benchmark's own texts.

    python -m benchmarks.quantization.peers awq --out var/benchmarks/real/awq
    python -m benchmarks.quantization.peers autoround --iterations 50 --out var/benchmarks/real/autoround
    python -m benchmarks.quantization.real --only nothing --checkpoint "w4a16-g32-asym awq=var/…/awq"

Nothing of the project's own quantizers is used: AWQ with llm-compressor's defaults, AutoRound with as many
iterations as are said. Seconds (with imports) and the largest resident memory are written to ``made.json``
beside the checkpoint.
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
from benchmarks.quantization.real import WORK

ROW_TOKENS = 128
"""AutoRound drops samples that are shorter than its sequence length, so conversations are joined."""
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def by_awq(model: Path, sequences: Sequence[Sequence[int]], out: Path, group_size: int) -> None:
    """AWQ with its defaults (20 points of a grid, weights and inputs), then ranges from extremes."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM, GenerationConfig

    if not torch.accelerator.is_available():  # it pins memory for an accelerator even where there is none
        IntermediatesCache.pin_memory = lambda *_, **__: None
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, local_files_only=True)
    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=False, strategy="group", group_size=group_size
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    rows = [{"input_ids": list(ids), "attention_mask": [1] * len(ids)} for ids in sequences]
    oneshot(
        model=loaded,
        dataset=Dataset.from_list(rows),
        recipe=[AWQModifier(), QuantizationModifier(config_groups=groups, ignore=["lm_head"])],
        num_calibration_samples=len(rows),
        max_seq_length=max(map(len, sequences)),
    )
    loaded.generation_config = GenerationConfig()
    loaded.save_pretrained(out, save_compressed=True)


def by_auto_round(
    model: Path, sequences: Sequence[Sequence[int]], out: Path, group_size: int, iterations: int
) -> None:
    """AutoRound in its own format; its rows are the conversations, joined and cut."""
    import torch
    from auto_round import AutoRound
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = [token for sequence in sequences for token in sequence]
    rows = [tokens[at : at + ROW_TOKENS] for at in range(0, len(tokens) - ROW_TOKENS + 1, ROW_TOKENS)]
    samples: list[dict[str, Any]] = [{"input_ids": torch.tensor(row)} for row in rows]
    rounding = AutoRound(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, local_files_only=True),
        AutoTokenizer.from_pretrained(model, local_files_only=True),
        bits=4,
        group_size=group_size,
        sym=False,
        iters=iterations,
        seqlen=ROW_TOKENS,
        nsamples=len(rows),
        dataset=DataLoader(samples, batch_size=8),
        device_map="cpu",
        enable_torch_compile=False,
    )
    rounding.quantize_and_save(str(out), format="auto_round")
    for nested in [path for path in out.iterdir() if path.is_dir()]:  # it adds a folder named by the bits
        for path in nested.iterdir():
            path.rename(out / path.name)
        nested.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("maker", choices=("awq", "autoround"))
    parser.add_argument("--out", type=Path, required=True, help="a directory that is written")
    parser.add_argument("--model", type=Path, default=WORK / "model")
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=200, help="of AutoRound, per block")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    began = time.monotonic()
    sequences = [tokens for tokens, _ in real_data.texts(options.model, WORK / "texts.json").calibrating]
    if options.maker == "awq":
        by_awq(options.model, sequences, options.out, options.group_size)
    else:
        by_auto_round(options.model, sequences, options.out, options.group_size, options.iterations)
    for name in COMPANIONS:
        if (options.model / name).is_file():
            shutil.copyfile(options.model / name, options.out / name)
    used = resource.getrusage(resource.RUSAGE_SELF)
    made = {
        "wall_s": round(time.monotonic() - began, 1),
        "cpu_s": round(used.ru_utime + used.ru_stime, 1),
        "peak_mb": round(used.ru_maxrss * 1024 / 1e6),
    }
    (options.out / "made.json").write_text(json.dumps(made) + "\n", encoding="utf-8")
    print(f"wrote {options.out}: {made}")


if __name__ == "__main__":
    main()
