"""Runs llm-compressor: one checkpoint and a plan in, a compressed-tensors directory out.

The heavy imports (torch, transformers, llm-compressor) happen inside the functions, so that the
command line stays quick for everything else.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from quantize.core.checkpoint import Checkpoint, copy_companions
from quantize.core.loading import load_model
from quantize.core.methods import Method, parse_method, refuse_trained
from quantize.core.modules import Modules
from quantize.core.plan import Plan
from quantize.core.schemes import scheme
from quantize.make.calibration import CalibrationSet
from quantize.make.modifiers import modifiers
from quantize.make.streaming import QuantizeError

__all__ = ["QuantizeError", "compress_whole", "versions"]

MAX_ROUND_TRIP_ERROR = 0.75
"""Relative error of a dequantized weight above which it cannot be right: 2-bit rounding stays below."""
SERVING = {"BF16": "bfloat16", "F16": "float16"}
"""What an engine computes in, in torch's words."""
_STEP = re.compile(r"\((\d+)/(\d+)\): (Calibrating|Propagating)")


def versions() -> dict[str, str]:
    """Versions of what decides the numbers of a variant."""
    names = ("torch", "transformers", "llmcompressor", "compressed-tensors")
    return {name: version(name) for name in names}


def compress_whole(
    checkpoint: Checkpoint,
    modules: Modules,
    plan: Plan,
    calibration: CalibrationSet | None,
    out: Path,
    log: Path,
    label: str,
) -> None:
    """Quantize the whole model by llm-compressor, with ``plan.method`` for all groups, into ``out``."""
    method = parse_method(plan.method)
    refuse_trained(plan.method)
    log.unlink(missing_ok=True)
    with (
        tqdm(total=100, desc=label, unit="%", file=sys.stderr, bar_format="{l_bar}{bar}| {elapsed}") as bar,
        quiet(log, _progress(bar)),
    ):
        import torch
        from llmcompressor import oneshot
        from transformers import GenerationConfig

        model = load_model(checkpoint, getattr(torch, SERVING[checkpoint.serving_dtype]))
        refuse_damaged(checkpoint, model)
        torch.manual_seed(0)
        with _patches(method):
            oneshot(
                model=model,
                recipe=list(modifiers(method, plan, modules)),
                **(_data(calibration, method) if calibration and method.needs_data(plan) else {}),
            )
        check_quantized(model, modules, plan, log)
        # The checkpoint's own is copied: transformers refuses to save many that it loads.
        model.generation_config = GenerationConfig()
        model.save_pretrained(out, save_compressed=True)
        (out / "generation_config.json").unlink(missing_ok=True)
        copy_companions(checkpoint, out)
        bar.update(100 - bar.n)
    _settle_config(out)


def _data(calibration: CalibrationSet, method: Method) -> dict[str, Any]:
    from datasets import Dataset

    sequences: Sequence[Sequence[int]] = calibration.sequences
    if method.solver == "autoround":
        sequences = same_length(sequences)
    rows = [{"input_ids": list(ids), "attention_mask": [1] * len(ids)} for ids in sequences]
    return {
        "dataset": Dataset.from_list(rows),
        "num_calibration_samples": len(rows),
        "max_seq_length": max(len(ids) for ids in sequences),
    }


def same_length(sequences: Sequence[Sequence[int]], length: int = 128) -> list[list[int]]:
    """The tokens of all sequences, one after another, cut into rows of ``length`` tokens."""
    tokens = [token for sequence in sequences for token in sequence]
    rows = [tokens[at : at + length] for at in range(0, len(tokens) - length + 1, length)]
    return rows or [tokens]


def refuse_damaged(checkpoint: Checkpoint, model: Any) -> None:
    """Raise QuantizeError when a weight is NaN or infinite."""
    import torch

    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise QuantizeError(f"{checkpoint.path}: {name} holds NaN or infinity; the checkpoint is damaged")


def check_quantized(model: Any, modules: Modules, plan: Plan, log: Path) -> None:
    """Raise QuantizeError unless every module came out as the plan has it, with finite, fitting scales."""
    import torch
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    for group in modules:
        wanted = scheme(plan.groups[group.name])
        for member in group.members:
            module = model.get_submodule(member.name)
            made = getattr(module, "quantization_scheme", None)
            bits = made.weights.num_bits if made is not None and made.weights is not None else 16
            if bits != (wanted.range_bits or wanted.weight_bits):
                raise QuantizeError(f"{member.name} came out at {bits} bits, not {wanted.name}; see {log}")
            if made is None or made.weights is None:
                continue
            scale, weight = module.weight_scale, module.weight
            if not torch.isfinite(scale).all():
                raise QuantizeError(f"{member.name}: scales are not finite after quantization; see {log}")
            zero = getattr(module, "weight_zero_point", None)
            more = (
                {"global_scale": module.weight_global_scale} if hasattr(module, "weight_global_scale") else {}
            )
            again = fake_quantize(weight, scale, zero, made.weights, **more)
            error = float((again - weight).float().norm() / weight.float().norm().clamp_min(1e-12))
            if error > MAX_ROUND_TRIP_ERROR:
                raise QuantizeError(
                    f"{member.name}: its stored weights are {error:.0%} off after quantization; see {log}"
                )


@contextlib.contextmanager
def _patches(method: Method) -> Iterator[None]:
    """llm-compressor's AWQ pins memory for an accelerator even where there is none."""
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache

    if "awq" not in method.transforms or torch.accelerator.is_available():
        yield
        return
    pin = IntermediatesCache.pin_memory
    IntermediatesCache.pin_memory = lambda *_, **__: None
    try:
        yield
    finally:
        IntermediatesCache.pin_memory = pin


def _settle_config(out: Path) -> None:
    """Make the saved configuration say what is stored.

    Folded transforms are in the weights, so the engine must not apply them again. Integers of a smaller
    range (``w8a8-r7``) are stored as, and computed as, whole bytes.
    """
    path = out / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    settings = config.get("quantization_config", {})
    settings.pop("transform_config", None)
    for group in settings.get("config_groups", {}).values():
        inputs, weights = group["input_activations"], group["weights"]
        if inputs and inputs["type"] == weights["type"] == "int" and 4 < weights["num_bits"] < 8:
            weights["num_bits"] = 8
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _progress(bar: Any) -> Callable[[str], None]:
    """Reads llm-compressor's own progress, ``(layer/layers): Calibrating``, into per cent."""

    def seen(text: str) -> None:
        for step, steps, phase in _STEP.findall(text):
            done = 100 * (int(step) - (0.5 if phase == "Calibrating" else 0)) / int(steps)
            bar.update(max(0, min(99, int(done)) - bar.n))

    return seen


class _Tee(io.TextIOBase):
    def __init__(self, file: Any, seen: Callable[[str], object]) -> None:
        self._file, self._seen = file, seen

    def write(self, text: str) -> int:
        self._seen(text)
        return int(self._file.write(text))

    def flush(self) -> None:
        self._file.flush()


@contextlib.contextmanager
def quiet(log: Path, seen: Callable[[str], object] = lambda _: None) -> Iterator[None]:
    """Send the libraries' logging, warnings, bars and prints to a file; ``seen`` is shown all of it."""
    from loguru import logger

    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.remove()
        logger.add(file, level="INFO")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        tee = _Tee(file, seen)
        try:
            with contextlib.redirect_stderr(tee), contextlib.redirect_stdout(tee):
                yield
        finally:
            logging.disable(before)
            logger.remove()
            logger.add(sys.stderr, level="WARNING")
