"""libllama, llama.cpp's library, as far as it is used here: vocabularies, logits, quantization.

It comes prebuilt in the package ``llama-cpp-py-sync``, whose bindings are generated from ``llama.h``. What is
built on them here: a model (its files are mapped, not read), its vocabulary, and a context that decodes
several sequences at once and gives all logits of the tokens that are asked for.

>>> with LlamaModel(Path("model.gguf")) as model:
...     context = LlamaContext(model, tokens=512, sequences=1, threads=2)
...     logits = context.decode([Place(token, at, 0, True) for at, token in enumerate(model.tokenize("Hi"))])
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from quantize.export.older_glibc import NEWER, loadable_copies

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PACKAGE = "llama_cpp_py_sync"
KEPT_LINES = 40
"""Lines of what libllama said last, for error messages."""
_WARNING, _ERROR = 3, 4
"""Levels of what it logs."""


class Listener(Protocol):
    """Who hears what libllama says."""

    def __call__(self, line: str) -> None:
        """A line, or a part of one."""

    def close(self) -> None:
        """Nothing more comes."""


class LlamaError(RuntimeError):
    """libllama could not do something; the text shows its own words."""


class GrammarError(LlamaError):
    """A grammar that llama.cpp does not take, or that no token keeps to."""


class Library:
    """The bindings, loaded once. What it logs of errors is kept for messages."""

    def __init__(self) -> None:
        from llama_cpp_py_sync import _version
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

        self.ffi: Any = get_ffi()
        try:
            self.lib: Any = get_lib()
        except RuntimeError as error:
            if NEWER not in str(error):
                raise
            here = Path(_version.__file__).parent
            copies = loadable_copies(here, f"llama.cpp-{_version.__llama_cpp_tag__}")
            self.lib = self.ffi.dlopen(str(copies / "libllama.so"))
        self.build = str(_version.__llama_cpp_tag__)
        """Such as ``b11739``."""
        self.said: list[str] = []

        self._listener: Listener | None = None

        def log(level: int, text: Any, _data: Any) -> None:
            if level not in (_WARNING, _ERROR) and self._listener is None:
                return
            line = self.ffi.string(text).decode(errors="replace").strip()
            if level in (_WARNING, _ERROR):
                self.said.append(line)
                del self.said[:-KEPT_LINES]
            if self._listener is not None:
                self._listener(line)

        self._log = self.ffi.callback("void(enum ggml_log_level, const char *, void *)", log)
        self.lib.llama_log_set(self._log, self.ffi.NULL)
        self.lib.llama_backend_init()

    @contextlib.contextmanager
    def listening(self, listener: Listener) -> Iterator[None]:
        """Tell ``listener`` every line that libllama says inside the block, and close it at the end."""
        self.said.clear()
        self._listener = listener
        try:
            yield
        finally:
            self._listener = None
            listener.close()

    def last_words(self) -> str:
        """The first of the lines that it logged as warnings or errors: later ones only say that it failed."""
        found = [line for line in self.said if line]
        return found[0] if found else "libllama gave no reason"


def is_installed() -> bool:
    """Whether the package is there, without loading it."""
    return importlib.util.find_spec(PACKAGE) is not None


@functools.cache
def library() -> Library:
    """Raises LlamaError where the package is not installed, or has no library for this machine."""
    if not is_installed():
        raise LlamaError("llama.cpp is not installed; install it: pip install 'tiercel[edge]'")
    try:
        return Library()
    except (ImportError, RuntimeError, OSError, ValueError) as error:
        raise LlamaError(f"libllama cannot be loaded ({error}); install llama-cpp-py-sync again") from None


class LlamaModel:
    """A GGUF file as libllama has loaded it. Use as a context manager, or ``close`` it.

    ``only_vocabulary`` loads no weights; ``only_mapped`` leaves them in the file as they are, which shows in
    no time whether all of it loads.
    """

    def __init__(self, path: Path, only_vocabulary: bool = False, only_mapped: bool = False) -> None:
        """Raises LlamaError with libllama's reason."""
        self.path, self._of = path, library()
        ffi, lib = self._of.ffi, self._of.lib
        parameters = lib.llama_model_default_params()
        parameters.n_gpu_layers = 0
        parameters.vocab_only = only_vocabulary
        parameters.use_extra_bufts = not only_mapped  # copies in an order that is faster
        self._of.said.clear()
        self.handle: Any = lib.llama_model_load_from_file(str(path).encode(), parameters)
        if self.handle == ffi.NULL:
            raise LlamaError(f"{path}: llama.cpp cannot load it: {self._of.last_words()}")
        self._vocabulary = lib.llama_model_get_vocab(self.handle)
        self.vocabulary = int(lib.llama_vocab_n_tokens(self._vocabulary))
        """Tokens that it knows."""

    def __enter__(self) -> LlamaModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give its memory back; no context of it may be used any more."""
        if self.handle is not None:
            self._of.lib.llama_model_free(self.handle)
            self.handle = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return int(self._of.lib.llama_model_size(self.handle))

    @property
    def trained_context(self) -> int:
        return int(self._of.lib.llama_model_n_ctx_train(self.handle))

    @property
    def bos(self) -> int:
        """The token that texts begin with, or -1."""
        return int(self._of.lib.llama_vocab_bos(self._vocabulary))

    @property
    def eos(self) -> int:
        return int(self._of.lib.llama_vocab_eos(self._vocabulary))

    def ends(self, token: int) -> bool:
        """Whether an answer ends with the token."""
        return bool(self._of.lib.llama_vocab_is_eog(self._vocabulary, token))

    def chat_template(self) -> str | None:
        found = self._of.lib.llama_model_chat_template(self.handle, self._of.ffi.NULL)
        return None if found == self._of.ffi.NULL else str(self._of.ffi.string(found).decode())

    def description(self) -> str:
        """Such as ``llama 135M Q4_K - Medium``."""
        text = self._of.ffi.new("char[256]")
        self._of.lib.llama_model_desc(self.handle, text, 256)
        return str(self._of.ffi.string(text).decode())

    def tokenize(self, text: str, add_special: bool = False) -> list[int]:
        """Token ids; special tokens in the text are read as such."""
        raw = text.encode()
        room = len(raw) + 8
        found = self._of.ffi.new("llama_token[]", room)
        count = self._of.lib.llama_tokenize(self._vocabulary, raw, len(raw), found, room, add_special, True)
        if count < 0:
            raise LlamaError(f"{self.path}: {len(raw)} bytes of text are too many tokens")
        return list(map(int, found[0:count]))

    def piece(self, token: int, special: bool = False) -> bytes:
        """A token's bytes; with ``special``, those of special tokens as well, which are otherwise none."""
        text = self._of.ffi.new("char[512]")
        size = self._of.lib.llama_token_to_piece(self._vocabulary, token, text, 512, 0, special)
        return bytes(self._of.ffi.buffer(text, size)) if size > 0 else b""

    def grammar(self, text: str) -> Grammar:
        """Raises GrammarError for what is no GBNF grammar."""
        return Grammar(self._of, self._vocabulary, text)


class Grammar:
    """Which tokens may come next, by llama.cpp's grammar sampler."""

    def __init__(self, of: Library, vocabulary: Any, text: str) -> None:
        self._of = of
        made = of.lib.llama_sampler_init_grammar(vocabulary, text.encode(), b"root")
        if made == of.ffi.NULL:
            raise GrammarError(f"llama.cpp does not take the grammar: {of.last_words()}")
        self._sampler = of.ffi.gc(made, of.lib.llama_sampler_free)

    def allowed(self, tokens: Sequence[int]) -> list[bool]:
        """Of each of ``tokens`` whether it may come next."""
        ffi = self._of.ffi
        data = ffi.new("llama_token_data[]", [(token, 0.0, 0.0) for token in tokens])
        array = ffi.new("llama_token_data_array *", {"data": data, "size": len(tokens), "selected": -1})
        self._of.lib.llama_sampler_apply(self._sampler, array)
        return [data[index].logit == 0.0 for index in range(len(tokens))]

    def accept(self, token: int) -> None:
        self._of.lib.llama_sampler_accept(self._sampler, token)


class Place(NamedTuple):
    """One token that is to be decoded."""

    token: int
    position: int
    sequence: int
    logits: bool
    """Whether what comes after it is wanted."""


class LlamaContext:
    """The KV cache of some sequences, of ``tokens`` in all, and the threads that decode. Of one thread at a
    time."""

    def __init__(
        self, model: LlamaModel, tokens: int, sequences: int, threads: int, batch: int = 512
    ) -> None:
        """Raises LlamaError where there is no memory for it."""
        self.model, self.batch, self._of = model, batch, library()
        ffi, lib = self._of.ffi, self._of.lib
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = -(-tokens // 256) * 256
        parameters.n_batch = parameters.n_ubatch = batch
        parameters.n_seq_max = sequences
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.kv_unified = True
        self._of.said.clear()
        made = lib.llama_init_from_model(model.handle, parameters)
        if made == ffi.NULL:
            raise LlamaError(
                f"{model.path}: no context of {tokens} tokens: {self._of.last_words()}; take fewer"
            )
        self._handle = ffi.gc(made, lib.llama_free)
        self._batch = lib.llama_batch_init(batch, 0, 1)

    def close(self) -> None:
        """Give its memory back."""
        self._of.lib.llama_batch_free(self._batch)
        self._of.ffi.release(self._handle)

    def decode(self, places: Sequence[Place]) -> NDArray[np.float32]:
        """Logits (n, vocabulary) after those places that ask for them, in their order.

        At most ``batch`` places. Raises LlamaError, after which the sequences hold what they did before.
        """
        import numpy as np

        ffi, lib, batch = self._of.ffi, self._of.lib, self._batch
        batch.n_tokens = len(places)
        for index, place in enumerate(places):
            batch.token[index], batch.pos[index] = place.token, place.position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, place.sequence
            batch.logits[index] = place.logits
        if status := lib.llama_decode(self._handle, batch):
            why = "its KV cache is full" if status == 1 else self._of.last_words()
            raise LlamaError(f"llama.cpp could not decode {len(places)} tokens: {why}")
        rows = [index for index, place in enumerate(places) if place.logits]
        size = self.model.vocabulary
        found = np.empty((len(rows), size), np.float32)
        for at, index in enumerate(rows):
            values = lib.llama_get_logits_ith(self._handle, index)
            found[at] = np.frombuffer(ffi.buffer(values, 4 * size), np.float32)
        return found

    def forget(self, sequence: int, position: int = 0) -> bool:
        """Of a sequence's cache what lies at ``position`` and after it. False where it cannot go alone, as of
        a state that all tokens before have made: then all is as it was."""
        memory = self._of.lib.llama_get_memory(self._handle)
        return bool(self._of.lib.llama_memory_seq_rm(memory, sequence, position, -1))


def last_logits(model: LlamaModel, tokens: Sequence[int], start: int, threads: int) -> NDArray[np.float32]:
    """Logits (n, vocabulary) of ``tokens[start:]``, each after those before it, in a context of their own."""
    import numpy as np

    context = LlamaContext(model, len(tokens), 1, threads)
    try:
        places = [Place(token, at, 0, at >= start - 1) for at, token in enumerate(tokens[:-1])]
        size = context.batch
        parts = [context.decode(places[at : at + size]) for at in range(0, len(places), size)]
        return np.concatenate(parts)
    finally:
        context.close()
