"""The sizes of a model, from a checkpoint, from a ``config.json`` alone, or from a number of parameters.

>>> shape_of_parameters(parameters_of("70B")).layers
80

Bytes follow from :class:`quantize.core.modules.Modules`, whoever made it: a scheme's are a plan's
(:mod:`quantize.core.plan`), a KV cache's :class:`quantize.core.schemes.KvScheme`'s.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from quantize.core.checkpoint import Checkpoint, CheckpointError
from quantize.core.legality import is_experts
from quantize.core.model_config import TEXT_CONFIGS
from quantize.core.modules import HEAD, NO_LAYER, Group, Linear, Modules, read_modules
from quantize.core.schemes import BF16_BYTES, kv_scheme

LEAST, MOST = 100_000_000, 2_000_000_000_000
"""Parameters from which a shape can be told."""
INNER_MULTIPLE = 256
_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([MBT])", re.IGNORECASE)
_POWERS = {"M": 10**6, "B": 10**9, "T": 10**12}


class ShapeError(ValueError):
    """A model's sizes cannot be told. The text names the value and the fix."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder. ``assumed`` says what was assumed of it, and is empty where its files say all."""

    name: str
    modules: Modules
    layers: int
    hidden: int
    inner: int
    """Width of the MLP; of one expert where there are several."""
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    """The most tokens that it takes."""
    assumed: str = ""

    @property
    def weights(self) -> int:
        """Of all linear modules in blocks: what can be quantized."""
        return sum(group.weights for group in self.modules)

    @property
    def has_experts(self) -> bool:
        return any(is_experts(group) for group in self.modules)

    @property
    def parameters(self) -> int:
        return self.weights + self.modules.other_bytes // BF16_BYTES

    def kv_bytes_per_token(self, kv: str = "auto") -> int:
        """Keys and values of one token over all layers. Raises SchemeError."""
        return kv_scheme(kv).bytes_per_token(self.layers, self.kv_heads, self.head_dim)


@dataclass(frozen=True)
class _Sizes:
    """What a Llama-like model's ``config.json`` says."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int
    tied: bool = False
    head_dim: int = 0
    experts: int = 0

    @property
    def head(self) -> int:
        return self.head_dim or self.hidden // self.heads

    def modules(self) -> Modules:
        """The modules that such a model has, in the groups that an engine fuses."""
        matrix = BF16_BYTES * self.vocabulary * self.hidden
        norms = BF16_BYTES * self.hidden * (2 * self.layers + 1)
        head = Group(HEAD, HEAD, NO_LAYER, (Linear(HEAD, self.vocabulary, self.hidden),))
        groups = tuple(group for layer in range(self.layers) for group in self._block(layer))
        routers = BF16_BYTES * self.layers * self.hidden * self.experts
        return Modules(
            groups,
            other_bytes=matrix * (1 if self.tied else 2) + norms + routers,
            head=None if self.tied else head,
            embedding_bytes=matrix,
        )

    def _block(self, layer: int) -> Iterator[Group]:
        def group(kind: str, *members: tuple[str, int, int]) -> Group:
            before = f"model.layers.{layer}."
            made = (Linear(f"{before}{name}", n, k) for name, n, k in members)
            return Group(f"{before}{kind}", kind, layer, tuple(made))

        q, kv, hidden = self.heads * self.head, self.kv_heads * self.head, self.hidden
        attention = [(f"self_attn.{name}_proj", n, hidden) for name, n in (("q", q), ("k", kv), ("v", kv))]
        yield group("self_attn.qkv_proj", *attention)
        yield group("self_attn.o_proj", ("self_attn.o_proj", hidden, q))
        if not self.experts:
            gate_up = [(f"mlp.{name}_proj", self.inner, hidden) for name in ("gate", "up")]
            yield group("mlp.gate_up_proj", *gate_up)
            yield group("mlp.down_proj", ("mlp.down_proj", hidden, self.inner))
            return
        yield group(
            "mlp.experts",
            *(
                (f"mlp.experts.{number}.{name}", n, k)
                for number in range(self.experts)
                for name, n, k in (
                    ("gate_proj", self.inner, hidden),
                    ("up_proj", self.inner, hidden),
                    ("down_proj", hidden, self.inner),
                )
            ),
        )

    def shape(self, name: str, assumed: str = "") -> Shape:
        return Shape(
            name=name,
            modules=self.modules(),
            layers=self.layers,
            hidden=self.hidden,
            inner=self.inner,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head,
            vocabulary=self.vocabulary,
            context=self.context,
            assumed=assumed,
        )


LLAMAS: Mapping[str, _Sizes] = {
    "SmolLM2 135M": _Sizes(30, 576, 1536, 9, 3, 49152, 8192, tied=True),
    "SmolLM2 360M": _Sizes(32, 960, 2560, 15, 5, 49152, 8192, tied=True),
    "Llama 3.2 1B": _Sizes(16, 2048, 8192, 32, 8, 128256, 131072, tied=True),
    "Llama 3.2 3B": _Sizes(28, 3072, 8192, 24, 8, 128256, 131072, tied=True),
    "Llama 7B": _Sizes(32, 4096, 11008, 32, 32, 32000, 4096),
    "Llama 3.1 8B": _Sizes(32, 4096, 14336, 32, 8, 128256, 131072),
    "Llama 13B": _Sizes(40, 5120, 13824, 40, 40, 32000, 4096),
    "Code Llama 34B": _Sizes(48, 8192, 22016, 64, 8, 32000, 16384),
    "Llama 2 70B": _Sizes(80, 8192, 28672, 64, 8, 32000, 4096),
    "Llama 3.1 405B": _Sizes(126, 16384, 53248, 128, 8, 128256, 131072),
}
"""Published shapes, of which the nearest is taken for a number of parameters."""


def parameters_of(text: str) -> int:
    """``70B``, ``1.5B``, ``360M`` as a number. Raises ShapeError."""
    found = _COUNT.fullmatch(text.strip())
    count = round(float(found[1]) * _POWERS[found[2].upper()]) if found else 0
    if not LEAST <= count <= MOST:
        raise ShapeError(
            f"--parameters {text}: give a number from {LEAST // 10**6}M to {MOST // 10**12}T such as 7B; of "
            "other models give the directory or config.json"
        )
    return count


def shape_of_parameters(count: int) -> Shape:
    """A Llama-like shape of about ``count`` parameters: the nearest published one with the width of its MLP
    changed so that the number comes out (within 2 %)."""
    near, sizes = min(LLAMAS.items(), key=lambda entry: abs(math.log(count / _parameters(entry[1]))))
    per_width = 3 * sizes.hidden * sizes.layers
    without = _parameters(sizes) - per_width * sizes.inner
    step = INNER_MULTIPLE if per_width * INNER_MULTIPLE < 0.02 * count else INNER_MULTIPLE // 8
    inner = max(step, round((count - without) / per_width / step) * step)
    if abs(_parameters(sizes) - count) < 0.005 * count:
        inner = sizes.inner
    made = replace(sizes, inner=inner)
    name = next(f"{count / size:.4g} {unit}" for unit, size in reversed(_POWERS.items()) if count >= size)
    assumed = (
        f"assumed: a Llama-like shape, that of {near}: {made.layers} layers, hidden {made.hidden}, MLP "
        f"{inner}, {made.heads} heads of {made.head}, {made.kv_heads} KV heads, {made.vocabulary:,} words"
        + (", tied embeddings" if made.tied else "")
    )
    return made.shape(f"a model of {name} parameters", assumed)


def _parameters(sizes: _Sizes) -> int:
    attention = sizes.hidden * sizes.head * (2 * sizes.heads + 2 * sizes.kv_heads)
    block = attention + 3 * sizes.hidden * sizes.inner + 2 * sizes.hidden
    words = sizes.vocabulary * sizes.hidden * (1 if sizes.tied else 2)
    return sizes.layers * block + words + sizes.hidden


def shape_of_checkpoint(checkpoint: Checkpoint) -> Shape:
    """The shape of a checkpoint, its modules read from headers. Raises CheckpointError."""
    config = checkpoint.text_config
    if checkpoint.config.get("quantization_config") or checkpoint.quantize_config:
        raise CheckpointError(f"{checkpoint.path} is quantized already; give its original, or register it")
    heads = int(config["num_attention_heads"])
    modules = read_modules(checkpoint)
    return Shape(
        name=str(checkpoint.path),
        modules=modules,
        layers=int(config["num_hidden_layers"]),
        hidden=int(config["hidden_size"]),
        inner=_inner(config) or max(member.out_features for member in modules.linears),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=checkpoint.head_dim,
        vocabulary=int(config["vocab_size"]),
        context=checkpoint.max_model_len,
    )


def shape_of_config(config: Mapping[str, Any], name: str) -> Shape:
    """The shape that a ``config.json`` alone describes, taken for Llama-like. Raises ShapeError."""
    nested: Mapping[str, Any] = next(
        (config[key] for key in TEXT_CONFIGS if isinstance(config.get(key), dict)), {}
    )
    found = {**config, **nested}
    needed = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    if missing := [key for key in needed if not isinstance(found.get(key), int)]:
        raise ShapeError(f"{name}: config.json lacks {', '.join(missing)}; give --parameters instead")
    if found.get("quantization_config"):
        raise ShapeError(f"{name} is quantized already; give the original")
    inner = _inner(found)
    if not inner:
        raise ShapeError(f"{name}: config.json lacks intermediate_size; give --parameters instead")
    heads = int(found["num_attention_heads"])
    sizes = _Sizes(
        layers=int(found["num_hidden_layers"]),
        hidden=int(found["hidden_size"]),
        inner=inner,
        heads=heads,
        kv_heads=int(found.get("num_key_value_heads") or heads),
        vocabulary=int(found["vocab_size"]),
        context=int(found.get("max_position_embeddings") or 4096),
        tied=bool(found.get("tie_word_embeddings", False)),
        head_dim=int(found.get("head_dim") or 0),
        experts=int(found.get("num_experts") or found.get("num_local_experts") or 0),
    )
    return sizes.shape(name, "by config.json alone: matrices as a Llama-like model has them")


def _inner(config: Mapping[str, Any]) -> int:
    """The MLP's width; an expert's where there are experts."""
    experts = config.get("num_experts") or config.get("num_local_experts")
    found = (config.get("moe_intermediate_size") if experts else None) or config.get("intermediate_size")
    return int(found or 0)
