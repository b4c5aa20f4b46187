"""Trains the demo model "assistant": a small Llama that classifies, summarizes and answers.

One step is a batch of utterances (the label is what is learned, the words are learned a little) and
a batch of record conversations (the assistant's turns are learned). Records are drawn from the step
number and utterances from an epoch permutation, so a resumed run sees what an uninterrupted one
would have seen. Hidden matrices are trained with Muon (momentum orthogonalized by Newton-Schulz,
https://kellerjordan.github.io/posts/muon/), embeddings, head and norms with AdamW; the weights that
are kept are an exponential moving average.

    python -m deploy.assistant.train --clinc150 clinc150.json --steps 3000 --out deploy/assistant/model
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deploy.assistant.corpus import (
    OUT_OF_SCOPE,
    Utterance,
    clinc150,
    conversations_text,
    own_utterances,
    record_conversation,
)
from deploy.assistant.examples import Encoder, Example, Tokens, batch
from deploy.assistant.model_card import write_model_card
from deploy.assistant.records import HELD_OUT_SEED, NOT_STATED
from deploy.assistant.tokenizer import VOCABULARY_SIZE, train_tokenizer

LAYERS = 4
"""Of the shipped model."""


@dataclass(frozen=True)
class Phase:
    """The mix of a step from step ``start`` on."""

    start: int
    utterances: int
    records: int
    record_dropout: float


PHASES = (Phase(0, 96, 16, 0.1), Phase(541, 40, 40, 0.0))
"""Words first: intents are learned within a few hundred steps. Then mostly records: copying a value
takes longer to emerge, never sees a record twice, and so needs no dropout, which only delays it."""


def phase_of(step: int) -> Phase:
    return next(phase for phase in reversed(PHASES) if step >= phase.start)


def model_config(layers: int = LAYERS) -> LlamaConfig:
    """4.2 M parameters at four layers; every K and N is divisible by 128, so that all CPU kernels run."""
    return LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        initializer_range=0.02,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dtype="float32",
    )


def backward(model: LlamaForCausalLM, examples: Sequence[Example], smoothing: float, chunks: int) -> float:
    """Accumulate gradients of the weighted cross-entropy over learned positions; returns the loss.

    Examples are sorted by length into ``chunks``, so that little is spent on padding; the head runs
    on learned positions only.
    """
    ordered = sorted(examples, key=lambda example: len(example.ids))
    size = -(-len(ordered) // chunks)
    total = sum(sum(example.weights) for example in ordered)
    value = 0.0
    for start in range(0, len(ordered), size):
        ids, targets, weights = batch(ordered[start : start + size])
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        chosen = weights > 0
        logits = model.lm_head(hidden[chosen])
        losses = F.cross_entropy(logits, targets[chosen], reduction="none", label_smoothing=smoothing)
        loss = (losses * weights[chosen]).sum() / total
        loss.backward()  # type: ignore[no-untyped-call]
        value += loss.item()
    return value


def vary(words: Tokens, rng: random.Random, vocabulary: Sequence[Tokens]) -> Tokens:
    """Augment an utterance: drop tokens, swap neighbours, or put a piece of another one before it."""
    words = [token for token in words if rng.random() > 0.12] or words
    if rng.random() < 0.2 and len(words) > 3:
        i = rng.randrange(len(words) - 1)
        words[i], words[i + 1] = words[i + 1], words[i]
    if rng.random() < 0.15:
        i, other = rng.randrange(len(words)), rng.choice(vocabulary)
        words[i] = rng.choice(other)
    return words


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized; float32, because torch's own computes in bfloat16,
    which a CPU without that instruction set emulates (6 times slower here)."""

    def __init__(self, params: Sequence[torch.nn.Parameter], lr: float, momentum: float, decay: float):
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                buffer = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalize(parameter.grad.lerp(buffer, group["momentum"]))
                scale = 0.2 * math.sqrt(max(parameter.shape))
                parameter.mul_(1 - group["lr"] * group["decay"]).add_(update, alpha=-group["lr"] * scale)


def orthogonalize(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrix, by a quintic Newton-Schulz iteration."""
    x: torch.Tensor = matrix / (matrix.norm() + 1e-7)
    flipped = x.shape[0] > x.shape[1]
    x = x.T if flipped else x
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if flipped else x


def add_dropout(model: LlamaForCausalLM) -> None:
    """Dropout on what attention and MLP add to the residual stream, at ``model.residual_dropout``
    (training mode only).

    One mask per sequence and channel: a mask per element costs a fifth of a step on a CPU.
    """

    def with_mask(values: torch.Tensor) -> torch.Tensor:
        rate = model.residual_dropout
        if rate == 0.0:
            return values
        keep = torch.rand(values.shape[0], 1, values.shape[2]) >= rate
        masked: torch.Tensor = values * (keep / (1 - rate))
        return masked

    def drop(module: torch.nn.Module, _args: Any, output: Any) -> Any:
        if not module.training:
            return output
        return (with_mask(output[0]), *output[1:]) if isinstance(output, tuple) else with_mask(output)

    model.residual_dropout = 0.0
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


def schedule(step: int, steps: int) -> float:
    """Learning-rate factor: 3 % warm-up, flat, then linear to zero over the last half."""
    warm = max(1, int(0.03 * steps))
    return min(1.0, (step + 1) / warm, (steps - step) / (0.5 * steps))


def utterance_order(count: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of indices, of the size that the phase asks for: one permutation per epoch."""
    epoch, step = 0, 0
    pending: list[int] = []
    while True:
        size = phase_of(step).utterances
        step += 1
        while len(pending) < size:
            order = list(range(count))
            random.Random(f"{seed}/{epoch}").shuffle(order)
            pending, epoch = pending + order, epoch + 1
        yield pending[:size]
        pending = pending[size:]


@torch.no_grad()
def exact_share(model: LlamaForCausalLM, examples: Sequence[Example], size: int = 64) -> list[bool]:
    """Per example: does greedy decoding give exactly its assistant turns (weight 1 positions)?"""
    model.eval()
    right: list[bool] = []
    for start in range(0, len(examples), size):
        ids, targets, weights = batch(examples[start : start + size])
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        asked = weights >= 1.0
        wrong = torch.zeros_like(asked)
        wrong[asked] = model.lm_head(hidden[asked]).argmax(-1) != targets[asked]
        right += (~wrong.any(1)).tolist()
    model.train()
    return right


def evaluate(model: LlamaForCausalLM, encoder: Encoder, clinc_val: Sequence[Utterance]) -> dict[str, float]:
    """Exact-match shares: CLINC150 validation in and out of scope, our eval split, records."""

    def share(flags: Sequence[bool]) -> float:
        return sum(flags) / max(1, len(flags))

    def intents(items: Sequence[Utterance]) -> list[bool]:
        return exact_share(model, [encoder.utterance(encoder.text(u.text), u.intent) for u in items])

    conversations = [record_conversation(HELD_OUT_SEED + i) for i in range(600)]
    summaries = [c for c in conversations if len(c) == 3 and c[0]["content"].startswith("Summarize")]
    answers = [c for c in conversations if not c[0]["content"].startswith("Summarize")]
    firsts = [c[: next(i for i, m in enumerate(c) if m["role"] == "assistant") + 1] for c in answers]
    unstated = [c for c in firsts if c[-1]["content"] == NOT_STATED]
    figures = {
        "clinc150_val": share(intents([u for u in clinc_val if u.intent != OUT_OF_SCOPE])),
        "clinc150_val_oos": share(intents([u for u in clinc_val if u.intent == OUT_OF_SCOPE])),
        "own_eval": share(intents(own_utterances("eval"))),
        "summaries": share(exact_share(model, [encoder.conversation(c) for c in summaries])),
        "answers": share(exact_share(model, [encoder.conversation(c) for c in firsts])),
        "answers_not_stated": share(exact_share(model, [encoder.conversation(c) for c in unstated])),
    }
    return {name: round(value, 4) for name, value in figures.items()}


def save_atomically(state: dict[str, Any], path: Path) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


@dataclass
class Training:
    """Everything that a checkpoint has to hold."""

    model: LlamaForCausalLM
    average: LlamaForCausalLM
    optimizers: list[torch.optim.Optimizer]
    step: int = 0

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]


def make_training(seed: int, layers: int = LAYERS) -> Training:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(model_config(layers))
    add_dropout(model)
    average = LlamaForCausalLM(model_config(layers))
    average.load_state_dict(model.state_dict())
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    rest = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in name)]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=2.5e-3, momentum=0.95, decay=0.05),
        torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return Training(model, average, optimizers)


def train(options: argparse.Namespace) -> None:
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    clinc_train, clinc_val = clinc150(options.clinc150, "train"), clinc150(options.clinc150, "val")
    utterances = clinc_train + own_utterances("train")
    intents = sorted({u.intent for u in utterances})
    if not (work / "tokenizer.json").exists():
        texts = conversations_text(utterances, range(10_000_000, 10_004_000))
        train_tokenizer(texts, intents).save_pretrained(work)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work)
    encoder = Encoder(tokenizer)
    words = [encoder.text(u.text) for u in utterances]

    training = make_training(options.seed, options.layers)
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        training.restore(torch.load(checkpoint, weights_only=True))
        print(f"resuming at step {training.step} of {options.steps}", flush=True)
    order = utterance_order(len(utterances), options.seed)
    for _ in range(training.step):
        next(order)

    bar = tqdm(total=options.steps, initial=training.step, unit="step", mininterval=5)
    saved = time.monotonic()
    while training.step < options.steps:
        step = training.step
        phase = phase_of(step)
        rng = random.Random(f"{options.seed}/{step}")
        torch.manual_seed(hash((options.seed, step)) & 0x7FFFFFFF)
        labelled = [
            encoder.utterance(vary(list(words[i]), rng, words), utterances[i].intent) for i in next(order)
        ]
        first = step * phase.records + 100 * phase.start
        seeds = range(first, first + phase.records)
        conversations = [encoder.conversation(record_conversation(seed)) for seed in seeds]
        factor = schedule(step, options.steps)
        for optimizer in training.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
        training.model.residual_dropout = 0.1
        intent_loss = backward(training.model, labelled, smoothing=0.1, chunks=3)
        training.model.residual_dropout = phase.record_dropout
        record_loss = backward(training.model, conversations, smoothing=0.0, chunks=2)
        torch.nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
        for optimizer in training.optimizers:
            optimizer.step()
        decay = min(0.995, (step + 1) / (step + 20))
        with torch.no_grad():
            for kept, current in zip(training.average.parameters(), training.model.parameters(), strict=True):
                kept.lerp_(current, 1 - decay)
        training.step += 1
        bar.update()
        bar.set_postfix(intent=f"{intent_loss:.3f}", record=f"{record_loss:.3f}")
        if training.step % options.evaluate_every == 0 or training.step == options.steps:
            figures = evaluate(training.average, encoder, clinc_val)
            print(json.dumps({"step": training.step, **figures}), flush=True)
        if time.monotonic() - saved > 120 or training.step == options.steps:
            save_atomically(training.state(), checkpoint)
            saved = time.monotonic()
    bar.close()
    export(training.average, tokenizer, encoder, clinc_val, options)


def export(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    encoder: Encoder,
    clinc_val: Sequence[Utterance],
    options: argparse.Namespace,
) -> None:
    """Write the BF16 checkpoint with its figures (of the BF16-rounded weights) as one directory."""
    rounded = model.to(torch.bfloat16).float()
    figures = {"steps": options.steps, "seed": options.seed, **evaluate(rounded, encoder, clinc_val)}
    partial = options.out.with_name(options.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    rounded.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "training.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    write_model_card(partial)
    shutil.rmtree(options.out, ignore_errors=True)
    partial.rename(options.out)
    print(json.dumps(figures), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clinc150", type=Path, required=True, help="CLINC150 as JSON (train, val, oos_*)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("model"))
    parser.add_argument("--work", type=Path, default=Path("var/train"), help="tokenizer and checkpoint")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--evaluate-every", type=int, default=250)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
