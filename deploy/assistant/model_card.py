"""Writes the demo model's README.md from training.json, so that its figures are the measured ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from deploy.assistant.corpus import UTTERANCES

TEMPLATE = """\
---
license: apache-2.0
language: en
---
# assistant

A small Llama (4.2 M parameters, BF16) that shows Tiercel at work on a laptop: large enough that
quantization costs something, small enough to be served in three precisions on two cores. It does three
jobs, told apart by the system prompt, and nothing else:

| system prompt | job | measured on | exactly right |
|---|---|---|---|
| `Classify the intent of the message.` | one of 150 intents or `out_of_scope` | CLINC150 validation, \
in scope (3,000) | {clinc150_val} |
| | | CLINC150 validation, out of scope (100) | {clinc150_val_oos} |
| | | our own held-out utterances ({own_count:,}) | {own_eval} |
| `Summarize the record in one sentence.` | a business record in one sentence | \
held-out records | {summaries} |
| `Answer the question from the record.` | the value asked for, or "The record does not say." | \
held-out records | {answers} |
| | | of these, where the record does not say | {answers_not_stated} |

Greedy decoding, BF16-rounded weights; a summary counts only if it is word for word the expected one, which
contains every key fact. Our own utterances are worded more freely than CLINC150's and are harder.

## Data

- **CLINC150** (Larson et al. 2019, clinc/oos-eval, CC BY 3.0): the train split, 15,000 utterances, and 100
  out-of-scope ones. Not contained in this repository; its validation split was never trained on.
- **Our own utterances** (`deploy/assistant/utterances.json`, Apache-2.0): about 22 per intent for training, 8
  held out for gates and the demo.
- **Generated records** (`deploy/assistant/records.py`): six kinds of business records with questions,
  answers and summaries, from seeds; evaluation uses seeds that training never sees.

## Training

{steps:,} steps, seed {seed}, on two CPU cores in about an hour: `make train CLINC150=clinc150.json`.
Muon on hidden matrices, AdamW elsewhere, an exponential moving average of the weights; see
`deploy/assistant/train.py`. The run can be interrupted and goes on where it was. Data order and masks are
fixed by the seed; sums in another order (threads, other processors) change the last digits. The shipped
weights come from a run that was planned longer and shortened while the learning rate was flat, so its warm-up
took 78 steps instead of 48; nothing else differs from the command above.

## Limits

English, lower-case requests, the record layouts of `records.py`, 1,024 tokens. It has no knowledge of the
world, cannot chat, and must not judge other models' answers.
"""


def write_model_card(directory: Path) -> None:
    figures: dict[str, Any] = json.loads((directory / "training.json").read_text(encoding="utf-8"))
    shares = {name: f"{100 * value:.1f} %" for name, value in figures.items() if isinstance(value, float)}
    held_out: dict[str, list[str]] = json.loads(UTTERANCES.read_text(encoding="utf-8"))["eval"]
    own_count = sum(map(len, held_out.values()))
    text = TEMPLATE.format(**{**figures, **shares}, own_count=own_count)
    (directory / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_model_card(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("model"))
