"""The demo model's material: what is shipped is what the code makes, and nothing leaks into evaluation."""

import json
import subprocess
import sys
from pathlib import Path

from deploy.assistant import data
from deploy.assistant.corpus import own_utterances, record_conversation
from deploy.assistant.prompts import SYSTEM_PROMPTS
from deploy.assistant.records import HELD_OUT_SEED, NOT_STATED, make_record

MODEL = Path(data.__file__).with_name("model")


def test_records_are_reproducible_and_answerable() -> None:
    for seed in range(300):
        record = make_record(HELD_OUT_SEED + seed)
        assert record == make_record(HELD_OUT_SEED + seed)
        assert all(fact in record.summary for fact in record.facts)
        assert all(fact in record.text for fact in record.facts)
        assert sum(answer == NOT_STATED for _, answer in record.questions) <= 1


def test_shipped_files_are_what_the_code_writes() -> None:
    made = {
        "calibration.jsonl": data.calibration(),
        "intent_classifier.jsonl": data.intent_items(),
        "summarizer.jsonl": data.summary_items(),
        "core.jsonl": data.answer_items(),
        "long_context.jsonl": data.long_context_items(),
        "messages.jsonl": data.customer_messages(),
    }
    for name, rows in made.items():
        shipped = [json.loads(line) for line in (data.DATA / name).read_text(encoding="utf-8").splitlines()]
        assert shipped == json.loads(json.dumps(rows)), f"{name}: run python -m deploy.assistant.data"


def test_evaluation_shares_nothing_with_training_or_the_demo() -> None:
    trained = {u.text for u in own_utterances("train")}
    held_out = {u.text for u in own_utterances("eval")}
    assert not trained & held_out
    gate = {row["messages"][1]["content"] for row in data.intent_items()}
    sent = {row["message"] for row in data.customer_messages()}
    assert not gate & sent
    assert len(sent) == data.MESSAGES
    assert {c[0]["content"] for c in map(record_conversation, range(50))} <= set(SYSTEM_PROMPTS.values())


def test_shipped_model_is_small_and_its_labels_are_single_tokens() -> None:
    assert (MODEL / "model.safetensors").stat().st_size <= 25_000_000
    vocabulary = {
        entry["content"]: entry["id"]
        for entry in json.loads((MODEL / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    }
    assert all(u.intent in vocabulary for u in own_utterances("eval"))


def test_shipped_model_reaches_what_its_card_claims() -> None:
    figures = json.loads((MODEL / "training.json").read_text(encoding="utf-8"))
    assert figures["clinc150_val"] >= 0.92
    assert figures["answers"] >= 0.95
    assert figures["summaries"] >= 0.90
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    for name in ("clinc150_val", "answers", "summaries", "own_eval"):
        assert f"{100 * figures[name]:.1f} %" in card, f"{name} is not the model card's figure"


def test_command_line_needs_no_heavy_import() -> None:
    code = (
        "import sys, deploy.cli; "
        "heavy = {'torch', 'transformers', 'litellm', 'google.adk', 'matplotlib', 'scipy', 'numpy'}; "
        "assert heavy.isdisjoint(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
