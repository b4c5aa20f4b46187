"""An importance matrix for llama.cpp: E[x²] of every input of every matrix, from our calibration.

llama.cpp's own tool gathers the same sums with its own forward pass; here they are those of the unquantized
model in torch (:mod:`quantize.make.statistics`), as for the method ``imatrix``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from quantize.core.modules import HEAD, read_modules
from quantize.export.gguf_write import Source
from quantize.make.blocks import Blocks
from quantize.make.statistics import first_of, observe

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Importance = dict[str, "NDArray[np.float32]"]
"""llama.cpp's name of a matrix to E[x²] of its inputs, (K,)."""


def importance_of(source: Source, sequences: Sequence[Sequence[int]]) -> Importance:
    """Of every matrix inside the blocks, over the calibration ``sequences``; one block at a time."""
    modules = read_modules(source.checkpoint)
    theirs = {name: new for new, name in source.names.items()}
    groups = [group for group in modules if group.kind != HEAD]
    blocks, made = Blocks(source.checkpoint, modules), Importance()
    states = blocks.start(sequences)
    for layer in tqdm(range(len(blocks)), desc="importance", unit="block", file=sys.stderr):
        mine = [group for group in groups if group.layer == layer]
        with blocks.loaded(layer):
            found = observe(blocks, layer, states, mine, full=())
        for group in mine:
            for member in group.members:
                inputs = found.inputs.get(first_of(group, member.name))
                if inputs is not None:
                    made[theirs[f"{member.name}.weight"]] = inputs.importance.float().cpu().numpy().copy()
    return made
