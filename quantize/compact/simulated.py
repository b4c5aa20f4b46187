"""What a quantized checkpoint stands for, as an ordinary one in 16 bits: to see what it loses where no engine
serves its scheme. Inputs of linear modules and the KV cache are not rounded in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from quantize.core.checkpoint import Checkpoint, copy_companions
from quantize.core.dequantize import linear_weight
from quantize.core.files import write_whole
from quantize.core.modules import Modules
from quantize.core.plan import Plan
from quantize.core.schemes import scheme
from quantize.core.tensors import read_file_parts, read_parts, write_shards
from quantize.make.blocks import serving_dtype
from quantize.make.kv_scales import KV_SCALES
from quantize.make.smooth import save_whole
from quantize.train.adapters import changes


def write_simulated(
    checkpoint: Checkpoint,
    modules: Modules,
    plan: Plan,
    quantized: Path,
    out: Path,
    adapter: Path | None = None,
) -> None:
    """Write what ``quantized``, made of ``checkpoint`` by ``plan``, stands for into ``out``, which is written
    over; with an ``adapter`` its product is added. Each number is rounded once."""
    stored, added = read_parts(quantized), {}
    if adapter is not None:
        added = {change.module: change for change in changes(adapter)}
    linears = tuple(f"{member.name}." for group in modules for member in group.members)
    parts = {
        name: part
        for name, part in stored.items()
        if not name.endswith(KV_SCALES) and (not name.startswith(linears) or name.endswith(".bias"))
    }
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for group in modules:
        made = {}
        for member in group.members:
            weight = linear_weight(stored, member.name, scheme(plan.groups[group.name]))
            if member.name in added:
                weight = weight + added[member.name].added()
            made[f"{member.name}.weight"] = weight.to(serving_dtype(checkpoint))
        file = out / ".groups" / f"{group.name}.safetensors"
        save_whole(made, file)
        parts |= read_file_parts(file)
    write_shards(parts, out)
    shutil.rmtree(out / ".groups")
    config = {name: value for name, value in checkpoint.config.items() if name != "torch_dtype"}
    config["dtype"] = "float16" if checkpoint.serving_dtype == "F16" else "bfloat16"
    write_whole(out / "config.json", json.dumps(config, indent=2) + "\n")
    copy_companions(checkpoint, out)
