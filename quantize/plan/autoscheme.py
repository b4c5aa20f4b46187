"""AutoRound's AutoScheme: which modules it gives 8 bits at an average of so many bits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantize.core.files import write_whole
from quantize.core.modules import Modules
from quantize.make.calibration import load_tokenizer
from quantize.make.compress import quiet

OPTIONS = ("W4A16", "INT8_W8A8")
SAMPLES, LENGTH = 32, 64


def assign(
    model_dir: Path,
    modules: Modules,
    averages: Sequence[float],
    work: Path,
    sequences: Sequence[Sequence[int]],
) -> dict[float, dict[str, int]]:
    """Bits (4 or 8) of every module group, by average bits; fused groups are given as its shared layers.

    ``sequences`` are the token ids that it measures on; what it found is kept in ``work``.
    """
    kept = work / "autoscheme.json"
    known: dict[float, dict[str, int]] = {}
    if kept.exists():
        known = {float(bits): found for bits, found in json.loads(kept.read_text(encoding="utf-8")).items()}
    missing = [bits for bits in averages if bits not in known]
    if missing:
        work.mkdir(parents=True, exist_ok=True)
        with quiet(work / "autoscheme.log"):
            known |= _assign(model_dir, modules, missing, work, sequences)
        write_whole(kept, json.dumps(known))
    return known


def _assign(
    model_dir: Path,
    modules: Modules,
    averages: Sequence[float],
    work: Path,
    sequences: Sequence[Sequence[int]],
) -> dict[float, dict[str, int]]:
    import torch
    from auto_round.auto_scheme.gen_auto_scheme import (  # type: ignore[import-untyped]
        AutoScheme,
        GenScheme,
    )
    from transformers import AutoModelForCausalLM

    tokenizer: Any = load_tokenizer(model_dir)
    data = work / "autoscheme-data.json"
    data.write_text(
        json.dumps([{"text": tokenizer.decode(list(one))} for one in sequences]), encoding="utf-8"
    )
    found = {}
    for average in averages:
        model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
        wanted = AutoScheme(
            avg_bits=average,
            options=OPTIONS,
            shared_layers=[[m.name for m in group.members] for group in modules if len(group.members) > 1],
            nsamples=SAMPLES,
            seqlen=LENGTH,
            batch_size=4,
            enable_torch_compile=False,
        )
        names = [linear.name for linear in modules.linears]
        made = GenScheme(wanted, model, names, {}, str(data), tokenizer=tokenizer, enable_torch_compile=False)
        layers = made.get_layer_config()
        found[average] = {
            group.name: max(int(layers[member.name]["bits"]) for member in group.members) for group in modules
        }
    return found
