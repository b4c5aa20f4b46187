"""The engine's side of :mod:`quantize.evaluate.bench`; run by the interpreter of the engine environment.

Reads requests as JSON lines on standard input and answers each with one JSON line. vLLM is imported
once; every request is served by a forked child, so that an engine that aborts takes nothing with it
and all its memory is given back. Imports nothing of this project.

Whole-vocabulary log-probabilities are taken where vLLM has computed them: in its model runner, just
before it would pick the most likely ones for an answer. One sequence is in the engine at a time, so
that the numbers do not depend on what shares its batch.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from typing import Any

Request = dict[str, Any]
LAST_WORDS = 600


def load(request: Request) -> Any:
    """A vLLM engine in this process, with the checkpoint's own quantization."""
    from vllm import LLM

    return LLM(
        model=request["model"],
        kv_cache_dtype=request["kv"],
        max_model_len=request["max_model_len"],
        max_num_batched_tokens=request["max_model_len"],
        max_num_seqs=8,
        max_logprobs=-1,
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        disable_log_stats=True,
        seed=0,
        **request["options"],
    )


def runner_of(llm: Any) -> Any:
    """vLLM's model runner, which lives in this process (no multiprocessing, uniprocess executor)."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    return getattr(worker, "worker", worker).model_runner


def log_probabilities(llm: Any, sequences: list[list[int]]) -> Any:
    """Yields, per sequence of n tokens, an (n - 1, vocabulary) float32 array; row i predicts token i + 1."""
    import numpy as np
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    sampler = runner_of(llm).sampler
    gather, rows = sampler.gather_logprobs, []

    def keep(scores: Any, _wanted: int, targets: Any) -> Any:
        rows.append(scores.float().cpu().numpy().copy())
        return gather(scores, 0, targets)

    sampler.gather_logprobs = keep
    parameters = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False)
    for tokens in sequences:
        rows.clear()
        llm.generate([TokensPrompt(prompt_token_ids=tokens)], parameters, use_tqdm=False)
        whole = np.concatenate(rows)
        if whole.shape[0] != len(tokens) - 1:
            raise RuntimeError(f"the engine scored {whole.shape[0]} of {len(tokens) - 1} tokens")
        yield whole


def score(request: Request) -> dict[str, Any]:
    """Score sequences; with ``reference``, compare with what :func:`score` had saved there."""
    import numpy as np

    with open(request["sequences"], encoding="utf-8") as file:
        sequences: list[tuple[list[int], int]] = json.load(file)
    began = time.monotonic()
    llm = load(request)
    loaded = time.monotonic()
    count = sum(len(tokens) - start for tokens, start in sequences)
    columns = {name: np.empty(count, np.float64) for name in ("logp", "kl", "top1")}
    reference = np.load(request["reference"], mmap_mode="r") if request["reference"] else None
    saved, at = None, 0
    for (tokens, start), whole in zip(
        sequences, log_probabilities(llm, [tokens for tokens, _ in sequences]), strict=True
    ):
        rows, end = whole[start - 1 :], at + len(tokens) - start
        if request["save"] and saved is None:
            saved = np.lib.format.open_memmap(
                request["save"], mode="w+", dtype=np.float32, shape=(count, rows.shape[1])
            )
        columns["logp"][at:end] = rows[np.arange(len(rows)), tokens[start:]]
        columns["top1"][at:end] = rows.argmax(axis=1)
        if saved is not None:
            saved[at:end] = rows
        if reference is not None:
            before = np.asarray(reference[at:end], np.float64)
            terms = np.exp(before) * (before - rows.astype(np.float64))
            columns["kl"][at:end] = np.where(np.isneginf(before), 0.0, terms).sum(axis=1)
        at = end
    if saved is not None:
        saved.flush()
    if reference is None:
        columns["kl"][:] = 0.0
    np.savez(request["out"], logp=columns["logp"], kl=columns["kl"], top1=columns["top1"])
    return {"tokens": count, "load_s": loaded - began, "score_s": time.monotonic() - loaded}


def answers(request: Request) -> dict[str, Any]:
    """Load the checkpoint and let it answer a few random prompts, short and long."""
    llm = load(request)
    import numpy as np

    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, vocabulary, size=size).tolist() for size in (1, 3, 40)]
    for whole in log_probabilities(llm, prompts[1:]):
        if not np.isfinite(whole).all():
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


def serve(answer_to: Any) -> None:
    for line in sys.stdin:
        request = json.loads(line)
        reading, writing = os.pipe()
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _child(request, writing)
        os.close(writing)
        with os.fdopen(reading, encoding="utf-8") as pipe:
            text = pipe.read()
        _, status = os.waitpid(child, 0)
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
    vllm = import_engine()
    answer_to.write(json.dumps({"vllm": vllm.__version__}) + "\n")
    answer_to.flush()
    serve(answer_to)


if __name__ == "__main__":
    main()
