"""A bench engine: loads one checkpoint after another in the engine environment and scores tokens.

The planner measures dozens of candidates, and a served engine takes half a minute to start. Here vLLM
is imported once, and every candidate is loaded in a forked child: same engine, same kernels, same KV
cache, without the HTTP server, in about four seconds for a small model. What it returns is exact, over the
whole vocabulary, by the code that served engines have too. A gate still asks the engine that serves.

Needs disk for the reference's final hidden states: tokens x width x 2 bytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from quantize.core.files import no_room, write_whole
from quantize.core.resources import give_back

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ENGINE_SIDE = Path(__file__).with_name("bench_engine.py")
START_TIMEOUT_S = 300.0
WHERE = frozenset(
    {
        "CUDA_DEVICE_ORDER",
        "CUDA_VISIBLE_DEVICES",
        "VLLM_CPU_KVCACHE_SPACE",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
    }
)
"""Of environment and options: where an engine runs and what it may take there, which decides no number."""

Span = tuple[Sequence[int], int]
"""Token ids, and the index of the first that is scored (at least 1)."""


class BenchError(RuntimeError):
    """The bench engine could not do what was asked; the text holds the engine's words."""


@dataclass(frozen=True)
class Scores:
    """Per scored token, all sequences in order."""

    logp: NDArray[np.float64]
    """Natural-log probability of the token that came."""
    kl: NDArray[np.float64]
    """KL(reference || this), nats, over the whole vocabulary; zeros without a reference."""
    top1: NDArray[np.float64]
    """Id of the most likely token."""
    load_s: float
    score_s: float


class Bench:
    """One process of the engine environment. Use as a context manager; one request at a time.

    An engine that shows no sign of life for ``timeout_s`` (it loads, or scores a sequence) is ended.
    ``site`` is the folder of ``score_worker.py``; ``options`` are further ones of vLLM's ``LLM``, such as
    ``{"gpu_memory_utilization": 0.5}``, or ``{"tensor_parallel_size": 2, "distributed_executor_backend":
    "mp"}``.
    """

    def __init__(
        self,
        python: Path,
        log: Path,
        max_model_len: int = 1024,
        env: Mapping[str, str] | None = None,
        *,
        site: Path,
        timeout_s: float = 600.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._python, self._log, self._max_model_len = python, log, max_model_len
        self._env, self._site, self._timeout_s = dict(env or {}), site, timeout_s
        self._options = dict(options or {})
        self._process: subprocess.Popen[str] | None = None
        self.version = ""
        self._folder = Path()
        """Of the engine's side, which removes it when it ends: what both sides leave for each other."""

    def __enter__(self) -> Bench:
        if not self._python.exists():
            raise BenchError(f"no engine environment at {self._python}; run `make setup`")
        self._log.parent.mkdir(parents=True, exist_ok=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        added = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "TORCH_COMPILE_DISABLE": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONWARNINGS": "ignore",
            "PYTHONPATH": str(self._site),
            "TIERCEL_STARTED_BY": str(os.getpid()),
        }
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(self._python), "-P", str(ENGINE_SIDE)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**kept, **added, **self._env},
                start_new_session=True,
            )
        self._stop = weakref.finalize(self, self._process.terminate)
        reply = self._reply()
        self.version, self._folder = str(reply["vllm"]), Path(reply["folder"])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if (process := self._process) is None:
            return
        self._process = None
        if kind is not None:
            process.terminate()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.stdout.close()
        process.wait()
        self._stop.detach()

    @property
    def identity(self) -> str:
        """What decides the numbers besides the checkpoint: the engine's version, environment and options."""
        decides = sorted({**self._env, **self._options}.items())
        return " ".join((self.version, *(f"{name}={value}" for name, value in decides if name not in WHERE)))

    def score(
        self,
        directory: Path,
        spans: Sequence[Span],
        kv: str = "auto",
        reference: Path | None = None,
        save: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Scores:
        """Score ``spans`` with the checkpoint in ``directory``.

        ``save`` keeps its final hidden states, (tokens, width), with which later candidates are compared as
        ``reference``: on the same spans in the same order. Raises BenchError, and NoRoomError.
        """
        import numpy as np

        sequences, out = self._folder / "sequences.json", self._folder / "scores.npz"
        write_whole(sequences, json.dumps([[list(tokens), start] for tokens, start in spans]))
        partial = save.with_name(save.name + ".partial") if save else None
        reply = self._ask(
            "score",
            directory,
            kv,
            env,
            sequences=str(sequences),
            out=str(out),
            reference=str(reference) if reference else None,
            save=str(partial) if partial else None,
        )
        if save and partial:
            partial.rename(save)
        with np.load(out) as columns:
            return Scores(
                logp=columns["logp"],
                kl=columns["kl"],
                top1=columns["top1"],
                load_s=float(reply["load_s"]),
                score_s=float(reply["score_s"]),
            )

    def load_error(
        self, directory: Path, kv: str = "auto", env: Mapping[str, str] | None = None
    ) -> str | None:
        """None when the engine loads the checkpoint and answers, else the engine's words."""
        try:
            self._ask("answers", directory, kv, env)
        except BenchError as error:
            return str(error)
        return None

    def parse(self, cases: Sequence[Mapping[str, Any]]) -> list[list[str]]:
        """Let the engine's code read quantization configurations, without weights.

        A case holds ``config``, ``fused`` (fused name to members), ``modules`` (fused module to weight bits)
        and ``constructs`` (whether the scheme must exist on this machine). Returns sentences per case.
        """
        configs = self._folder / "configs.json"
        write_whole(configs, json.dumps(list(cases)))
        found: list[list[str]] = self._ask("parse", self._folder, "auto", None, configs=str(configs))["found"]
        return found

    def _ask(
        self, work: str, directory: Path, kv: str, env: Mapping[str, str] | None, **more: Any
    ) -> dict[str, Any]:
        if self._process is None or self._process.stdin is None:
            raise BenchError("Bench is used outside of its context")
        request = {
            "work": work,
            "model": str(directory.resolve()),
            "kv": kv,
            "max_model_len": self._max_model_len,
            "options": self._options,
            "env": dict(env or {}),
            "timeout_s": self._timeout_s,
            **more,
        }
        give_back()  # it may be on the card that this process computes on
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        reply = self._reply()
        if full := reply.get("full"):
            raise no_room(Path(full[0]), int(full[1]))
        if error := reply.get("error"):
            raise BenchError(f"{directory}: {error} (log: {self._log})")
        return reply

    def _reply(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BenchError(f"the bench engine ended with status {self._process.wait()}; log: {self._log}")
        reply: dict[str, Any] = json.loads(line)
        return reply
