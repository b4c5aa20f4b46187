"""The benchmark's three sets: what a plan is reported on must not have chosen or calibrated it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.quantization import data
from benchmarks.quantization.data import Conversation, Sources, calibration, chosen, paragraphs, reported

MODEL = Path(__file__).parents[2] / "deploy" / "assistant" / "model"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Data files of the real layout, with utterances that say which split they are from."""
    folder = tmp_path_factory.mktemp("data")
    splits = {
        split: [[f"{split} utterance {number}", "transfer"] for number in range(count)]
        for split, count in {"train": 400, "val": 60}.items()
    }
    outside = {f"oos_{split}": [[f"{split} chatter", "oos"]] for split in splits}
    (folder / "clinc150.json").write_text(json.dumps({**splits, **outside}))
    lines = [" = Heading = "]
    lines += [f" p{number} " + "word " * (30 + 10 * number) for number in range(20)]
    (folder / "wikitext2.txt").write_text("\n \n".join([*lines, " short "]))
    return Sources(folder / "clinc150.json", folder / "wikitext2.txt")


def texts(conversations: Sequence[Conversation]) -> set[str]:
    return {json.dumps(one) for one in conversations}


def test_the_three_sets_share_no_conversation(sources: Sources) -> None:
    sets = [
        {tuple(one) for one in calibration(MODEL, 200, 64, sources).sequences},
        {tuple(tokens) for tokens, _ in chosen(MODEL, 30, 40, 8, sources)},
        {tuple(tokens) for tokens, _ in reported(MODEL, 30, 40, 8, sources)},
    ]
    assert [len(one) for one in sets] == [264, 78, 78]
    assert len(set.union(*sets)) == 264 + 78 + 78


def test_calibration_reads_training_data_alone(sources: Sources) -> None:
    found = data.calibration_conversations(192, 0, sources)
    assert all(one[1]["content"].startswith("train ") for one in found)
    for half in (0, 1):
        held_out = data._mixed("val", half, 30, 0, data.CHOSEN_SEEDS, sources)
        assert all(one[1]["content"].startswith("val ") for one in held_out)


def test_calibration_has_at_least_256_conversations_and_describes_them(sources: Sources) -> None:
    found = calibration(MODEL, sources=sources)
    assert found.description.samples == len(found.sequences) == 256
    assert found.description.tokens == sum(map(len, found.sequences))


def test_sets_are_the_same_every_time_and_start_after_the_first_token(sources: Sources) -> None:
    first = reported(MODEL, 10, 5, 3, sources)
    assert first == reported(MODEL, 10, 5, 3, sources)
    assert all(start == 1 and len(tokens) > 2 for tokens, start in first)


def test_a_larger_set_goes_on_from_a_smaller_one(sources: Sources) -> None:
    assert texts(data._mixed("val", 1, 5, 0, 0, sources)) < texts(data._mixed("val", 1, 30, 0, 0, sources))


def test_a_conversation_ends_with_the_answer_in_the_models_template(sources: Sources) -> None:
    tokenizer = data.load_tokenizer(MODEL)
    tokens, _ = chosen(MODEL, 1, 0, 0, sources)[0]
    text = tokenizer.decode(tokens)
    assert text.startswith("<|begin|><|system|>")
    assert text.endswith(("<|assistant|>transfer<|end|>", "<|assistant|>out_of_scope<|end|>"))


def test_wikitext_halves_hold_paragraphs_cut_to_length(sources: Sources) -> None:
    first, second = (paragraphs(half, 10, sources) for half in (0, 1))
    names = [{one[0]["content"].split()[0] for one in half} for half in (first, second)]
    assert names == [{f"p{n}" for n in range(10)}, {f"p{n}" for n in range(10, 20)}]
    assert max(len(one[0]["content"].split()) for one in second) == 120


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"utterances": 31}, "utterances=31: give a number from 0 to 30"),
        ({"utterances": -1}, "utterances=-1"),
        ({"utterances": 1, "records": -1}, "records=-1"),
        ({"utterances": 1, "wikitext": 11}, "wikitext=11: give a number from 0 to 10"),
    ],
)
def test_more_than_there_is_is_refused(sources: Sources, settings: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        reported(MODEL, sources=sources, **settings)


def test_missing_files_are_one_sentence(sources: Sources, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere.txt"
    with pytest.raises(SystemExit, match=r"nowhere\.txt is missing: place CLINC150"):
        chosen(MODEL, sources=Sources(clinc150=nowhere))
    with pytest.raises(SystemExit, match=r"nowhere\.txt is missing: place WikiText-2"):
        chosen(MODEL, 1, 1, 1, Sources(sources.clinc150, nowhere))
