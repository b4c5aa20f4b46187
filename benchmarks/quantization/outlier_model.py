"""A model with planted activation outliers, so that smoothing has work to do.

A second model, of another depth than the demo's, is trained by the demo model's own trainer. Then a few
channels of every decoder norm's weight are scaled up, and the matching input columns of the next linear
modules down by the same factor. Factors are powers of two, so the function stays the same to the last
bit; only the activations between them get outliers.

    python -m benchmarks.quantization.outlier_model --clinc150 clinc150.json --out DIR

Training is kept under var/benchmarks/outlier-model by a hash of its inputs and resumes where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.quantization.data import Sources, clinc_path, encode, planting_conversations
from quantize.core.files import sha256_of

CACHE = Path("var/benchmarks/outlier-model")
LAYERS, SEED = 6, 11
MINUTES = 25.0
STEPS_PER_MINUTE = 20
"""Of training, on two busy cores: 500 steps took 30 minutes there, of which the first ran at 21 a minute."""
CHANNELS = 6
"""Outlier channels per norm."""
FACTORS = (8.0, 16.0)

Planted = dict[str, dict[int, float]]
"""Norm's module name to channel to factor."""


class PlantingError(ValueError):
    """Outliers cannot be planted in a model, or planting changed what it computes."""


def plant(model: Any, channels: int = CHANNELS, seed: int = 0, factors: Sequence[float] = FACTORS) -> Planted:
    """Scale ``channels`` channels of every decoder norm of a Llama, in place; says which and by how much.

    The norm's output x * w becomes x * (f w), and a following linear's column c becomes c / f. For f a power
    of two both are exact in any floating-point format. Raises PlantingError before anything is changed.
    """
    if model.config.model_type != "llama":
        raise PlantingError(f"model_type={model.config.model_type!r}: outliers are planted in 'llama' only")
    width = model.config.hidden_size
    if not 0 < channels <= width:
        raise PlantingError(f"channels={channels}: must be from 1 to the hidden size, {width}")
    wrong = [one for one in factors if one <= 1 or math.frexp(one)[0] != 0.5]
    if wrong or not factors:
        raise PlantingError(
            f"factors={list(factors)}: must be powers of two above 1, such as {list(FACTORS)}"
        )
    rng = random.Random(seed)
    planted: Planted = {}
    for number, layer in enumerate(model.model.layers):
        for name, following in following_linears(layer).items():
            norm = getattr(layer, name)
            chosen = {channel: rng.choice(factors) for channel in rng.sample(range(width), channels)}
            for channel, factor in chosen.items():
                norm.weight.data[channel] *= factor
                for linear in following:
                    linear.weight.data[:, channel] /= factor
            planted[f"model.layers.{number}.{name}"] = dict(sorted(chosen.items()))
    return planted


def following_linears(layer: Any) -> dict[str, tuple[Any, ...]]:
    """A Llama layer's norms, and the linear modules that read each."""
    attention, mlp = layer.self_attn, layer.mlp
    return {
        "input_layernorm": (attention.q_proj, attention.k_proj, attention.v_proj),
        "post_attention_layernorm": (mlp.gate_proj, mlp.up_proj),
    }


@contextmanager
def int8_inputs(model: Any) -> Iterator[None]:
    """Within it, the inputs of all linears of the decoder are rounded to INT8, one symmetric range per token.

    Inputs x of (batch, tokens, K) become s * round(x / s), with s = max |x| over K / 127.
    """
    import torch

    def rounded(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0].float()
        scale = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-12)
        return ((x / scale).round() * scale).to(inputs[0].dtype), *inputs[1:]

    linears = [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    hooks = [linear.register_forward_pre_hook(rounded) for linear in linears]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def logits(model: Any, sequences: Sequence[Sequence[int]]) -> Any:
    """Logits of every token of every sequence, (tokens, vocabulary) float32."""
    import torch

    with torch.inference_mode():
        return torch.cat([model(torch.tensor([list(one)])).logits[0].float() for one in sequences])


def mean_kl(reference: Any, other: Any) -> float:
    """Mean KL(reference || other) in nats over rows of logits (tokens, vocabulary)."""
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def effect(before: Any, after: Any, sequences: Sequence[Sequence[int]]) -> dict[str, float]:
    """What planting did, as figures: ``before`` and ``after`` are bfloat16 models and become float32.

    Logits' largest difference in both formats (should be 0), and the mean KL that INT8 inputs cost each.
    """
    bf16 = float((logits(before, sequences) - logits(after, sequences)).abs().max())
    reference, same = logits(before.float(), sequences), logits(after.float(), sequences)
    with int8_inputs(before), int8_inputs(after):
        rounded = logits(before, sequences), logits(after, sequences)
    return {
        "tokens": len(reference),
        "logits_max_difference_bf16": bf16,
        "logits_max_difference_float32": float((reference - same).abs().max()),
        "int8_inputs_kl_before": mean_kl(reference, rounded[0]),
        "int8_inputs_kl_after": mean_kl(same, rounded[1]),
    }


def training_key(clinc150: Path, steps: int) -> str:
    """Hash of what training starts from: settings, data files and samples of the generated records.

    The trainer's own code is not part of it: remove the cache after changing that.
    """
    from deploy.assistant.corpus import UTTERANCES, record_conversation
    from deploy.assistant.train import PHASES, model_config

    inputs = {
        "clinc150": sha256_of(clinc150),
        "utterances": sha256_of(UTTERANCES),
        "records": [record_conversation(number) for number in range(64)],
        "config": model_config(LAYERS).to_diff_dict(),
        "phases": repr(PHASES),
        "steps": steps,
        "seed": SEED,
    }
    inputs["config"].pop("transformers_version", None)
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]


def trained(folder: Path, clinc150: Path, steps: int) -> Path:
    """Train, or go on training, in ``folder``; returns the checkpoint directory."""
    out = folder / "trained"
    if out.is_dir():
        return out
    from deploy.assistant.train import train

    minutes = steps / STEPS_PER_MINUTE
    print(
        f"training {LAYERS} layers, {steps} steps: about {minutes:.2g} minutes and an evaluation; resumable",
        file=sys.stderr,
    )
    began = time.monotonic()
    train(
        argparse.Namespace(
            clinc150=clinc150,
            out=out,
            work=folder / "work",
            steps=steps,
            seed=SEED,
            layers=LAYERS,
            evaluate_every=steps,
        )
    )
    print(f"trained in {(time.monotonic() - began) / 60:.1f} minutes of this run", file=sys.stderr)
    return out


def write_planted(source: Path, out: Path, sequences: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Plant outliers in the checkpoint ``source`` and write it to ``out``, which must not exist.

    Returns what planting.json holds: the channels, and :func:`effect`'s figures. Raises PlantingError when
    the float32 logits are no longer the same.
    """
    import torch
    from transformers import AutoModelForCausalLM

    before: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, local_files_only=True)
    planted = plant(model)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    model.save_pretrained(partial)
    figures = effect(before, model, sequences)
    if figures["logits_max_difference_float32"] > 1e-4:
        raise PlantingError(
            f"planting changed float32 logits of {source} by {figures['logits_max_difference_float32']:.2g}"
        )
    record = {**figures, "channels": planted}
    (partial / "planting.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (partial / "README.md").write_text(card(model, record), encoding="utf-8")
    partial.rename(out)
    return record


def card(model: Any, record: Mapping[str, Any]) -> str:
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return (
        f"# A benchmark model with planted outliers\n\nA Llama of {millions:.1f} M parameters and "
        f"{model.config.num_hidden_layers} layers, trained by deploy/assistant/train.py (training.json), "
        f"then given {CHANNELS} outlier channels per norm (planting.json). Rounding the linear modules' "
        f"inputs to INT8 costs a mean KL of {record['int8_inputs_kl_after']:.2g} nats per token; before "
        f"planting {record['int8_inputs_kl_before']:.2g}. Made by benchmarks/quantization/outlier_model.py.\n"
    )


def make(cache: Path = CACHE, clinc150: Path | None = None, minutes: float = MINUTES) -> Path:
    """Train (or resume), plant and check; returns the model's directory, which is made once.

    ``minutes`` is turned into steps at a fixed rate, so that equal calls train equal models.
    Raises ValueError; ends with a sentence where CLINC150 is missing.
    """
    steps = round(minutes * STEPS_PER_MINUTE) if math.isfinite(minutes) else 0
    if steps < 1:
        raise ValueError(f"minutes={minutes}: must be at least {1 / STEPS_PER_MINUTE}, for one step")
    sources = Sources() if clinc150 is None else Sources(clinc150=clinc150)
    path = clinc_path(sources)
    folder = cache / training_key(path, steps)
    settings = json.dumps([CHANNELS, FACTORS])
    out = folder / f"planted-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
    if out.is_dir():
        return out
    folder.mkdir(parents=True, exist_ok=True)
    source = trained(folder, path, steps)
    record = write_planted(source, out, encode(source, planting_conversations(sources)))
    del record["channels"]
    print(json.dumps(record), file=sys.stderr)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, default=CACHE, help="training and results, by hash")
    parser.add_argument("--out", type=Path, help="also copy the model to this new directory")
    parser.add_argument("--clinc150", type=Path, help="CLINC150 as JSON; default: ../shared/data")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help=f"length of training, {STEPS_PER_MINUTE} steps each"
    )
    options = parser.parse_args()
    if options.out is not None and options.out.exists():
        parser.error(f"--out {options.out} exists; name a new directory or remove it")
    try:
        made = make(options.cache, options.clinc150, options.minutes)
    except ValueError as error:
        parser.error(str(error))
    if options.out is not None:
        shutil.copytree(made, options.out)
    print(options.out or made)


if __name__ == "__main__":
    main()
