"""AutoRound's AutoScheme: which scheme it gives each module at an average of so many bits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantize.core.files import write_whole
from quantize.core.modules import Modules
from quantize.core.schemes import scheme
from quantize.make.calibration import load_tokenizer
from quantize.make.compress import quiet

SAMPLES, LENGTH = 32, 64


class UnreachableError(ValueError):
    """No mixture of the schemes has the average that was asked for."""


def assign(
    model_dir: Path,
    modules: Modules,
    options: Sequence[str],
    average: float,
    work: Path,
    sequences: Sequence[Sequence[int]],
) -> dict[str, str]:
    """The scheme, of ``options``, of every module group at so many bits per weight on average.

    Fused groups are given as its shared layers. ``sequences`` are the token ids that it measures on; what it
    found is kept in ``work``. Raises UnreachableError.
    """
    kept = work / "autoscheme.json"
    known: dict[str, dict[str, str]] = {}
    if kept.exists():
        known = json.loads(kept.read_text(encoding="utf-8"))
    key = " ".join((f"{average:g}", *options))
    if key not in known:
        work.mkdir(parents=True, exist_ok=True)
        with quiet(work / "autoscheme.log"):
            known[key] = _assign(model_dir, modules, options, average, work, sequences)
        write_whole(kept, json.dumps(known))
    return known[key]


def described(name: str) -> dict[str, Any]:
    """A scheme of integers in AutoRound's words. Raises ValueError for another one."""
    how = scheme(name)
    if how.weights is None or how.weights.kind != "int":
        raise ValueError(f"{name}: AutoScheme is given schemes of integers alone")
    found: dict[str, Any] = {
        "bits": how.weights.bits,
        "group_size": how.weights.group_size or -1,
        "sym": how.weights.symmetric,
        "data_type": "int",
        "act_bits": how.activation_bits,
    }
    if how.activations is not None:
        found |= {"act_group_size": -1, "act_data_type": "int", "act_dynamic": True}
        found["act_sym"] = how.activations.symmetric
    return found


def _assign(
    model_dir: Path,
    modules: Modules,
    options: Sequence[str],
    average: float,
    work: Path,
    sequences: Sequence[Sequence[int]],
) -> dict[str, str]:
    import torch
    from auto_round.auto_scheme.gen_auto_scheme import (  # type: ignore[import-untyped]
        AutoScheme,
        GenScheme,
    )
    from auto_round.schemes import QuantizationScheme  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM

    tokenizer: Any = load_tokenizer(model_dir)
    data = work / "autoscheme-data.json"
    data.write_text(
        json.dumps([{"text": tokenizer.decode(list(one))} for one in sequences]), encoding="utf-8"
    )
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    wanted = AutoScheme(
        avg_bits=average,
        options=[QuantizationScheme.from_dict(described(name)) for name in options],
        shared_layers=[[m.name for m in group.members] for group in modules if len(group.members) > 1],
        nsamples=SAMPLES,
        seqlen=LENGTH,
        batch_size=4,
        enable_torch_compile=False,
    )
    names = [linear.name for linear in modules.linears]
    try:
        made = GenScheme(wanted, model, names, {}, str(data), tokenizer=tokenizer, enable_torch_compile=False)
    except ValueError as error:
        if "avg_bits" not in str(error):
            raise
        raise UnreachableError(f"no mixture of {', '.join(options)} has {average:g} bits") from error
    layers = made.get_layer_config()
    by_layout = {layout(described(name)): name for name in options}
    return {group.name: by_layout[layout(layers[group.members[0].name])] for group in modules}


def layout(settings: Mapping[str, Any]) -> tuple[int, int, bool]:
    """Bits, group size and symmetry of AutoRound's settings of a layer."""
    return int(settings["bits"]), int(settings["group_size"]), bool(settings["sym"])
