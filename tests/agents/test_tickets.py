"""A file of tickets either loads whole or says what to fix where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.team.tickets import TicketError, read_tickets

GOOD = {
    "id": "t1",
    "message": "where is my order",
    "intent": "order_status",
    "record": "Order A1234\ncustomer: Ana Diaz",
    "question": "who is the customer on A1234",
    "answer": "The customer is Ana Diaz.",
    "summary": "Ana Diaz ordered.",
    "facts": ["Ana Diaz"],
    "specialists": {
        "contact_specialist": {"question": "who is the customer", "answer": "The customer is Ana Diaz."},
        "details_specialist": {"question": "when does it arrive", "answer": "The record does not say."},
    },
}


def test_reads_tickets_in_order_and_skips_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "tickets.jsonl"
    # U+2028 ends a line for str.splitlines, but not in JSON Lines.
    second = {**GOOD, "id": "t2", "message": "a\u2028b"}
    path.write_text(
        json.dumps(GOOD) + "\n\n" + json.dumps(second, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    tickets = read_tickets(path)
    assert [ticket.id for ticket in tickets] == ["t1", "t2"]
    assert tickets[0].facts == ("Ana Diaz",)
    assert tickets[0].record_id == "A1234"
    assert tickets[1].message == "a\u2028b"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no tickets"),
        ("\n \n", "has no tickets"),
        ("{", ":1: is not a JSON object"),
        ("[1]", ":1: is not a JSON object"),
        ('"t1"', ":1: is not a JSON object"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "answer"}), ":1: answer: Field required"),
        (json.dumps({**GOOD, "answr": "x"}), ":1: answr: Extra inputs are not permitted"),
        (json.dumps({**GOOD, "message": ""}), ":1: message: String should have at least 1 character"),
        (json.dumps({**GOOD, "facts": []}), ":1: facts: Tuple should have at least 1 item"),
        (json.dumps({**GOOD, "facts": [7]}), ":1: facts.0: Input should be a valid string"),
        (json.dumps({**GOOD, "record": "\nA1"}), ":1: record: String should match pattern"),
        (
            json.dumps({**GOOD, "specialists": {}}),
            ":1: specialists: must be contact",
        ),
        (json.dumps({**GOOD, "id": "a/b\n"}), ":1: id: String should match pattern"),
        (json.dumps(GOOD) + "\n" + json.dumps(GOOD), ":2: id: 't1' is also on line 1"),
    ],
)
def test_says_what_is_wrong_and_where(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "tickets.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TicketError) as caught:
        read_tickets(path)
    assert str(caught.value).startswith(str(path))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TicketError, match="No such file"):
        read_tickets(tmp_path / "missing.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(TicketError, match="not UTF-8"):
        read_tickets(tmp_path / "latin.jsonl")
