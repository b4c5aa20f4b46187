"""Who finds what an answer makes up: words, classifiers in a directory, and a judge's labels."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from gateway.quality import judge
from gateway.quality.detectors import Lexical, detector
from gateway.quality.grounded import Grounded, Label
from gateway.quality.process import CheckProcess
from gateway.quality.records import AnswerRecord, Look, Step, encode
from gateway.telemetry.metrics import Metrics

CONTEXT = "Order C2390\ncustomer: Greta Vidal\ntotal: $277\nArthur's Magazine was an American periodical."


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("Greta Vidal", Label.SUPPORTED),
        ("The customer is Greta Vidal.", Label.SUPPORTED),
        ("Arthur's Magazine was an American periodical.", Label.SUPPORTED),
        ("The parcel left Hamburg on Monday.", Label.UNSUPPORTED),
        ("It is that.", Label.NOT_APPLICABLE),
    ],
)
def test_words_that_the_context_has(answer: str, label: Label) -> None:
    ((_, found),) = Lexical(limit=0.5).check(answer, CONTEXT).sentences
    assert found is label


def test_the_worst_sentence_decides() -> None:
    found = Lexical().check("Greta Vidal. The parcel left Hamburg on Monday.", CONTEXT)
    assert found.bad == 1
    assert found.risk > 0.8
    assert Lexical().check("", CONTEXT) == Grounded((), ())


def write_classifier(directory: Path, kind: str) -> Path:
    """A classifier of four layers of nothing: its weights are random, its format is real."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        BertForTokenClassification,
        PreTrainedTokenizerFast,
    )

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"order customer greta vidal total parcel left .".split()]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    ).save_pretrained(directory)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    config.id2label = {0: "hallucinated", 1: "consistent"}
    config.label2id = {"hallucinated": 0, "consistent": 1}
    made: Any = BertForSequenceClassification if kind == "sequence" else BertForTokenClassification
    model = made(config)
    # Whatever the input, the second label is certain.
    model.classifier.weight.data.zero_()
    model.classifier.bias.data[:] = model.classifier.bias.data.new_tensor([0.0, 9.0])
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(("kind", "bad"), [("sequence", 0), ("token", 2)])
def test_a_classifier_in_a_directory(tmp_path: Path, kind: str, bad: int) -> None:
    """The second label is the good one of a sequence classifier, and marks what a token classifier finds."""
    found = detector("classifier", write_classifier(tmp_path, kind)).check(
        "Greta Vidal. The parcel left.", CONTEXT * 3
    )
    assert [sentence for sentence, _ in found.sentences] == ["Greta Vidal.", "The parcel left."]
    assert found.bad == bad
    assert all(0 <= risk <= 1 for risk in found.risks)
    assert detector("classifier", tmp_path).check("", CONTEXT).sentences == ()


async def test_a_classifier_is_loaded_beside_the_loop_and_again_only_for_another(tmp_path: Path) -> None:
    first, other = str(write_classifier(tmp_path / "first", "sequence")), str(tmp_path / "other")
    body = {"messages": [{"role": "user", "content": CONTEXT}]}
    said = {"choices": [{"message": {"content": "Greta Vidal."}, "finish_reason": "stop"}]}
    record = encode(AnswerRecord(json.dumps(body).encode(), [json.dumps(said).encode()]))
    checks = CheckProcess("checks", Metrics(CollectorRegistry(), ()))
    running = asyncio.create_task(checks.run())
    found: asyncio.Queue[tuple[Step | None, int | None]] = asyncio.Queue()
    try:
        pids = []
        for directory, outcome in ((first, "passed"), (first, "passed"), (None, "passed"), (other, "error")):
            checks.submit(
                Look("classifier"),
                record,
                lambda step: found.put_nowait((step, checks.pid)),
                300.0,
                directory,
            )
            async with asyncio.timeout(300):
                step, pid = await found.get()
            assert step is not None
            assert step.findings is not None
            assert step.findings.outcomes["grounded"] == outcome, step.findings.problems
            pids.append(pid)
        assert pids[0] == pids[1] == pids[2] != pids[3]
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def test_a_directory_without_a_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError)):
        detector("classifier", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    with pytest.raises(ValueError, match="BertModel; give a model for sequence or token classification"):
        detector("classifier", tmp_path)


def reply(content: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": content}}]}


def test_a_judge_is_asked_about_every_sentence_by_a_schema() -> None:
    asked = judge.request("It costs $277. It left on Monday. Anything else?", CONTEXT, 100)
    assert asked is not None
    body, sentences = asked
    assert len(sentences) == 3
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["required"] == ["1", "2", "3"]
    assert set(schema["properties"]["1"]["enum"]) == {label.value for label in Label}
    assert "2. It left on Monday." in body["messages"][1]["content"]
    assert judge.request("  ", CONTEXT, 100) is None


def test_a_judges_labels_and_score() -> None:
    found = judge.read(
        reply('{"1": "supported", "2": "contradictory", "3": "not_applicable"}'), ["a", "b", "c"]
    )
    assert found.bad == 1
    assert found.score == pytest.approx(2 / 3)
    assert found.strict_score == pytest.approx(1 / 2)


@pytest.mark.parametrize(
    "answer",
    [
        reply("supported"),
        reply('{"1": "supported"}'),
        reply('{"1": "supported", "2": "maybe"}'),
        reply("[" * 5000),
        reply(None),
        {"choices": []},
        {},
    ],
)
def test_a_judge_that_answers_nonsense_has_said_nothing(answer: dict[str, Any]) -> None:
    with pytest.raises(judge.JudgeError, match="cannot be read"):
        judge.read(answer, ["a", "b"])
