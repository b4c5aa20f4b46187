"""The engine's side of :mod:`quantize.evaluate.bench`; run by the interpreter of the engine environment.

Reads requests as JSON lines on standard input and answers each with one JSON line. vLLM is imported
once; every request is served by a forked child, so that an engine that aborts takes nothing with it
and all its memory is given back. Of this project it imports what is made for engines alone.

Figures come from the worker extension that served engines have too (``score_worker.py`` in the engine's
site, which is on the path): exact over the whole vocabulary, compared with the final hidden states that were
kept of the reference. One sequence is in the engine at a time, so that the numbers do not depend on what
shares its batch.

When the process that asks ends, however that happens, this one is sent SIGTERM, and a child when this one
does (``sitecustomize.py``); what the engine and both sides leave for each other is in a folder that goes
with it.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import uuid
from types import FrameType
from typing import Any

Request = dict[str, Any]


class FullError(OSError):
    """``size`` bytes do not fit onto the disk of ``path``."""

    def __init__(self, path: str, size: int) -> None:
        super().__init__(f"{path}: the disk has no room for {size} bytes")
        self.path, self.size = path, size


LAST_WORDS = 600
FULL = (errno.ENOSPC, errno.EDQUOT)
FOLDER = "tiercel-bench-"


def load(request: Request) -> Any:
    """A vLLM engine in this process, with the checkpoint's own quantization."""
    from vllm import LLM

    options = {
        "max_model_len": request["max_model_len"],
        "max_num_batched_tokens": request["max_model_len"],
        "max_num_seqs": 8,
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
        **request["options"],
    }
    return LLM(
        model=request["model"],
        kv_cache_dtype=request["kv"],
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
        seed=0,
        worker_extension_cls="score_worker.ScoreWorker",
        **options,
    )


def described(llm: Any) -> dict[str, Any]:
    """What the workers say of hidden states and head. Raises RuntimeError with the reason where they cannot
    score."""
    ranks: list[dict[str, Any]] = llm.collective_rpc("tiercel_describe")
    if ranks[0]["refusal"]:
        raise RuntimeError(ranks[0]["refusal"])
    return next(one for one in ranks if one["head"])


def figures(
    llm: Any,
    tokens: list[int],
    start: int,
    reference: bytes | None = None,
    keep: bool = False,
    loaded_head: bool = False,
) -> dict[str, Any]:
    """``came``, ``top1`` and, with what is asked for, ``kl`` and ``hidden`` of ``tokens[start:]``, as bytes
    (:meth:`score_worker.Watched.result`). Raises RuntimeError."""
    from score_worker import disagreement  # type: ignore[import-not-found]
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    key, engine, drawn = f"tiercel-{uuid.uuid4().hex}", llm.llm_engine, []
    wanted = SamplingParams(
        max_tokens=1, temperature=0, logprobs=0, detokenize=False, skip_reading_prefix_cache=True
    )
    llm.collective_rpc("tiercel_begin", args=(key, start, tokens, reference, keep, loaded_head))
    try:
        engine.add_request(key, TokensPrompt(prompt_token_ids=tokens), wanted)
        while engine.has_unfinished_requests():
            for output in engine.step():
                ids, values = output.outputs[0].token_ids, output.outputs[0].logprobs or ()
                drawn += [(token, row[token].logprob) for token, row in zip(ids, values, strict=False)]
    finally:
        ranks = llm.collective_rpc("tiercel_end", args=(key,))
    found: list[dict[str, Any]] = [one for one in ranks if one is not None]
    problem = next((one["error"] for one in found if "error" in one), "")
    if problem := problem or disagreement(found, drawn):
        raise RuntimeError(problem)
    return found[0]


def score(request: Request) -> dict[str, Any]:
    """Score sequences; with ``reference``, compare with what :func:`score` had saved there."""
    import numpy as np

    with open(request["sequences"], encoding="utf-8") as file:
        sequences: list[tuple[list[int], int]] = json.load(file)
    began = time.monotonic()
    llm = load(request)
    loaded = time.monotonic()
    count = sum(len(tokens) - start for tokens, start in sequences)
    columns: dict[str, Any] = {name: np.zeros(count, np.float64) for name in ("logp", "kl", "top1")}
    about = described(llm)
    about = {name: about[name] for name in ("width", "dtype", "head")} | {"spans": _digest(sequences)}
    reference, other_head = None, False
    if request["reference"]:
        reference, other_head = read_reference(llm, request["reference"], about)
    saved, at = [], 0
    for tokens, start in sequences:
        end = at + len(tokens) - start
        before = None if reference is None else reference[at:end].tobytes()
        found = figures(llm, tokens, start, before, bool(request["save"]), other_head)
        signal.alarm(int(request["timeout_s"]))  # it is alive, however busy the machine is
        columns["logp"][at:end] = np.frombuffer(found["came"], "<f8")
        columns["top1"][at:end] = np.frombuffer(found["top1"], "<i4")
        if before is not None:
            columns["kl"][at:end] = np.frombuffer(found["kl"], "<f8")
        if request["save"]:
            saved.append(np.frombuffer(found["hidden"], np.uint8).reshape(end - at, -1))
        at = end
    if request["save"]:
        kept = json.dumps({**about, "model": request["model"]})
        write_arrays(request["save"], hidden=np.concatenate(saved), about=np.array(kept))
    write_arrays(request["out"], **columns)
    return {"tokens": count, "load_s": loaded - began, "score_s": time.monotonic() - loaded}


def write_arrays(path: str, **arrays: Any) -> None:
    """An ``.npz`` file that is there whole or not at all. Raises OSError, FullError where it does not fit."""
    import numpy as np

    try:
        with open(path, "wb") as out:
            np.savez(out, **arrays)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(path)
        if error.errno not in FULL:
            raise
        raise FullError(path, sum(one.nbytes for one in arrays.values())) from error


def read_reference(llm: Any, path: str, about: dict[str, Any]) -> tuple[Any, bool]:
    """(tokens, bytes of a hidden state), of which ``about`` must be true, and whether the reference's head is
    another: it is loaded then. Raises RuntimeError."""
    import numpy as np

    with np.load(path) as kept:
        theirs = json.loads(str(kept["about"]))
        if other := theirs["head"] != about["head"]:
            heads = llm.collective_rpc("tiercel_load_head", args=(theirs["model"],))
            about = {**about, "head": next(filter(None, heads), "")}
        if wrong := [name for name in about if theirs.get(name) != about[name]]:
            raise RuntimeError(
                f"{path} is of other {' and '.join(wrong)}: a variant is compared with the reference on the "
                "same spans"
            )
        return kept["hidden"], other


def _digest(sequences: list[tuple[list[int], int]]) -> str:
    return hashlib.sha256(json.dumps(sequences).encode()).hexdigest()[:32]


def answers(request: Request) -> dict[str, Any]:
    """Load the checkpoint and let it answer a few random prompts, short and long."""
    llm = load(request)
    import numpy as np

    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, vocabulary, size=size).tolist() for size in (1, 3, 40)]
    for prompt in prompts[1:]:
        if not np.isfinite(np.frombuffer(figures(llm, prompt, 1)["came"], "<f8")).all():
            raise RuntimeError("the engine answered with log-probabilities that are not finite")
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    parameters = SamplingParams(max_tokens=4, min_tokens=4, temperature=0, detokenize=False)
    for prompt in prompts:
        (answer,) = llm.generate([TokensPrompt(prompt_token_ids=prompt)], parameters, use_tqdm=False)
        if len(answer.outputs[0].token_ids) != 4:
            raise RuntimeError("the engine did not generate four tokens")
    return {}


def parse(request: Request) -> dict[str, Any]:
    """Let the engine's own code read configurations: which scheme does it find for every module?

    Loads no weights. Returns, per configuration, sentences on what it cannot read or reads otherwise.
    """
    import torch
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    with open(request["configs"], encoding="utf-8") as file:
        cases: list[Request] = json.load(file)
    linear, found = torch.nn.Linear(1, 1), []
    for case in cases:
        wrong = []
        try:
            config = CompressedTensorsConfig.from_config(case["config"])
            config.packed_modules_mapping = case["fused"]
            for name, bits in case["modules"].items():
                read = config.get_scheme_dict(linear, name)
                if (read["weights"].num_bits if read else 16) != bits:
                    wrong.append(f"{name}: read as {read}, not {bits} bits")
                if read and case["constructs"]:
                    config.get_scheme(linear, name)
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}"[:LAST_WORDS])
        found.append(wrong)
    return {"found": found}


WORK = {"score": score, "answers": answers, "parse": parse}


class Server:
    """Answers request after request, each in a child; what the engine leaves lies in ``folder``."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix=FOLDER)
        # vLLM leaves sockets and rendezvous files behind where an engine ends without its server.
        os.environ["TMPDIR"] = tempfile.tempdir = self.folder
        self._child = 0
        signal.signal(signal.SIGTERM, self._end)

    def _end(self, _number: int, _frame: FrameType | None) -> None:
        if self._child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child, signal.SIGKILL)
        self.close()
        os._exit(128 + signal.SIGTERM)

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def serve(self, answer_to: Any) -> None:
        """Until standard input ends."""
        for line in sys.stdin:
            request = json.loads(line)
            reading, writing = os.pipe()
            began = time.monotonic()
            server = os.getpid()
            self._child = os.fork()
            if self._child == 0:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                if os.getppid() != server:
                    os._exit(1)
                os.close(reading)
                _child(request, writing)
            os.close(writing)
            with os.fdopen(reading, encoding="utf-8") as pipe:
                text = pipe.read()
            _, status = os.waitpid(self._child, 0)
            self._child = 0
            if text:
                result = json.loads(text)
            elif os.WIFSIGNALED(status):
                result = {"error": f"the engine died of {signal.Signals(os.WTERMSIG(status)).name}"}
            else:
                result = {"error": f"the engine ended with status {os.waitstatus_to_exitcode(status)}"}
            answer_to.write(json.dumps({**result, "wall_s": time.monotonic() - began}) + "\n")
            answer_to.flush()


def _child(request: Request, writing: int) -> None:
    signal.alarm(int(request["timeout_s"]))
    os.environ.update(request["env"])
    try:
        result = WORK[request["work"]](request)
    except BaseException as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"[:LAST_WORDS]}
        if isinstance(error, FullError):
            result["full"] = [error.path, error.size]
    with os.fdopen(writing, "w", encoding="utf-8") as pipe:
        pipe.write(json.dumps(result))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def import_engine() -> Any:
    """Import here what every child would import, and keep it out of their garbage collection."""
    import vllm
    from vllm import LLM, SamplingParams  # noqa: F401  vLLM imports these when they are first named
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.platforms import current_platform

    get_quantization_config("compressed-tensors")
    if current_platform.is_cpu():
        importlib.import_module("vllm.v1.worker.cpu_worker")
        importlib.import_module("vllm.v1.attention.backends.cpu_attn")
        importlib.import_module("vllm.model_executor.models.llama")
    gc.collect()
    gc.freeze()
    return vllm


def main() -> None:
    """Standard output is the answers' alone; whatever the engine prints goes to standard error."""
    answer_to = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    server = Server()
    try:
        vllm = import_engine()
        answer_to.write(json.dumps({"vllm": vllm.__version__, "folder": server.folder}) + "\n")
        answer_to.flush()
        server.serve(answer_to)
    finally:
        server.close()


if __name__ == "__main__":
    main()
