"""Runs llm-compressor: one checkpoint and a recipe in, a compressed-tensors directory out.

The heavy imports (torch, transformers, llm-compressor) happen inside the functions, so that the
command line stays quick for everything else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from quantize.card import Calibration, sha256_of
from quantize.checkpoint import Checkpoint
from quantize.schemes import Recipe

MIN_CALIBRATION_SAMPLES = 16
CALIBRATION_LENGTH = 512
"""Longest calibration sequence, tokens; longer ones are cut."""


class QuantizeError(RuntimeError):
    """The variant cannot be made. The text says why and what to change."""


@dataclass(frozen=True)
class CalibrationSet:
    """Token sequences for calibration, and where they came from."""

    sequences: list[list[int]]
    description: Calibration


def versions() -> dict[str, str]:
    """Versions of what decides the numbers of a variant."""
    names = ("torch", "transformers", "llmcompressor", "compressed-tensors")
    return {name: version(name) for name in names}


def read_calibration(path: Path | None, checkpoint: Checkpoint) -> CalibrationSet:
    """Read conversations from JSON Lines ({"messages": [...]}) and encode them with the chat template.

    Raises QuantizeError when the file is missing, malformed or holds too few conversations.
    """
    if path is None:
        raise QuantizeError("calibration is not set; give a JSON Lines file of conversations in the YAML")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise QuantizeError(f"calibration file {path} does not exist; set calibration in the YAML") from None
    tokenizer = load_tokenizer(checkpoint.path)
    sequences = []
    for number, line in enumerate(lines, 1):
        try:
            messages = json.loads(line)["messages"]
            encoded = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
        except Exception as error:  # whatever a template raises, the line is at fault
            raise QuantizeError(
                f"{path}:{number}: not a conversation ({type(error).__name__}: {error}); "
                'each line must be {"messages": [{"role": …, "content": …}, …]}'
            ) from None
        sequences.append(list(encoded["input_ids"])[:CALIBRATION_LENGTH])
    if len(sequences) < MIN_CALIBRATION_SAMPLES:
        raise QuantizeError(
            f"{path} has {len(sequences)} conversations; calibration needs {MIN_CALIBRATION_SAMPLES} or more"
        )
    described = Calibration(
        source=path.name,
        sha256=sha256_of(path),
        samples=len(sequences),
        tokens=sum(len(sequence) for sequence in sequences),
    )
    return CalibrationSet(sequences, described)


def load_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    if not tokenizer.chat_template:
        raise QuantizeError(f"{path}: the tokenizer has no chat template; add chat_template.jinja beside it")
    return tokenizer


def compress(
    checkpoint: Checkpoint, recipe: Recipe, calibration: CalibrationSet, out: Path, log: Path
) -> dict[str, int]:
    """Quantize ``checkpoint`` by ``recipe`` into ``out``; returns linear module name to weight bits.

    llm-compressor's own log goes to ``log``. Raises QuantizeError before any work when the target's
    kernels could not load the result, and after it when a module was not quantized as intended.
    """
    log.unlink(missing_ok=True)
    with _quiet(log):
        import torch
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers.gptq import GPTQModifier
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.path, dtype=torch.bfloat16, local_files_only=True
        )
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    targets = {name: module for name, module in linears.items() if name != "lm_head"}
    shapes = {name: (module.out_features, module.in_features) for name, module in targets.items()}
    if problems := recipe.problems(shapes, checkpoint.head_dim):
        raise QuantizeError(f"{recipe.variant} cannot be served for this model: " + "; ".join(problems[:3]))
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise QuantizeError(f"{checkpoint.path}: {name} holds NaN or infinity; the checkpoint is damaged")

    group: dict[str, Any] = {"targets": ["Linear"], "weights": recipe.weights}
    if recipe.activations:
        group["input_activations"] = recipe.activations
    modifier = GPTQModifier(
        config_groups={"group_0": group}, ignore=["lm_head"], kv_cache_scheme=recipe.kv_cache
    )
    data = Dataset.from_list(
        [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in calibration.sequences]
    )
    torch.manual_seed(0)
    with (
        tqdm(total=len(targets), desc=recipe.variant, unit="module", file=sys.stderr) as bar,
        _quiet(log, lambda line: bar.update(line.count("Quantizing 1 module"))),
    ):
        oneshot(
            model=model,
            dataset=data,
            recipe=[modifier],
            num_calibration_samples=len(calibration.sequences),
            max_seq_length=CALIBRATION_LENGTH,
        )
        bits = {name: _bits(module) for name, module in linears.items()}
        model.save_pretrained(out, save_compressed=True)
        load_tokenizer(checkpoint.path).save_pretrained(out)
    wrong = [name for name in targets if bits[name] != recipe.weight_bits]
    if wrong:
        raise QuantizeError(f"{recipe.variant}: {wrong[0]} came out at {bits[wrong[0]]} bits, see {log}")
    return bits


def _bits(module: Any) -> int:
    scheme = getattr(module, "quantization_scheme", None)
    return int(scheme.weights.num_bits) if scheme is not None and scheme.weights is not None else 16


@contextlib.contextmanager
def _quiet(log: Path, on_line: Callable[[str], object] = lambda _: None) -> Iterator[None]:
    """Send the libraries' logging, warnings, bars and prints to a file; ``on_line`` sees each log line."""
    from loguru import logger

    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.remove()
        logger.add(file, level="INFO")
        logger.add(lambda message: (on_line(str(message)), None)[1], level="INFO")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            with contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
                yield
        finally:
            logging.disable(before)
            logger.remove()
            logger.add(sys.stderr, level="WARNING")
