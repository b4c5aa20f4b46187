"""The grounded check must accept every right answer of the demo's records and catch wrong values."""

from __future__ import annotations

import pytest

from deploy.assistant.records import NOT_STATED, make_record
from gateway.quality.grounded import check, context_of
from gateway.quality.sentences import split_sentences

RECORD = (
    "Order C2390\ncustomer: Greta Vidal\ncarrier: Northpost\nstatus: cancelled\n"
    "total: $277\narrival: 5 November\nslot: 18:00\nweight: 1,200 g\nitem: green suitcase\n\n"
    "how much does order C2390 cost"
)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("The total is $2.50. It is paid.", ["The total is $2.50.", "It is paid."]),
        ("Dr. Vidal met J. Smith at 5 p.m. today.", ["Dr. Vidal met J. Smith at 5 p.m. today."]),
        ("It closes at 5 p.m. Call then.", ["It closes at 5 p.m.", "Call then."]),
        ("See No. 5, e.g. the total. No. It is not.", ["See No. 5, e.g. the total.", "No.", "It is not."]),
        ("Really?! Yes.", ["Really?!", "Yes."]),
        ("- total: $5\n- paid\n\n1. first", ["total: $5", "paid", "first"]),
        ("\u4ed6\u6765\u4e86\u3002\u4f60\u5462\uff1f", ["\u4ed6\u6765\u4e86\u3002", "\u4f60\u5462\uff1f"]),
        ("", []),
        ("...\n", []),
    ],
)
def test_sentences(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("The total is $277.", "supported"),
        ("The total is 277 dollars.", "supported"),
        ("The total is $278.", "unsupported"),
        ("The total is €277.", "unsupported"),
        ("The customer is Greta Vidal.", "supported"),
        ("The customer is Vidal, Greta.", "supported"),
        ("The customer is Greta Wong.", "unsupported"),
        ("The status is cancelled.", "supported"),
        ("The status is shipped.", "unsupported"),
        ("The item is a green suitcase.", "supported"),
        ("The item is a red suitcase.", "unsupported"),
        ("It arrives on November 5th.", "supported"),
        ("It arrives on 6 November.", "unsupported"),
        ("It arrives on 5 November 2031.", "unsupported"),
        ("The slot is 6 pm.", "supported"),
        ("The slot is at 17:00.", "unsupported"),
        ("It weighs 1200 g.", "supported"),
        ("This is order C2390.", "supported"),
        ("This is order C2391.", "unsupported"),
        ("Northpost brings it.", "unsupported"),  # a paraphrase: beyond rules
        ("The carrier is Northpost.", "supported"),
        ("The record does not say.", "not_applicable"),
        ("The due date isn't mentioned.", "not_applicable"),
        ("Would you like anything else?", "not_applicable"),
        ("Thanks for asking!", "not_applicable"),
    ],
)
def test_labels(answer: str, label: str) -> None:
    ((_, found),) = check(answer, RECORD).sentences
    assert found == label


@pytest.mark.parametrize(
    ("answer", "context", "bad"),
    [
        ("The order weighs 5 kg.", "weight: 5kg", False),
        ("The file has 10 MB.", "size: 10MB", False),
        ("Sean O\u2019Brien placed it.", "customer: Sean O'Brien placed it", False),
        ("Dear Greta Vidal,", "customer: Greta Vidal", False),
        ("Yesterday Greta Vidal called.", "called: Greta Vidal", False),
        ("There are three items.", "items: 3", False),
        ("There are 3 items.", "There are three items.", False),
        ("There are four items.", "items: 3", True),
        ("See https://example.com/a/b for more.", "docs: https://example.com/a/b", False),
        ("See https://evil.example/a for more.", "docs: https://example.com/a/b", True),
        ("It is order 4711.", "https://shop.example/orders/4711", False),
        ("Mail greta@other.com.", "email: greta@example.com", True),
        ("The IP is 10.0.0.1.", "ip: 10.0.0.1", False),
        ("The IP is 10.0.0.2.", "ip: 10.0.0.1", True),
        ("Version 1.2.4 is installed.", "version: 1.2.3", True),
        ("It was -5 degrees.", "temperature: 5", True),
        ("It was 5 degrees below zero.", "temperature: -5", False),
        ("It takes 5-10 days.", "5 to 10 days", False),
        ("\u8ba2\u5355\u91d1\u989d\u4e3a300\u5143\u3002", "\u8ba2\u5355\u91d1\u989d: 277\u5143", True),
        ("\u8ba2\u5355\u91d1\u989d\u4e3a277\u5143\u3002", "\u8ba2\u5355\u91d1\u989d: 277\u5143", False),
    ],
)
def test_values_as_people_write_them(answer: str, context: str, bad: bool) -> None:
    assert (check(answer, context).bad > 0) is bad


def test_scores() -> None:
    result = check("The total is $277. The total is $5. Anything else?", RECORD)
    assert result.score == pytest.approx(2 / 3)
    assert result.strict_score == pytest.approx(1 / 2)
    assert check("", RECORD).score is None
    assert check("Anything else?", RECORD).strict_score is None


def test_context_is_everything_but_the_assistant() -> None:
    messages = [
        {"role": "system", "content": "one"},
        {"role": "user", "content": [{"type": "text", "text": "two"}, {"type": "image_url"}]},
        {"role": "assistant", "content": "never"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "three"},
    ]
    assert context_of(messages) == "one\ntwo\nthree"


def test_every_right_answer_of_the_records_is_accepted() -> None:
    system = "Answer the question from the record."
    for seed in range(300):
        record = make_record(seed)
        for question, answer in record.questions:
            result = check(answer, f"{system}\n{record.text}\n\n{question}")
            assert result.score == 1, (record.text, question, result.sentences)
            assert (result.strict_score is None) == (answer == NOT_STATED)


def test_answers_from_another_record_are_caught() -> None:
    """The same question answered with another record's value, for records of the same kind."""
    asked = caught = 0
    records = [make_record(seed) for seed in range(300)]
    for record in records:
        kind = record.text.split()[0]
        other = next(r for r in records if r is not record and r.text.split()[0] == kind)
        right = {answer.rsplit(" is ", 1)[0]: answer for _, answer in record.questions}
        for question, answer in record.questions:
            for _, wrong in other.questions:
                same_question = wrong.rsplit(" is ", 1)[0] in right and _start(wrong) == _start(answer)
                if same_question and wrong != answer and NOT_STATED not in (wrong, answer):
                    asked += 1
                    caught += check(wrong, f"{record.text}\n\n{question}").score == 0
    assert asked > 1000
    assert caught / asked >= 0.95


def _start(answer: str) -> str:
    """An answer without its value."""
    return " ".join(answer.split()[:3])
