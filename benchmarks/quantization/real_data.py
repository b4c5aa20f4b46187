"""A real chat model, and conversations that it answered itself: for calibration, choosing and reporting.

The model is SmolLM2-135M-Instruct in BF16. Prompts are of four kinds, in equal parts: questions with a
passage (HaluEval), short requests (CLINC150), function calls with their schemas (BFCL), and texts to
summarize (WikiText-2). The three sets share no prompt. Answers are the BF16 model's own, greedy, since a
variant is judged on what its reference would say; only tokens of answers are scored.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quantization.data import SHARED, Conversation, present
from quantize.card import Calibration
from quantize.evaluate.bench import Span
from quantize.make.calibration import CalibrationSet, load_tokenizer

CALIBRATION, CHOSEN, REPORTED = "calibration", "chosen", "reported"
SIZES = {CALIBRATION: 16, CHOSEN: 8, REPORTED: 16}
"""Prompts of each kind in a set."""
PROMPT_TOKENS, ANSWER_TOKENS = 224, 56
TOGETHER = 16
"""Prompts that are answered at a time."""
WORDS = (40, 90)
"""Shortest paragraph of WikiText-2 that is taken, and where longer ones are cut, in words."""


@dataclass(frozen=True)
class Texts:
    """Token ids, prompt and answer, each with the index of the answer's first token."""

    calibrating: Sequence[Span]
    chosen: Sequence[Span]
    reported: Sequence[Span]

    def calibration(self, count: int) -> CalibrationSet:
        """``count`` conversations, spread evenly over the kinds. Raises ValueError where there are fewer."""
        if not 1 <= count <= len(self.calibrating):
            raise ValueError(f"count={count}: give a number from 1 to {len(self.calibrating)}")
        step = len(self.calibrating) / count
        sequences = [list(self.calibrating[int(number * step)][0]) for number in range(count)]
        described = Calibration(
            source="the reference's own answers",
            sha256=hashlib.sha256(json.dumps(sequences).encode()).hexdigest(),
            samples=count,
            tokens=sum(map(len, sequences)),
        )
        return CalibrationSet(sequences, described)


def real_model(directory: Path) -> Path:
    """The checkpoint in ``directory``, made where it is missing; ends the program where it cannot be."""
    if (directory / "config.json").is_file():
        return directory
    script = present(SHARED / "real_model.py", "the script that makes the real model")
    made = subprocess.run([sys.executable, str(script), str(directory)], check=False)
    if made.returncode:
        sys.exit(
            f"skipped: {script} could not make the real model in {directory} (status {made.returncode}); "
            "it needs a package index, torch, transformers and gguf"
        )
    return directory


def prompts(folder: Path = SHARED) -> list[list[Conversation]]:
    """All prompts of each of the four kinds, shuffled by a fixed seed."""

    def text(name: str) -> str:
        return present(folder / name, name).read_text(encoding="utf-8")

    def records(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in text(name).split("\n") if line.strip()]

    low, high = WORDS
    questions = [f"{one['knowledge']}\n\n{one['question']}" for one in records("halueval_qa.jsonl")]
    requests = [utterance for utterance, _ in json.loads(text("clinc150.json"))["train"]]
    split = [line.split() for line in text("wikitext2_valid.txt").splitlines()]
    passages = [" ".join(words[:high]) for words in split if len(words) >= low and words[0] != "="]
    asked: list[list[Conversation]] = [
        [[{"role": "user", "content": one}] for one in questions],
        [[{"role": "user", "content": one}] for one in requests],
        [
            [
                {
                    "role": "system",
                    "content": f"You can call these functions:\n{json.dumps(one['function'])}",
                },
                *one["question"][0],
            ]
            for one in records("bfcl_parallel.json")
        ],
        [[{"role": "user", "content": f"Summarize this text in two sentences:\n{one}"}] for one in passages],
    ]
    for kind in asked:
        random.Random(0).shuffle(kind)
    return asked


def split_prompts(kinds: Sequence[Sequence[Conversation]]) -> dict[str, list[Conversation]]:
    """Sets of prompts by name, disjoint; raises ValueError where a kind has too few."""
    needed = sum(SIZES.values())
    if short := [len(kind) for kind in kinds if len(kind) < needed]:
        raise ValueError(f"a kind of prompt has {short[0]}, and {needed} are needed")
    found, start = {}, 0
    for name, size in SIZES.items():
        found[name] = [one for kind in kinds for one in kind[start : start + size]]
        start += size
    return found


def answered(model: Any, tokenizer: Any, asked: Sequence[Conversation]) -> list[Span]:
    """The model's greedy answers, up to the end of its turn; prompts of like length are answered together."""
    import torch

    prompts = []
    for messages in asked:
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        prompts.append(list(encoded["input_ids"])[:PROMPT_TOKENS])
    end = tokenizer.eos_token_id
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    spans: dict[int, Span] = {}
    for at in range(0, len(order), TOGETHER):
        numbers = order[at : at + TOGETHER]
        width = len(prompts[numbers[-1]])
        ids = torch.tensor([[end] * (width - len(prompts[n])) + prompts[n] for n in numbers])
        mask = torch.tensor([[0] * (width - len(prompts[n])) + [1] * len(prompts[n]) for n in numbers])
        with torch.inference_mode():
            whole = model.generate(ids, attention_mask=mask, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        for number, line in zip(numbers, whole.tolist(), strict=True):
            answer = line[width:]
            answer = answer[: answer.index(end) + 1] if end in answer else answer
            spans[number] = (prompts[number] + answer, len(prompts[number]))
    return [spans[number] for number in range(len(prompts))]


def texts(directory: Path, kept: Path, folder: Path = SHARED) -> Texts:
    """All three sets, from ``kept`` (JSON) where they were made before: a minute or two."""
    if not kept.is_file():
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16, local_files_only=True
        ).eval()
        tokenizer = load_tokenizer(directory)
        sets = split_prompts(prompts(folder))
        made = {name: answered(model, tokenizer, asked) for name, asked in sets.items()}
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(made), encoding="utf-8")
    read = json.loads(kept.read_text(encoding="utf-8"))
    spans: dict[str, list[Span]] = {name: [(ids, start) for ids, start in read[name]] for name in SIZES}
    return Texts(spans[CALIBRATION], spans[CHOSEN], spans[REPORTED])
