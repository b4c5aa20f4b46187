"""Our route of the real engine must say exactly what vLLM's own answers say, for the whole vocabulary."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from deploy.engine import EngineSpec, free_port, running
from deploy.models import one_model
from gateway.config import load_config
from quantize.core.checkpoint import open_checkpoint
from quantize.evaluate.bench import Bench, BenchError
from quantize.evaluate.bounds import kl_bounds
from quantize.evaluate.client import EngineClient, EngineError
from quantize.evaluate.reference import Kept
from quantize.evaluate.scores import Likeliest, from_rows
from quantize.registry import Registry
from tests.deploy.test_supervisor import ROOT

pytestmark = pytest.mark.engine
PROMPTS = ([1, 5, 9, 200, 31, 77, 2000, 8], list(range(300, 500)), [1, 2], list(range(700, 764)))
SMALL_CHUNK = "64"
"""Tokens of a forward pass, so that long prompts take several and several prompts share one."""


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[EngineClient]:
    model = one_model(load_config(ROOT / "tiercel.yaml"))
    more = ["--max-num-batched-tokens", SMALL_CHUNK, "--enable-prefix-caching"]
    settings = model.engine.model_copy(update={"extra_args": [*model.engine.extra_args, *more]})
    registry = Registry(tmp_path, model.name, model.reference)
    card = registry.add_reference(open_checkpoint(model.path))
    port = free_port("127.0.0.1")
    spec = EngineSpec(card, registry.path("bf16", card.version), settings, port, tmp_path / "engine.log")
    async with running(spec, print), EngineClient(spec.url, card.model) as opened:
        yield opened


async def told(client: EngineClient, tokens: list[int], top: int) -> Likeliest:
    """What vLLM itself says of a prompt, in JSON."""
    body = {"prompt": tokens, "max_tokens": 1, "temperature": 0, "prompt_logprobs": top}
    rows = (await client._post("/v1/completions", body))["choices"][0]["prompt_logprobs"]
    return from_rows([{int(t): float(one["logprob"]) for t, one in row.items()} for row in rows[1:]])


async def whole(client: EngineClient, tokens: list[int]) -> NDArray[np.float64]:
    """(n - 1, vocabulary) log-probabilities by vLLM itself."""
    rows = await told(client, tokens, -1)
    table = np.zeros((len(tokens) - 1, 2048))
    np.put_along_axis(table, rows.ids.astype(np.int64), rows.values, axis=1)
    normal: NDArray[np.float64] = table - np.log(np.exp(table).sum(axis=1, keepdims=True))
    return normal


async def test_the_route_agrees_with_prompt_logprobs(client: EngineClient) -> None:
    account = await client.account()
    assert account is not None
    assert (account["vocabulary"], account["width"], account["dtype"]) == (2048, 256, "bfloat16")

    truth = [await whole(client, prompt) for prompt in PROMPTS]
    # All at once, several in one pass, and after the prompts are in the prefix cache.
    both = await asyncio.gather(*(client.score_and_keep(prompt, 1) for prompt in PROMPTS))
    for prompt, rows, (scored, kept) in zip(PROMPTS, truth, both, strict=True):
        assert scored.came == pytest.approx(rows[np.arange(len(rows)), prompt[1:]], abs=2e-5)
        best = np.take_along_axis(rows, scored.top1[:, None].astype(np.int64), axis=1)[:, 0]
        assert best == pytest.approx(rows.max(axis=1), abs=2e-5)
        assert len(kept.data) == len(rows) * 256 * 2
        itself = await client.score_against(prompt, 1, kept)
        assert itself.kl is not None
        assert itself.kl.max() == 0
        assert itself.exact
        assert itself.top1.tolist() == scored.top1.tolist()

    # A reference that says something else: the hidden states of another prompt of the same length.
    other = [token + 900 for token in PROMPTS[1]]
    before = await whole(client, other)
    _, kept = await client.score_and_keep(other, 1)
    scored = await client.score_against(PROMPTS[1], 1, kept)
    exact = (np.exp(before) * (before - truth[1])).sum(axis=1)
    assert exact.mean() > 1
    assert scored.kl == pytest.approx(exact, rel=1e-4, abs=1e-5)
    some = await client.score_against(PROMPTS[1], 150, Kept("hidden", kept.about, kept.data[149 * 512 :]))
    assert some.kl == pytest.approx(exact[149:], rel=1e-4, abs=1e-5)

    # What a stock server would tell of the same bounds it from below.
    ours, theirs = await told(client, PROMPTS[1], 20), await told(client, other, 20)
    lower = np.array([kl_bounds(theirs.row(i), ours.row(i))[0] for i in range(len(exact))])
    assert (lower <= exact + 1e-4).all()
    assert lower.mean() > 0.1

    await refusals(client, kept)


async def refusals(client: EngineClient, kept: Kept) -> None:
    for tokens, start, words in (
        ([1, 2], 2, "leaves none of 2 tokens"),
        ([1, 9999], 1, "9999 is out of vocabulary, which has 2048"),
        ([1] * 2000, 1, "maximum context length is 1024"),
    ):
        with pytest.raises(EngineError, match=words):
            await client.score_and_keep(tokens, start)
    about = {**kept.about, "head": "another"}
    for wrong, words in (
        (Kept("hidden", about, kept.data), "of another model or head \\(head another, here"),
        (Kept("hidden", kept.about, kept.data[:-512]), "101376 bytes of hidden states for 199 rows"),
    ):
        with pytest.raises(EngineError, match=words):
            await client.score_against(PROMPTS[1], 1, wrong)
    assert (await client.score_and_keep([1, 2, 3], 1))[0].came.shape == (2,)  # nothing was left behind


def test_a_variant_with_another_head_is_compared_with_the_reference_s_own(tmp_path: Path) -> None:
    """Here one that is twice as large, so that the variant's logits are the reference's doubled."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    base, variant = ROOT / "deploy/assistant/model", tmp_path / "variant"
    shutil.copytree(base, variant)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = 2 * tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    save_file(tensors, variant / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (variant / "config.json").write_text(
        json.dumps({**config, "tie_word_embeddings": False}), encoding="utf-8"
    )

    spans = [(PROMPTS[0], 1), (PROMPTS[3], 20)]
    python, site, saved = ROOT / ".venv-engine/bin/python", ROOT / "deploy/engine_site", tmp_path / "kept.npz"
    with Bench(python, tmp_path / "bench.log", site=site, env={"OMP_NUM_THREADS": "1"}) as bench:
        bench.score(base, spans, save=saved)
        found = bench.score(variant, spans, reference=saved).kl
        with pytest.raises(BenchError, match="is of other spans"):
            bench.score(base, spans[:1], reference=saved)

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    truth = []
    for tokens, start in spans:
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, start - 1 : -1].double()
        p, q = logits.log_softmax(-1), (2 * logits).log_softmax(-1)
        truth += (p.exp() * (p - q)).sum(-1).tolist()
    assert found == pytest.approx(truth, rel=0.05, abs=0.02)
    assert found.mean() > 0.2


LAYOUTS = """
from types import SimpleNamespace as S
import numpy as np, torch
import score_worker
from vllm.v1.worker.gpu.model_runner import ExecuteModelState
from vllm.v1.worker.gpu.input_batch import InputBatch

assert set(score_worker.V2_BATCH) <= set(InputBatch.__dataclass_fields__)
hidden = torch.arange(16.0).view(8, 2)
names, starts, computed, scheduled = ["a-1", "b-2", "c-3"], [0, 1, 5], [9, 4, 0], [1, 4, 2]
batch = S(req_ids=names, query_start_loc_np=np.array([*starts, 7, 7]),
          num_computed_prefill_tokens_np=np.array(computed), num_scheduled_tokens=np.array(scheduled))
state = ExecuteModelState(batch, *[None] * (len(ExecuteModelState._fields) - 1))
state = state._replace(hidden_states=hidden)
v2 = score_worker.pieces(S(execute_model_state=state), True)
order = S(scheduler_output=S(num_scheduled_tokens=dict(zip(names, scheduled))), hidden_states=hidden)
runner = S(execute_model_state=order, query_start_loc=S(np=np.array(starts)), input_batch=S(req_ids=names),
           requests={name: S(num_computed_tokens=count) for name, count in zip(names, computed)})
v1 = score_worker.pieces(runner, False)
assert v1[1] == v2[1] == [("a-1", 0, 9, 1), ("b-2", 1, 4, 4), ("c-3", 5, 0, 2)], (v1, v2)
assert v1[0] is hidden and v2[0] is hidden
assert score_worker.pieces(S(execute_model_state=None), True) is None
assert score_worker.pieces(S(execute_model_state=state._replace(hidden_states=None)), True) is None

def worker(v2=False, lora=None, **more):
    parallel = S(data_parallel_size=more.pop("data", 1), prefill_context_parallel_size=1)
    config = S(lora_config=lora, parallel_config=parallel, cache_config=S(kv_sharing_fast_prefill=False))
    names = ("requests", "input_batch", "query_start_loc", "sample_tokens", "execute_model_state")
    known = dict.fromkeys(names)
    for name in more.get("without", ()):
        del known[name]
    return S(vllm_config=config, use_v2_model_runner=v2, model_runner=S(**known))

assert score_worker.refusal(worker()) == score_worker.refusal(worker(v2=True)) == ""
assert "--enable-lora" in score_worker.refusal(worker(lora=object()))
assert "--data-parallel-size above 1" in score_worker.refusal(worker(data=2))
lacking = score_worker.refusal(worker(without=("query_start_loc", "execute_model_state")))
assert lacking.startswith("this vLLM's model runner has no query_start_loc, execute_model_state"), lacking

logits = torch.randn(7, 50)
watched = score_worker.Watched(2, [1, 2, 3, 4, 5, 6, 7], None, False, 50, torch.float32)
watched.take(lambda rows: rows, logits[:3], 0, 2)
assert "showed 2 of 6 rows" in watched.result()["error"]
watched.take(lambda rows: rows, logits[3:], 3, 2)
found = watched.result()
truth = torch.log_softmax(logits.double(), -1)[1:6].gather(1, torch.tensor([[3], [4], [5], [6], [7]]))[:, 0]
assert np.allclose(np.frombuffer(found["came"]), truth.numpy())
best = int(logits[6].argmax())
value = float(torch.log_softmax(logits[6].double(), -1)[best])
assert score_worker.disagreement([found], [(best, value)]) == ""
for drawn in ([(best, value - 1)], [(int(logits[6].argmin()), -9.0)]):  # another row, another request
    assert "is not as score_worker.py expects" in score_worker.disagreement([found], drawn)
assert "0 workers scored" in score_worker.disagreement([], [(best, value)])
print("fine")
"""


def test_both_model_runners_layouts_are_read_alike() -> None:
    """The V2 runner needs Triton, which a CPU has not: its state as vLLM declares it, filled by hand."""
    done = subprocess.run(
        [ROOT / ".venv-engine/bin/python", "-c", LAYOUTS],
        env={"PYTHONPATH": str(ROOT / "deploy/engine_site"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.endswith("fine\n"), done.stderr[-2000:]
