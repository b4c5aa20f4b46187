"""A decoder model in torch, of which one block at a time is in memory.

The skeleton is transformers' own, on the meta device. Embeddings and norms are mapped from the files, a
block's tensors while it is at work; so the memory that is taken is one block's, and what of the files the
operating system keeps. Hidden states go from block to block for all sequences.

>>> blocks = Blocks(checkpoint, modules)
>>> states = blocks.start(sequences)
>>> for layer in range(len(blocks)):
...     with blocks.loaded(layer):
...         blocks.forward(layer, states)
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.core.checkpoint import Checkpoint, read_header, weight_files
from quantize.core.files import writing
from quantize.core.loading import attention
from quantize.core.modules import Modules
from quantize.make.linears import LinearError, Place, decoder_layers, find_linears, stored_names
from quantize.make.threads import R, T, each_on

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BATCH_TOKENS = 2048
"""Padded tokens of a batch on a processor."""
GPU_BATCH_TOKENS = 16_384
MAPPED_BYTES = 256 << 20
"""Hidden states of more than this lie in files, which the system may drop from memory."""


class Files:
    """Tensors of a checkpoint, mapped from its files and not read before they are used."""

    def __init__(self, directory: Path) -> None:
        self._file_of = {name: file for file in weight_files(directory) for name in read_header(file)}
        self._mapped: dict[Path, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def close(self) -> None:
        """Give back the pages of tensors that nobody holds; what is asked for after it is mapped anew."""
        self._mapped.clear()

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        file = self._file_of[name]
        mapped = self._mapped.get(file)
        if mapped is None:
            mapped = self._mapped[file] = safe_open(file, framework="pt")
        tensor: Tensor = mapped.get_tensor(name)
        return tensor


@dataclass
class Batch:
    """Sequences of like length, padded on the right, which a causal model does not look at."""

    numbers: list[int]
    lengths: list[int]
    hidden: Tensor
    arguments: list[dict[str, Any]]
    """Keyword arguments of every block."""

    @property
    def real(self) -> Tensor:
        """Which of the (sequences, tokens) are not padding, as booleans."""
        import torch

        places = torch.arange(self.hidden.shape[1], device=self.hidden.device)
        return places < torch.tensor(self.lengths, device=self.hidden.device).unsqueeze(1)


@dataclass
class States:
    """Hidden states of all sequences before a block."""

    batches: list[Batch]
    many: bool = False

    def room(self, like: Tensor) -> Tensor:
        """A tensor like ``like`` to keep hidden states in: in memory, or in a file where they are many.

        The file has no name: whatever becomes of the process, nothing of it is left. Its bytes are taken from
        the disk now, since a disk that is full later would end the process without a word. Raises OSError.
        """
        import torch

        if not self.many or like.device.type != "cpu":
            return torch.empty_like(like)
        with tempfile.NamedTemporaryFile(prefix="tiercel-states-") as file:
            with writing(Path(file.name), like.nbytes):
                os.posix_fallocate(file.fileno(), 0, like.nbytes)
            made = torch.from_file(file.name, shared=True, size=like.numel(), dtype=like.dtype)
        return made.view(like.shape)


class Blocks:
    """The skeleton and the files. ``dtype`` is what blocks compute in; the type served by default. ``files``
    may be those of another of the same checkpoint, so that they are mapped once."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        modules: Modules,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        files: Files | None = None,
    ) -> None:
        import torch

        self.device = torch.device(device) if device is not None else best_device()
        self.dtype = dtype or serving_dtype(checkpoint)
        self.files = files or Files(checkpoint.path)
        self.model = skeleton(checkpoint, self.dtype)
        self.layers: Any = decoder_layers(self.model)
        self.linears = modules.linears
        self.places: Mapping[str, Place] = find_linears(self.model, modules.linears)
        mine = next(name for name, one in self.model.named_modules() if one is self.layers)
        self._inside = mine.removesuffix("layers")
        self._on_disk = modules.linears[0].name.partition("layers.")[0]
        self._materialize_outside()

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def decoder(self) -> Any:
        return self.model.get_decoder()

    def tensor(self, name: str) -> Tensor | None:
        """The stored tensor of a parameter of the skeleton; None where it is not stored as such."""
        stored = self.stored(name)
        return None if stored is None else self.files[stored]

    def stored(self, name: str) -> str | None:
        """The name on disk of a parameter of the skeleton; None where it is not stored as such."""
        places = [name]
        if name.startswith(self._inside):
            places.append(self._on_disk + name.removeprefix(self._inside))
        if name.startswith("lm_head"):
            places.append(f"{self._on_disk.removesuffix('model.')}{name}")
        names = (stored for place in places for stored in stored_names(place))
        return next((stored for stored in names if stored in self.files), None)

    def _materialize_outside(self) -> None:
        """Embeddings and norms; the head stays on the meta device until it is asked for."""
        for name, parameter in list(self.model.named_parameters(remove_duplicate=False)):
            if not name.startswith(f"{self._inside}layers.") and not name.startswith("lm_head"):
                stored = self.tensor(name)
                if stored is not None and stored.shape == parameter.shape:
                    put(self.model, name, stored.to(self.device, self.dtype))
        for buffer_name, buffer in list(self.model.named_buffers()):
            parent, _, leaf = buffer_name.rpartition(".")
            self.model.get_submodule(parent)._buffers[leaf] = buffer.to(self.device)

    def head(self) -> Tensor:
        """The (vocabulary, hidden) matrix that makes logits, in ``dtype``."""
        stored = self.tensor("lm_head.weight")
        if stored is None:  # tied
            stored = self.model.get_input_embeddings().weight.data
        return stored.to(self.device, self.dtype)

    @contextlib.contextmanager
    def loaded(self, layer: int, dtype: torch.dtype | None = None) -> Iterator[Any]:
        """The block of that number with its weights, in ``dtype``; afterwards they are gone, with the
        pages of the files."""
        import torch

        block = self.layers[layer]
        kind = dtype or self.dtype
        empty = dict(block.named_parameters())
        experts = {id(place.module) for place in self.places.values() if place.expert is not None}
        try:
            for name, parameter in empty.items():
                stored = self.tensor(f"{self._inside}layers.{layer}.{name}")
                if stored is None:
                    if id(block.get_submodule(name.rpartition(".")[0])) not in experts:
                        raise LinearError(f"no tensor is stored for {name} of block {layer}")
                    stored = torch.empty(parameter.shape, dtype=kind)  # stored one by one, written below
                put(block, name, stored.to(self.device, kind))
            for linear in self.linears:
                place = self.places[linear.name]
                if place.expert is not None and f"layers.{layer}." in linear.name:
                    place.write(self.files[f"{linear.name}.weight"])
            yield block
        finally:
            for name, parameter in empty.items():
                parent, _, leaf = name.rpartition(".")
                block.get_submodule(parent)._parameters[leaf] = parameter
            self.files.close()

    def start(self, sequences: Sequence[Sequence[int]], copies: int = 1, alone: bool = False) -> States:
        """Hidden states before the first block. ``copies`` is how many of them will be kept at once;
        ``alone`` gives every sequence a batch of its own."""
        import torch

        tokens = sum(map(len, sequences))
        hidden = self.model.get_input_embeddings().weight.shape[1]
        large = tokens * hidden * self.dtype.itemsize * copies > MAPPED_BYTES
        states = States([], large)
        lengths = list(map(len, sequences))
        limit = BATCH_TOKENS if self.device.type == "cpu" else GPU_BATCH_TOKENS
        with torch.no_grad():
            # Experts see rows without their places, so that padding could not be told from tokens.
            if alone or any(place.expert is not None for place in self.places.values()):
                limit = 0
            for numbers in batched(lengths, limit):
                width = max(lengths[number] for number in numbers)
                ids = torch.zeros(len(numbers), width, dtype=torch.long)
                for line, number in enumerate(numbers):
                    ids[line, : lengths[number]] = torch.tensor(list(sequences[number]))
                first, arguments = self._outside(ids.to(self.device))
                room = states.room(first)
                room.copy_(first)
                states.batches.append(Batch(numbers, [lengths[n] for n in numbers], room, arguments))
        return states

    def _outside(self, ids: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """What the decoder itself does around its blocks: the first hidden states, and every block's
        arguments (positions, masks), by a forward pass in which blocks only say what they were given."""
        import torch

        seen: list[dict[str, Any]] = []
        first: list[Tensor] = []

        def stub(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if args:
                raise TypeError(f"{type(self.layers[0]).__name__} is called with positional arguments")
            first.append(hidden)
            seen.append(kwargs)
            return hidden

        with self._instead_of_blocks(stub), torch.no_grad():
            self.decoder(input_ids=ids, use_cache=False)
        return first[0], seen

    @contextlib.contextmanager
    def _instead_of_blocks(self, stub: Any) -> Iterator[None]:
        for block in self.layers:
            block.forward = stub
        try:
            yield
        finally:
            for block in self.layers:
                del block.forward

    @contextlib.contextmanager
    def head_only(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """A function from last hidden states (1, tokens, hidden) to logits, as the model makes them: last
        norm, head, and what else its architecture does there."""
        import torch

        head = self.model.get_output_embeddings()
        empty = head.weight
        head.weight = torch.nn.Parameter(self.head(), requires_grad=False)
        current: list[Tensor] = []

        def logits_of(hidden: Tensor) -> Tensor:
            current[:] = [hidden]
            ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
            found: Tensor = self.model(input_ids=ids, use_cache=False).logits
            return found

        try:
            with self._instead_of_blocks(lambda *_args, **_kwargs: current[0]):
                yield logits_of
        finally:
            head.weight = empty

    def forward(self, layer: int, states: States, kv: Any = None) -> None:
        """Take all hidden states through the loaded block; ``kv`` is given keys and values as a cache is."""
        import torch

        def work(batch: Batch) -> None:
            with torch.no_grad():
                batch.hidden.copy_(self.through(layer, batch, batch.hidden, kv))

        self.each(work, states.batches)

    def each(self, work: Callable[[T], R], pieces: Iterable[T]) -> list[R]:
        """``work`` of every piece, in order, side by side where that helps."""
        return each_on(self.device, work, pieces)

    def through(self, layer: int, batch: Batch, hidden: Tensor, kv: Any = None) -> Tensor:
        """The block's output for one batch."""
        arguments = batch.arguments[layer]
        if kv is not None:
            arguments = arguments | {"past_key_values": kv}
        out = self.layers[layer](hidden, **arguments)
        found: Tensor = out[0] if isinstance(out, tuple) else out
        return found


def best_device() -> torch.device:
    """The accelerator if there is one, else the processor."""
    import torch

    found: torch.device | None = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    return found or torch.device("cpu")


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device, or of the machine's memory for the processor.

    What torch keeps for later tensors on an accelerator is given back first.
    """
    import psutil
    import torch

    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])


def making_room() -> int:
    """Bytes that are free where models are computed here: of one GPU, or of the machine's memory."""
    return free_memory(best_device())


def free_room() -> int:
    """Bytes that are free where an engine computes: of all GPUs together, which it may be spread over, or of
    the machine's memory."""
    import torch

    if best_device().type != "cuda":
        return free_memory(torch.device("cpu"))
    return sum(free_memory(torch.device("cuda", number)) for number in range(torch.cuda.device_count()))


def serving_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The type that an engine computes in, as torch has it."""
    import torch

    return torch.float16 if checkpoint.serving_dtype == "F16" else torch.bfloat16


def batched(lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Indices of sequences, by length, in batches of at most ``limit`` padded tokens."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda one: lengths[one]):
        if batch and lengths[number] * (len(batch) + 1) > limit:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The language model without its weights (on the meta device), for inference."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
    config = config.get_text_config()
    config.use_cache = False
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **attention(config))
    return model.eval().requires_grad_(False)


def put(module: Any, name: str, tensor: Tensor) -> None:
    """Let a tensor be the parameter of that name within ``module``; it is not trained."""
    import torch

    parent, _, leaf = name.rpartition(".")
    module.get_submodule(parent)._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)
