"""What scoring adds to a worker of the engine: exact KL per token, reduced to scalars where the logits are.

:class:`ScoreWorker` is a worker extension in vLLM's sense (``--worker-extension-cls``): its methods are
called by ``collective_rpc`` on every worker. A request that is to be scored is announced by its key before it
is sent (:meth:`ScoreWorker.tiercel_begin`), runs as any other, and its figures are fetched after it
(:meth:`ScoreWorker.tiercel_end`).

The seam is the model runner's ``sample_tokens``. In both of vLLM 0.32's runners it is called once after
every forward pass, with the final hidden states (after the last norm) and the batch's layout in
``execute_model_state``. From there the rows of a request are cut out, whatever shares its batch and however
its prompt is chunked, and the model's own ``compute_logits`` turns them into logits, softcap, scale and
tensor parallelism included, some rows at a time so that a small device suffices. A reference's logits are
computed by the same call from the hidden states that were kept of it, so both must have the same head, whose
fingerprint :meth:`ScoreWorker.tiercel_describe` gives. For a variant with another head (one of 8 bits) the
reference's is read from its checkpoint and stands in for it (:meth:`ScoreWorker.tiercel_load_head`).

Run: the V1 runner on a CPU, with chunked prompts, several requests at once beside ones that decode, and
prefix caching; the V2 runner on an H100 (it needs Triton, and is tried here with its declared state filled by
hand). Read in vLLM's source alone: tensor and pipeline parallelism.

Where vLLM is not as expected here, nothing is measured and the reason is returned: see :func:`refusal`, and
:func:`disagreement`, which compares the last row with the token that the engine drew from it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

KEY_LENGTH = 40
"""Characters of a key; vLLM appends its own to the id of a request."""
TABLE_BYTES = 32 << 20
"""Bytes of one float64 table of log-probabilities; a few exist at a time."""
LIKELIEST = 16
"""Tokens of the last row that are told, among which the token that the engine drew must be."""
TOLERANCE = 0.5
"""Nats by which the engine's log-probability of that token may differ: its logits are of another batch."""
ADAPTER = "TIERCEL_ADAPTER"
"""Environment variable: name of the one adapter that an engine serves, where it does."""
PROBES = 64
"""Inputs of the head whose weights make its fingerprint."""
STATES = {
    False: ("vllm.v1.worker.gpu_model_runner", ("scheduler_output", "hidden_states")),
    True: ("vllm.v1.worker.gpu.model_runner", ("input_batch", "hidden_states")),
}
"""Whether it is the V2 runner, to where its ``ExecuteModelState`` is and which fields are read."""
V1_ATTRIBUTES = ("requests", "input_batch", "query_start_loc")
V2_BATCH = {"req_ids", "query_start_loc_np", "num_computed_prefill_tokens_np", "num_scheduled_tokens"}

Logits = Callable[[torch.Tensor], Any]
"""A model's ``compute_logits``: (rows, vocabulary), or None on ranks that do not gather them."""


class Piece(NamedTuple):
    """Rows of one request in one forward pass."""

    request: str
    row: int
    """Its first row among the pass's hidden states."""
    position: int
    """Place of that row's token in the request."""
    rows: int


class PlainHead:
    """A head in 16 bits that stands in for a model's own: what vLLM's ``LogitsProcessor`` needs of one.

    ``weight`` is this rank's shard, (rows, width), padded as the model's own is.
    """

    def __init__(self, weight: torch.Tensor, tp_size: int) -> None:
        self.weight, self.tp_size, self.quant_method = weight, tp_size, self

    def apply(self, layer: PlainHead, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of this shard."""
        return torch.nn.functional.linear(x, layer.weight, bias)


class Watched:
    """One request that is scored: its n tokens from ``start`` on, each by the row of the token before it.

    ``reference`` holds n rows of ``width`` hidden states as bytes; ``keep`` says to return the request's own;
    ``reference_logits`` computes the reference's, where its head is another.
    """

    def __init__(
        self,
        start: int,
        tokens: list[int],
        reference: bytes | None,
        keep: bool,
        width: int,
        dtype: torch.dtype,
    ) -> None:
        self.first, self.count = start - 1, len(tokens) - start
        self.targets = torch.tensor([*tokens[start:], 0], dtype=torch.int64)
        self.reference = None
        if reference is not None:
            self.reference = torch.frombuffer(bytearray(reference), dtype=dtype).view(self.count, width)
        self.hidden = torch.empty((self.count, width), dtype=dtype) if keep else None
        self.reference_logits: Logits | None = None
        self.seen = np.zeros(self.count + 1, bool)
        self.came, self.kl = np.zeros(self.count + 1), np.zeros(self.count)
        self.top1 = np.zeros(self.count + 1, np.int32)
        self.reference_top1 = np.zeros(self.count, np.int32)
        self.last: dict[int, float] = {}
        self.error = ""
        self.gathers = False

    def take(self, compute_logits: Logits, hidden: torch.Tensor, position: int, step: int) -> None:
        """Reduce what is wanted of some hidden states, (rows, width), of which the first is at ``position``;
        ``step`` rows at a time."""
        end = min(position + len(hidden), self.first + self.count + 1)
        for low in range(max(position, self.first), end, step):
            high = min(low + step, end)
            self._reduce(compute_logits, hidden[low - position : high - position], low - self.first)

    def _reduce(self, compute_logits: Logits, rows: torch.Tensor, at: int) -> None:
        """Figures of rows ``at`` … of the scored ones; the row after the last has no token and no KL."""
        end = at + len(rows)
        scored = min(end, self.count)
        self.seen[at:end] = True
        if self.hidden is not None:
            self.hidden[at:scored].copy_(rows[: scored - at])
        logits = compute_logits(rows)
        before = None
        if self.reference is not None and scored > at:
            # As many rows as the variant's, so that the same kernel adds up in the same order.
            wanted = torch.zeros_like(rows)
            wanted[: scored - at].copy_(self.reference[at:scored])
            before = (self.reference_logits or compute_logits)(wanted)
        if logits is None:
            return
        self.gathers = True
        log_q = torch.log_softmax(logits.double(), -1)
        targets = self.targets[at:end].to(log_q.device)
        self.came[at:end] = log_q.gather(1, targets[:, None])[:, 0].cpu().numpy()
        self.top1[at:end] = log_q.argmax(-1).cpu().numpy()
        if end > self.count:
            values, ids = log_q[-1].topk(min(LIKELIEST, log_q.shape[1]))
            self.last = dict(zip(ids.tolist(), values.tolist(), strict=True))
        if before is not None:
            log_p = torch.log_softmax(before[: scored - at].double(), -1)
            self.reference_top1[at:scored] = log_p.argmax(-1).cpu().numpy()
            self.kl[at:scored] = divergence(log_p, log_q[: scored - at]).cpu().numpy()

    def result(self) -> dict[str, Any] | None:
        """The figures as little-endian bytes; None on a rank that has no logits."""
        if self.error:
            return {"error": self.error}
        if not self.seen.any():
            return None
        if not self.seen.all():
            return {"error": f"the engine showed {self.seen.sum()} of {len(self.seen)} rows of the request"}
        if not self.gathers:
            return None
        found: dict[str, Any] = {
            "came": self.came[:-1].astype("<f8").tobytes(),
            "top1": self.top1[:-1].astype("<i4").tobytes(),
            "last": [[token, value] for token, value in self.last.items()],
        }
        if self.reference is not None:
            found["kl"] = self.kl.astype("<f8").tobytes()
            found["reference_top1"] = self.reference_top1.astype("<i4").tobytes()
        if self.hidden is not None:
            found["hidden"] = self.hidden.view(torch.uint8).numpy().tobytes()
        return found


def divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of each row, nats, from (rows, vocabulary) float64 log-probabilities."""
    p = log_p.exp()
    terms = (log_p - log_q).mul_(p).masked_fill_(p == 0, 0.0)
    return terms.sum(-1).clamp_min_(0.0)


def head_rows(directory: str, first: int, end: int) -> torch.Tensor:
    """Rows ``first`` to ``end`` of a checkpoint's head, or of its embeddings where they are tied. Raises
    ValueError where there is not exactly one."""
    from safetensors import safe_open

    places: dict[str, Path] = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            places |= dict.fromkeys(file.keys(), path)
    for ending in ("lm_head.weight", "embed_tokens.weight"):
        if names := [name for name in places if name.endswith(ending)]:
            break
    if len(names) != 1:
        raise ValueError(f"{directory} has {len(names)} tensors that could be the head; one is expected")
    with safe_open(places[names[0]], "pt") as file:
        rows: torch.Tensor = file.get_slice(names[0])[first:end]
    return rows


def pieces(runner: Any, v2: bool) -> tuple[torch.Tensor, list[Piece]] | None:
    """Final hidden states of the pass that has just run, and whose rows they are; None on a rank or in a
    step that has none."""
    state = runner.execute_model_state
    if state is None or not isinstance(state.hidden_states, torch.Tensor):
        return None
    if v2:
        batch = state.input_batch
        rows = zip(
            batch.req_ids,
            batch.query_start_loc_np,
            batch.num_computed_prefill_tokens_np,
            batch.num_scheduled_tokens,
            strict=False,  # the layout may be padded
        )
        return state.hidden_states, [Piece(name, int(a), int(b), int(c)) for name, a, b, c in rows]
    scheduled, starts = state.scheduler_output.num_scheduled_tokens, runner.query_start_loc.np
    return state.hidden_states, [
        Piece(name, int(starts[index]), int(runner.requests[name].num_computed_tokens), int(scheduled[name]))
        for index, name in enumerate(runner.input_batch.req_ids)
        if name in scheduled
    ]


def plain_logits(model: Any) -> Logits:
    """``compute_logits`` without an adapter's wrapper, which counts the rows of the batch."""
    if (plain := getattr(getattr(model, "logits_processor", None), "base_layer", None)) is None:
        return model.compute_logits  # type: ignore[no-any-return]
    head = getattr(model.lm_head, "base_layer", model.lm_head)
    return lambda hidden: plain(head, hidden)


def refusal(worker: Any) -> str:
    """Why this worker cannot score, or an empty string."""
    config, runner, v2 = worker.vllm_config, worker.model_runner, bool(worker.use_v2_model_runner)
    if config.lora_config is not None and not os.environ.get(ADAPTER):
        return "engines with --enable-lora are not scored; start one without it"
    if config.parallel_config.data_parallel_size > 1:
        return "engines with --data-parallel-size above 1 are not scored; start one with 1"
    if getattr(config.parallel_config, "prefill_context_parallel_size", 1) > 1:
        return "engines with --prefill-context-parallel-size above 1 are not scored; start one with 1"
    if config.cache_config.kv_sharing_fast_prefill:
        return "--kv-sharing-fast-prefill skips rows of the prompt; start the engine without it"
    module, fields = STATES[v2]
    known = getattr(importlib.import_module(module), "ExecuteModelState", None)
    missing = sorted(set(fields) - set(getattr(known, "_fields", ())))
    if v2:
        batch = importlib.import_module("vllm.v1.worker.gpu.input_batch").InputBatch
        missing += sorted(V2_BATCH - {field.name for field in dataclasses.fields(batch)})
    else:
        missing += [name for name in V1_ATTRIBUTES if not hasattr(runner, name)]
    missing += [name for name in ("sample_tokens", "execute_model_state") if not hasattr(runner, name)]
    if missing:
        return f"this vLLM's model runner has no {', '.join(missing)}; scoring is made for vLLM 0.32"
    return ""


def disagreement(found: Sequence[dict[str, Any]], drawn: Sequence[tuple[int, float]]) -> str:
    """Why the workers' figures are not of this request, or an empty string: the engine's own greedy token
    after the prompt must be among the likeliest of the last row, with about the same log-probability."""
    if not found or not drawn:  # where logits are gathered by all ranks, each has the same figures
        return f"{len(found)} workers scored the request and {len(drawn)} tokens were drawn; 1 is expected"
    (token, logprob), ours = drawn[0], dict(found[0]["last"])
    if token not in ours or abs(ours[token] - logprob) > TOLERANCE:
        return (
            f"the engine drew token {token} at {logprob:.3f} nats where scoring sees {ours.get(token)}; "
            "this vLLM's model runner is not as score_worker.py expects"
        )
    return ""


class ScoreWorker:
    """Added to vLLM's worker class; ``model_runner``, ``vllm_config`` and so on are the worker's."""

    def tiercel_describe(self) -> dict[str, Any]:
        """``refusal``, or what decides whether two engines' hidden states are of one model: ``width`` and
        ``dtype`` of hidden states and the ``head``'s fingerprint, with the ``runner`` and ``vocabulary``."""
        if reason := refusal(self):
            return {"refusal": reason}
        config = self.vllm_config.model_config  # type: ignore[attr-defined]
        return {
            "refusal": "",
            "runner": "V2" if self.use_v2_model_runner else "V1",  # type: ignore[attr-defined]
            "width": config.get_hidden_size(),
            "dtype": str(config.dtype).removeprefix("torch."),
            "vocabulary": config.get_vocab_size(),
            "head": self._tiercel_head(),
        }

    def tiercel_begin(
        self,
        key: str,
        start: int,
        tokens: list[int],
        reference: bytes | None,
        keep: bool,
        loaded_head: bool = False,
    ) -> None:
        """Score the request whose id begins with ``key``, of :data:`KEY_LENGTH` characters. ``loaded_head``:
        the reference's logits are of the head that was loaded."""
        runner = self.model_runner  # type: ignore[attr-defined]
        if not hasattr(self, "_tiercel_watched"):
            self._tiercel_watched: dict[str, Watched] = {}
            original = runner.sample_tokens

            def sample_tokens(*arguments: Any, **named: Any) -> Any:
                if self._tiercel_watched:
                    self._tiercel_look()
                return original(*arguments, **named)

            runner.sample_tokens = sample_tokens
        config = self.vllm_config.model_config  # type: ignore[attr-defined]
        self._tiercel_watched[key] = Watched(
            start, list(tokens), reference, keep, config.get_hidden_size(), config.dtype
        )
        if loaded_head:
            self._tiercel_watched[key].reference_logits = self._tiercel_reference_logits

    def tiercel_end(self, key: str) -> dict[str, Any] | None:
        """The figures of a request, and forget it; ``error`` where there is none."""
        watched: Watched | None = getattr(self, "_tiercel_watched", {}).pop(key, None)
        return watched.result() if watched else None

    def tiercel_load_head(self, directory: str) -> str:
        """Read the head of the checkpoint in ``directory`` and keep it beside the model's own; its
        fingerprint, empty on ranks without logits. Raises ValueError where there is none that fits."""
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        processors = [one for one in model.modules() if type(one).__name__ == "LogitsProcessor"]
        seen: list[Any] = []
        hooks = [one.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for one in processors]
        config = self.vllm_config.model_config  # type: ignore[attr-defined]
        blank = torch.zeros((1, config.get_hidden_size()), dtype=config.dtype, device=self.device)  # type: ignore[attr-defined]
        with torch.inference_mode():
            self.model_runner.model.compute_logits(blank)  # type: ignore[attr-defined]
        for hook in hooks:
            hook.remove()
        if len(processors) != 1 or len(seen) != 1:
            raise ValueError(f"the model computes logits in {len(seen)} places; one is expected")
        own = seen[0]
        shard = own.shard_indices
        rows = head_rows(directory, shard.org_vocab_start_index, shard.org_vocab_end_index)
        weight = torch.zeros((own.num_embeddings_per_partition, rows.shape[1]), dtype=config.dtype)
        weight[: len(rows)] = rows
        head = PlainHead(weight.to(self.device), own.tp_size)  # type: ignore[attr-defined]

        def compute(hidden: torch.Tensor) -> Any:
            hook = processors[0].register_forward_pre_hook(lambda _, given: (head, *given[1:]))
            try:
                return self.model_runner.model.compute_logits(hidden)  # type: ignore[attr-defined]
            finally:
                hook.remove()

        self._tiercel_reference_logits = compute
        return self._tiercel_head(compute)

    def _tiercel_look(self) -> None:
        """Take the rows of watched requests from the pass that has just run. Never raises into the engine."""
        runner = self.model_runner  # type: ignore[attr-defined]
        try:
            found = pieces(runner, bool(self.use_v2_model_runner))  # type: ignore[attr-defined]
        except Exception as error:
            for watched in self._tiercel_watched.values():
                watched.error = f"the model runner's batch could not be read: {type(error).__name__}: {error}"
            return
        if found is None:
            return
        hidden, batch = found
        vocabulary: int = self.vllm_config.model_config.get_vocab_size()  # type: ignore[attr-defined]
        step = max(1, TABLE_BYTES // (8 * vocabulary))
        for piece in batch:
            one = self._tiercel_watched.get(piece.request[:KEY_LENGTH])
            if one is None or one.error:
                continue
            rows = hidden[piece.row : piece.row + piece.rows]
            try:
                one.take(plain_logits(runner.model), rows, piece.position, step)
            except Exception as error:
                one.error = f"scoring failed: {type(error).__name__}: {error}"

    def _tiercel_head(self, compute_logits: Logits | None = None) -> str:
        """Fingerprint of what turns hidden states into logits: of the logits of unit vectors, which are
        columns of the head's weights whatever kernel, packing or tensor parallelism computes them. Empty on
        ranks without logits."""
        config = self.vllm_config.model_config  # type: ignore[attr-defined]
        width, digest, gathers = config.get_hidden_size(), hashlib.sha256(), True
        compute = compute_logits or plain_logits(self.model_runner.model)  # type: ignore[attr-defined]
        with torch.inference_mode():
            for column in np.unique(np.linspace(0, width - 1, PROBES).astype(int)).tolist():
                unit = torch.zeros((1, width), dtype=config.dtype, device=self.device)  # type: ignore[attr-defined]
                unit[0, column] = 1
                logits = compute(unit)
                gathers = logits is not None
                if gathers:
                    digest.update((logits.float() + 0.0).cpu().numpy().tobytes())  # + 0.0: no negative zeros
        return digest.hexdigest()[:32] if gathers else ""
