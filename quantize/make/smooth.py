"""Scales of input channels that make 8-bit inputs lose least, folded into the model.

A channel j of what goes into a matrix W is divided by s_j and column j of W multiplied by it, so that the
product stays what it was. Inputs are rounded with one range per token and weights with one per row (INT8,
errors uniform within a step), so that the expected squared error of the outputs is, but for a common factor,

    J(s) = mean_t max_j(x_tj / s_j)² · Σ_j s_j² |w_j|²  +  Σ_r max_j(w_rj s_j)² · Σ_j E[x_j²] / s_j²

with w_j the columns and r the rows of all matrices that share the input. SmoothQuant (arXiv:2211.10438) sets
s_j = (max_t |x_tj|)^½ / (max_r |w_rj|)^½ and has no such measure; here that is where Adam on log s starts.

The scales cost nothing when serving, for 1/s goes into what makes the inputs: the norm before query, key and
value and before gate and up; the rows of up before down, where the activation does not touch them; the rows
of value before output, with one scale for the query heads that share a head of values. A norm's scales are
those that its stored 16-bit weights give exactly. Which of these a model has is in :func:`folding`; experts,
and what is not exact, are left as they are.

Scales of one block, as they are kept, are tensors by name, float32 but for norms:

    <linear>.columns (K,)    s of its inputs
    <linear>.rows    (N,)    s of what its outputs go into: its rows and its bias are divided by it
    <norm>.weight            the weights that take the place of the norm's, in the type that is served
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Union

from quantize.core.checkpoint import Checkpoint
from quantize.core.files import READ_ONLY, writing
from quantize.core.modules import HEAD, Group, Linear, Modules
from quantize.make.threads import each_on

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantize.make.blocks import Files

Scales = Mapping[str, "Tensor"]
Stored = Union["Files", Mapping[str, "Tensor"]]
"""A checkpoint's tensors by name."""
SAMPLED_TOKENS = 16_384
"""Calibration tokens that rows are taken from; with 2,048, a dozen conversations, a real model lost more."""
ROWS = 256
"""Rows of inputs that are kept, to take the largest of a token from."""
WEIGHT_ROWS = 256
"""Rows of weights whose largest entry is looked for; the others are taken to be like them."""
STEPS, RATE = 50, 0.06
QKV, OUT, GATE_UP, DOWN = "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"


@dataclass(frozen=True)
class Folding:
    """Where an architecture's scales go. A norm of None: others than these matrices read what it makes."""

    attention_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    offset: float = 0.0
    """Added to the stored weights of norms when they are used."""
    gated: bool = True
    """Whether down reads activation(gate) · up, which is linear in up."""


NOWHERE = Folding(None, None, gated=False)
_LIKE_LLAMA = (
    *("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM"),
    *("Qwen3MoeForCausalLM", "MixtralForCausalLM", "Ernie4_5ForCausalLM", "Glm4ForCausalLM"),
    "Mistral3ForConditionalGeneration",
)
_GEMMA = Folding(mlp_norm="pre_feedforward_layernorm", offset=1.0)
_FOLDINGS: Mapping[str, Folding] = {
    **dict.fromkeys(_LIKE_LLAMA, Folding()),
    "ArceeForCausalLM": Folding(gated=False),  # squares what up gives
    "GemmaForCausalLM": Folding(offset=1.0),
    **dict.fromkeys(("Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"), _GEMMA),
    # One norm before attention and MLP alike; norms behind them instead of before them.
    **dict.fromkeys(("CohereForCausalLM", "Cohere2ForCausalLM", "Exaone4ForCausalLM"), Folding(None, None)),
}


def folding(config: Mapping[str, Any]) -> Folding:
    """Where the scales of a ``config.json``'s architecture go; nowhere where that is not known."""
    named = config.get("architectures") or ["none"]
    return _FOLDINGS.get(str(named[0]), NOWHERE)


def smoothable(config: Mapping[str, Any], modules: Modules, layer: int) -> list[Group]:
    """The groups of a block whose inputs can be scaled exactly."""
    where = folding(config)
    known = where != NOWHERE
    exact = {
        QKV: where.attention_norm is not None,
        GATE_UP: where.mlp_norm is not None,
        OUT: known,
        DOWN: known and where.gated,
    }
    mine = [group for group in modules if group.layer == layer]
    names = {group.name for group in mine}
    return [g for g in mine if exact.get(g.kind, False) and (_maker(g) is None or _maker(g) in names)]


def unsmoothed(config: Mapping[str, Any], modules: Modules) -> list[str]:
    """Kinds of groups that stay as they are, for a person to know."""
    kinds = {group.kind for group in modules if group.kind != HEAD}
    made = {group.kind for layer in range(modules.layers) for group in smoothable(config, modules, layer)}
    return sorted(kinds - made)


def _maker(group: Group) -> str | None:
    """The group whose rows make the inputs of ``group``; None where a norm does."""
    made_by = {OUT: QKV, DOWN: GATE_UP}.get(group.kind)
    return None if made_by is None else group.name.removesuffix(group.kind) + made_by


class Sampled(NamedTuple):
    """Of one sequence: ``rows`` are the places whose inputs are kept, ``begin`` is the first of those that
    may be."""

    begin: int
    rows: Sequence[int]


def places(sequences: Sequence[Sequence[int]]) -> dict[int, Sampled]:
    """Which rows of inputs are kept, by a sequence's number.

    Never the first, which holds a token that attention rests on, with inputs a hundred times those of others;
    and of what sequences have in common in front, as one system message, what the first of them has: a few
    hundred tokens that come again and again would else be all that the scales are for.
    """
    begins = [max(1, begin) for begin in _unlike(sequences)]
    new = [max(0, len(sequence) - begin) for sequence, begin in zip(sequences, begins, strict=True)]
    step = max(1, sum(new) // SAMPLED_TOKENS)
    chosen = [number for number, count in enumerate(new) if count][::step]
    every = max(1, sum(new[number] for number in chosen) // ROWS)
    found: dict[int, Sampled] = {}
    at = 0
    for number in chosen:
        rows = range(begins[number] + (-at) % every, len(sequences[number]), every)
        if rows:
            found[number] = Sampled(begins[number], rows)
        at += new[number]
    return found


def _unlike(sequences: Sequence[Sequence[int]]) -> list[int]:
    """From which place on each sequence begins otherwise than all before it."""
    seen: set[int] = set()
    begins = []
    for sequence in sequences:
        prefix, prefixes = 0, []
        for token in sequence:
            prefix = hash((prefix, token))
            prefixes.append(prefix)
        begins.append(next((at for at, one in enumerate(prefixes) if one not in seen), len(sequence)))
        seen.update(prefixes)
    return begins


def block_scales(
    checkpoint: Checkpoint,
    groups: Sequence[Group],
    rows: Mapping[str, Tensor],
    energy: Mapping[str, Tensor],
    tensors: Stored,
    stored: torch.dtype,
) -> dict[str, Tensor]:
    """Scales of one block, see the module's text.

    ``groups`` are the block's smoothable ones, ``rows`` (tokens, K) float32 what went into the first linear
    of each, ``energy`` (K,) their E[x²]. ``stored`` is the type of norms in the variant.
    """
    config, text = checkpoint.config, checkpoint.text_config
    queries = int(text["num_attention_heads"])
    heads = queries, int(text.get("num_key_value_heads") or queries)

    def of(group: Group) -> Tensor:
        inputs = rows[group.members[0].name]
        weights = [tensors[f"{member.name}.weight"].to(inputs.device).float() for member in group.members]
        tied = heads if group.kind == OUT else None
        return best_scales(inputs, energy[group.members[0].name], weights, tied)

    found: dict[str, Tensor] = {}
    made = each_on(next(iter(rows.values())).device, of, groups) if groups else []
    for group, scale in zip(groups, made, strict=True):
        if _maker(group) is None:
            norm, scale = _folded_norm(config, group, scale, tensors, stored)
            found |= norm
        else:
            found |= _rows(group, scale, heads, tensors)
        found |= {f"{member.name}.columns": scale for member in group.members}
    return {name: tensor.cpu().clone() for name, tensor in found.items()}


def _folded_norm(
    config: Mapping[str, Any], group: Group, scale: Tensor, tensors: Stored, stored: torch.dtype
) -> tuple[dict[str, Tensor], Tensor]:
    """The norm's new weights, and the scales that they give exactly."""
    import torch

    where = folding(config)
    leaf = where.attention_norm if group.kind == QKV else where.mlp_norm
    name = f"{group.name.removesuffix(group.kind)}{leaf}.weight"
    before = tensors[name].float().to(scale.device) + where.offset
    weights = (before / scale - where.offset).to(stored)
    exact = before / (weights.float() + where.offset)
    usable = torch.isfinite(exact) & (exact > 0)
    weights = torch.where(usable, weights, tensors[name].to(scale.device, stored))
    return {name: weights}, torch.where(usable, exact, 1.0)


def _rows(group: Group, scale: Tensor, heads: tuple[int, int], tensors: Stored) -> dict[str, Tensor]:
    """The scales of the rows that make what ``scale`` (K,) is of; ones, where a fused matrix makes more."""
    import torch

    prefix = group.name.removesuffix(group.kind)
    own, fused = ("self_attn.v_proj", QKV) if group.kind == OUT else ("mlp.up_proj", GATE_UP)
    name = prefix + (own if f"{prefix}{own}.weight" in tensors else fused)
    if group.kind == OUT:
        scale = scale.reshape(heads[1], heads[0] // heads[1], -1)[:, 0].reshape(-1)
    ones = torch.ones(tensors[f"{name}.weight"].shape[0] - len(scale), device=scale.device)
    return {f"{name}.rows": torch.cat([ones, scale])}


def best_scales(
    rows: Tensor, energy: Tensor, weights: Sequence[Tensor], heads: tuple[int, int] | None = None
) -> Tensor:
    """The s (K,) of least J for inputs ``rows`` (T, K), E[x²] ``energy`` (K,), and the (N, K) ``weights``.

    With ``heads`` (of queries, of values) channels of query heads that share a head of values have one scale.
    Ones, where nothing is better than no scales.
    """
    import torch

    error = _Error(rows, energy, weights)
    start = 0.5 * (error.most_input.log() - error.most_weight.log())
    shape = (heads[1], heads[0] // heads[1], -1) if heads else (1, 1, -1)
    p = start.reshape(shape).mean(1, keepdim=True)
    p -= p.mean()

    def spread(tied: Tensor) -> Tensor:
        return tied.expand(shape[0], shape[1], tied.shape[2]).reshape(-1)

    best, least = torch.zeros_like(p), error(spread(torch.zeros_like(p)))[0]
    mean, square = torch.zeros_like(p), torch.zeros_like(p)
    for step in range(1, STEPS + 2):
        value, slope = error(spread(p))
        if value < least:
            best, least = p.clone(), value
        slope = slope.reshape(shape).sum(1, keepdim=True)
        mean.lerp_(slope, 0.1)
        square.lerp_(slope.square(), 0.001)
        rate = RATE / (1 - 0.9**step)
        p = p - rate * mean / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    return spread(best).exp()


class _Error:
    """log J, and its gradient with respect to log s."""

    def __init__(self, rows: Tensor, energy: Tensor, weights: Sequence[Tensor]) -> None:
        import torch

        self.inputs, self.energy = rows.abs(), energy
        self.columns = sum((w.square().sum(0) for w in weights), torch.zeros_like(energy))
        count = sum(len(w) for w in weights)
        step = max(1, count // WEIGHT_ROWS)
        self.weights = torch.cat([w[::step].abs() for w in weights])
        self.more = count / len(self.weights)
        self.most_input = self.inputs.amax(0).clamp_min(1e-5)
        self.most_weight = torch.stack([w.abs().amax(0) for w in weights]).amax(0).clamp_min(1e-5)

    def __call__(self, log_scale: Tensor) -> tuple[float, Tensor]:

        scale = log_scale.exp()
        square = scale.square()
        top, at = (self.inputs / scale).max(-1)
        high, where = (self.weights * scale).max(-1)
        top, high = top.square(), high.square() * self.more
        by_column, by_input = square * self.columns, self.energy / square
        of_inputs, of_weights = top.mean(), high.sum()
        columns, inputs = by_column.sum(), by_input.sum()
        value = of_inputs * columns + of_weights * inputs
        slope = of_inputs * by_column - of_weights * by_input
        slope.index_add_(0, at, top * (-columns / len(top)))
        slope.index_add_(0, where, high * inputs)
        return float(value.log()), slope * (2 / value)


def folded(name: str, tensor: Tensor, scales: Scales) -> Tensor:
    """A tensor of the checkpoint as the scaled model has it; the tensor itself where it stays as it is.

    Weights and biases come in float32, norms in the type that is served.
    """
    module, _, leaf = name.rpartition(".")
    columns, rows = scales.get(f"{module}.columns"), scales.get(f"{module}.rows")
    if leaf == "bias":
        return tensor if rows is None else tensor.float() / rows.to(tensor.device)
    if leaf == "weight" and name in scales:
        return scales[name]
    if columns is None and rows is None:
        return tensor
    found = tensor.float()
    if columns is not None:
        found = found * columns.to(found.device)
    return found if rows is None else found / rows.to(found.device).unsqueeze(1)


def unfolded(linear: Linear, weight: Tensor, scales: Scales) -> Tensor:
    """The float32 (N, K) weight of a scaled model's linear, as it would stand in the original model."""
    columns, rows = scales.get(f"{linear.name}.columns"), scales.get(f"{linear.name}.rows")
    if rows is not None:
        weight = weight.float() * rows.to(weight.device).unsqueeze(1)
    return weight if columns is None else weight.float() / columns.to(weight.device)


class ScaleStore:
    """Scales of every block, a file each in one directory; a block that is there stays as it is."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._read: dict[int, dict[str, Tensor]] = {}

    def _file(self, layer: int) -> Path:
        return self.directory / f"{layer}.safetensors"

    def missing(self, layers: int) -> set[int]:
        """Blocks whose scales are not there."""
        return {layer for layer in range(layers) if not self._file(layer).exists()}

    def of(self, layer: int) -> Scales:
        """Scales of a block by tensor name. Raises FileNotFoundError where they are not there."""
        from safetensors.torch import load_file

        if layer not in self._read:
            self._read[layer] = load_file(self._file(layer))
        return self._read[layer]

    def keep(self, layer: int, scales: Scales) -> None:
        """Write a block's scales."""
        save_whole(scales, self._file(layer))

    def everything(self, layers: int) -> dict[str, Tensor]:
        """The scales of all blocks."""
        return {name: scale for layer in range(layers) for name, scale in self.of(layer).items()}


def save_whole(tensors: Mapping[str, Tensor], target: Path) -> None:
    """Write a safetensors file that is there whole or not at all."""
    from safetensors.torch import save_file

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".partial-{target.name}")
    partial.unlink(missing_ok=True)  # of a killed run, and read-only
    with writing(target, sum(tensor.nbytes for tensor in tensors.values())):
        try:
            whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(whole, partial, {"format": "pt"})
            partial.chmod(READ_ONLY)
            partial.rename(target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
