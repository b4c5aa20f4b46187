"""A random model of 300 M parameters whose speed is that of a real one of its size.

    python -m benchmarks.agents.random_model --like path/to/SmolLM2-135M-Instruct OUT

It has the tokenizer of the model that it is like. Its last norm is large, so that it is sure of what it says
(perplexity of its own greedy answers: 1.2): a reference that is noise to itself gives no verdicts. What it
loses at 8 bits says nothing; roles for it need budgets that let everything pass.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

LAST_NORM = 40.0
TOKENIZER = ("tokenizer", "special_tokens", "chat_template", "vocab", "merges", "generation_config")


def make(like: Path, out: Path) -> int:
    """Its parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(like)
    config.hidden_size, config.num_hidden_layers, config.intermediate_size = 1024, 22, 2816
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 16, 4, 64
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        model.model.norm.weight.mul_(LAST_NORM)
    model.save_pretrained(out)
    for path in like.iterdir():
        if path.name.startswith(TOKENIZER):
            shutil.copy(path, out)
    return sum(one.numel() for one in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--like", type=Path, required=True, help="a Llama's directory")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    print(f"{make(options.like, options.out) / 1e6:.0f} M parameters in {options.out}")


if __name__ == "__main__":
    main()
