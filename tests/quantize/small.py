"""A small base checkpoint of real tensors, written without transformers, and quantized ones beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantize.card import Evaluation, NoiseFloor, Paired, RoleEvaluation, TextEvaluation

CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 256,
}
SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (128, 64),
    "mlp.up_proj": (128, 64),
    "mlp.down_proj": (64, 128),
}
DTYPES = {"float32": "F32", "float16": "F16", "uint16": "BF16", "int32": "I32", "int8": "I8", "int64": "I64"}
"""NumPy's name to safetensors'; bfloat16 is written from its 16 bits."""

Tensors = dict[str, NDArray[Any]]


def linears() -> dict[str, tuple[int, int]]:
    return {
        f"model.layers.{layer}.{name}": shape
        for layer in range(CONFIG["num_hidden_layers"])
        for name, shape in SHAPES.items()
    }


def bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper 16 bits: rounded towards zero."""
    return (values.astype("<f4").view("<u4") >> 16).astype(np.uint16)


def base_tensors(seed: int = 0) -> Tensors:
    random = np.random.default_rng(seed)
    made: Tensors = {
        f"{name}.weight": bf16(random.normal(0, 0.1, shape).astype(np.float32))
        for name, shape in linears().items()
    }
    made["model.embed_tokens.weight"] = bf16(random.normal(0, 1, (96, 64)).astype(np.float32))
    made["lm_head.weight"] = made["model.embed_tokens.weight"]
    for layer in range(2):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            made[f"model.layers.{layer}.{norm}.weight"] = bf16(np.ones(64, np.float32))
    made["model.norm.weight"] = bf16(np.ones(64, np.float32))
    return made


def write_checkpoint(directory: Path, tensors: Mapping[str, NDArray[Any]], config: Mapping[str, Any]) -> Path:
    """config.json and model.safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {}
    at = 0
    for name, values in tensors.items():
        end = at + values.nbytes
        shape = list(values.shape)
        header[name] = {"dtype": DTYPES[values.dtype.name], "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    raw = len(text).to_bytes(8, "little") + text + b"".join(values.tobytes() for values in tensors.values())
    (directory / "model.safetensors").write_bytes(raw)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def write_tokenizer(directory: Path, words: int = 96) -> None:
    vocabulary = {f"w{index}": index for index in range(words)}
    text = json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []})
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    (directory / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")


def write_fleet(directory: Path) -> Path:
    """The base checkpoint in a fleet of its own, with one role of twelve items; gives the YAML file."""
    write_base(directory / "model")
    asked = [[{"role": "user", "content": f"when is invoice {number} due?"}] for number in range(12)]
    lines = [json.dumps({"messages": one, "expected": "$5"}) + "\n" for one in asked]
    (directory / "core.jsonl").write_text("".join(lines), encoding="utf-8")
    path = directory / "tiercel.yaml"
    path.write_text(
        f"""
models: {{assistant: {{path: {directory}/model, serve: [bf16, int4]}}}}
variants_dir: variants
roles: {{core: {{tasks: core.jsonl}}}}
default_role: core
""",
        encoding="utf-8",
    )
    return path


def write_base(directory: Path) -> Path:
    write_checkpoint(directory, base_tensors(), CONFIG)
    write_tokenizer(directory)
    return directory


def make_evaluation(kl: float, roles: tuple[str, ...] = ("core",)) -> Evaluation:
    """Figures of a variant that lost ``kl`` nats per token and a few answers of every role."""
    text = TextEvaluation(
        tokens=5000,
        perplexity=6.1,
        reference_perplexity=6.0,
        delta_log_perplexity=0.016,
        delta_log_perplexity_se=0.002,
        kl_mean=kl,
        kl_p99=10 * kl,
        kl_se=0.05 * kl,
        kl_vocabulary=64,
        sequences=80,
        kl_interval=(0.9 * kl, 1.1 * kl),
        top1_agreement=0.97,
    )
    role = RoleEvaluation(
        items=400,
        correct=360,
        reference_correct=364,
        flips_to_wrong=6,
        flips_to_right=2,
        same_answer=380,
        text=text,
        mcnemar_p=0.29,
        grounded=Paired(
            items=400, good=390, reference_good=392, flips_to_bad=3, flips_to_good=1, mcnemar_p=0.62
        ),
    )
    noise = NoiseFloor(items=400, flips=1, other_answers=2, kl_mean=0.0001, kl_p99=0.001)
    engine = {"vllm": "0.32.0", "instructions": "avx512f", "machine": "x86_64"}
    return Evaluation(
        roles=dict.fromkeys(roles, role), text=text, tasks_sha256="0" * 64, engine=engine, noise=noise
    )
