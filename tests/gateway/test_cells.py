"""What follows from outcomes: who is demoted, who is not, and who comes back."""

from __future__ import annotations

import random
from typing import Any

import pytest

from gateway.quality.cells import (
    LEARNED,
    Cell,
    CellKey,
    DemotionPolicy,
    EventKind,
    Outcome,
    Status,
    Track,
    WatchEvent,
)
from gateway.quality.sequential import threshold

KEY = CellKey(variant="int4", version="0" * 12, role="classifier")


def policy(**changes: Any) -> DemotionPolicy:
    fields: dict[str, Any] = {
        "alarm": threshold(1e6, 4),
        "agree": 2,
        "rates": {
            "shadow": (0.05, 0.2),
            "regenerated": (0.1, 0.3),
            "signals": (0.1, 0.35),
            "rules": (0.02, 0.12),
        },
        "probation_after_s": 60.0,
        "alpha": 0.05,
        "beta": 0.01,
    }
    return DemotionPolicy(**fields | changes)


def fold(
    cell: Cell, check: str, bads: list[bool], at: float = 0.0, probation: bool = False, **more: Any
) -> list[WatchEvent]:
    events: list[WatchEvent] = []
    for bad in bads:
        outcome = Outcome(KEY, check, bad, at, probation=probation)
        events += cell.fold(outcome, policy(), **more)
    return events


def test_two_checks_that_agree_demote() -> None:
    cell = Cell(key=KEY)
    (alarm,) = fold(cell, "shadow", [True] * 12)
    assert alarm.kind is EventKind.ALARM
    assert "not enough evidence" in alarm.why
    assert cell.serves
    (demoted,) = fold(cell, "rules", [True] * 3, at=5.0)
    assert demoted.kind is EventKind.DEMOTED
    assert demoted.why == "shadow and rules have changed"
    assert set(demoted.evidence) == {"shadow", "rules"}
    assert (cell.serves, cell.status, cell.since) == (False, Status.DEMOTED, 5.0)


def changed_questions(seed: int) -> Cell:
    """Users ask something else by now: most answers' signals are unusual, and nothing is wrong."""
    rng, cell, rules = random.Random(seed), Cell(key=KEY), policy()
    cell.tracks["signals"] = Track(usual=(0.0, 1.0))
    for number in range(6_000):
        unusual = 2.0 if rng.random() < 0.6 else 0.5
        list(cell.fold(Outcome(KEY, "signals", False, 0.0, unusual), rules))
        list(cell.fold(Outcome(KEY, "rules", rng.random() < 0.01, 0.0), rules))
        if number % 5 == 0:
            list(cell.fold(Outcome(KEY, "shadow", rng.random() < 0.04, 0.0), rules))
    return cell


def test_an_alarm_that_lasts_is_not_joined_by_chance() -> None:
    """A third of the evidence comes to every check some day."""
    cells = [changed_questions(seed) for seed in range(20)]
    assert [cell.status for cell in cells] == [Status.SERVING] * 20
    assert all(cell.tracks["signals"].alarmed for cell in cells)


def test_harm_is_seen_beside_an_alarm_that_lasts() -> None:
    cell = changed_questions(0)
    assert EventKind.DEMOTED in [event.kind for event in fold(cell, "rules", [True] * 12)]


def test_an_alarm_is_over_soon_and_another_one_is_said_again() -> None:
    cell = Cell(key=KEY)
    (alarm,) = fold(cell, "rules", [True] * 500)
    assert alarm.kind is EventKind.ALARM
    assert fold(cell, "rules", [False] * 400) == []
    assert cell.tracks["rules"].evidence == 0
    (again,) = fold(cell, "rules", [True] * 20)
    assert again.kind is EventKind.ALARM


def test_what_is_held_back_is_said_once() -> None:
    cell = Cell(key=KEY)
    fold(cell, "shadow", [True] * 20, may_demote=False)
    events = fold(cell, "rules", [True] * 20, may_demote=False)
    events += fold(cell, "signals", [False] * 50, may_demote=False)
    assert [event.kind for event in events] == [EventKind.HELD_BACK]


def test_a_check_without_rates_supports_nobody() -> None:
    """The reference is asked no more: what it said once is of another time."""
    cell = Cell(key=KEY)
    fold(cell, "shadow", [True] * 8)
    rules = policy(rates={"signals": (0.1, 0.35), "rules": (0.02, 0.12)}, compared=False)
    events: list[WatchEvent] = []
    for _ in range(12):
        events += cell.fold(Outcome(KEY, "rules", True, 0.0), rules)
    assert [event.kind for event in events] == [EventKind.ALARM]
    assert cell.warned(rules) == ["rules"]


def test_a_check_that_is_only_counted_never_acts() -> None:
    cell = Cell(key=KEY)
    assert fold(cell, "refusal", [True] * 1000) == []
    assert cell.tracks["refusal"].bad == 1000
    assert cell.tracks["refusal"].evidence == 0


def test_healthy_answers_are_left_alone() -> None:
    rng = random.Random(0)
    cell = Cell(key=KEY)
    for _ in range(5000):
        for check, (tolerated, _) in policy().rates.items():
            assert fold(cell, check, [rng.random() < tolerated / 2]) == []
    assert cell.serves


def test_a_signal_learns_what_is_usual_first() -> None:
    rng = random.Random(1)
    cell = Cell(key=KEY)

    def say(mean: float, times: int) -> None:
        for _ in range(times):
            list(cell.fold(Outcome(KEY, "signals", False, 0.0, rng.gauss(mean, 0.1)), policy()))

    say(1.0, LEARNED)
    track = cell.tracks["signals"]
    assert track.answers == 0
    assert track.usual is not None
    low, high = track.usual
    assert 0.6 < low < 0.9 < 1.1 < high < 1.4
    assert track.learned == []
    say(1.0, 1000)
    assert track.evidence < 5
    say(2.0, 30)
    assert track.evidence > policy().alarm
    cell = Cell(key=KEY)
    say(1.0, LEARNED)
    say(0.2, 30)  # too sure of itself is as unusual
    assert cell.tracks["signals"].evidence > policy().alarm


def test_a_slower_engine_is_said_and_not_demoted() -> None:
    rules = policy(rates={"memory": (0.1, 0.5)}, said=frozenset({"memory"}))
    cell = Cell(key=KEY)

    def read(value: float, times: int) -> list[WatchEvent]:
        events: list[WatchEvent] = []
        for number in range(times):
            outcome = Outcome(KEY, "memory", False, 0.0, value + number % 10)
            events += cell.fold(outcome, rules)
        return events

    assert read(100.0, LEARNED) == []
    assert read(100.0, 300) == []
    assert read(20.0, 300) == []  # less than usual is no drift
    (drift, *_) = read(200.0, 40)
    assert drift.kind is EventKind.DRIFT
    assert drift.why == "memory is higher than usual"
    assert cell.serves


def test_a_pinned_variant_stays_and_says_so() -> None:
    cell = Cell(key=KEY)
    assert cell.pin("serving", "we know", 1.0).kind is EventKind.PINNED
    events = fold(cell, "shadow", [True] * 20) + fold(cell, "rules", [True] * 20)
    assert {event.kind for event in events} == {EventKind.ALARM, EventKind.HELD_BACK}
    assert cell.serves
    assert cell.pin(None, "no more", 2.0).kind is EventKind.UNPINNED
    assert [event.kind for event in fold(cell, "rules", [True])] == [EventKind.DEMOTED]


def test_the_limit_on_demotions_holds_it_back() -> None:
    cell = Cell(key=KEY)
    fold(cell, "shadow", [True] * 20, may_demote=False)
    events = fold(cell, "rules", [True] * 20, may_demote=False)
    assert [event.kind for event in events] == [EventKind.HELD_BACK]
    assert cell.serves


def demoted_cell() -> Cell:
    cell = Cell(key=KEY)
    cell.demote("for a test", 100.0)
    return cell


def test_probation_comes_when_it_is_due_and_restores_the_healthy() -> None:
    cell = demoted_cell()
    assert cell.begin_probation(policy(), 159.0) is None
    begun = cell.begin_probation(policy(), 160.0)
    assert begun is not None
    assert begun.kind is EventKind.PROBATION
    assert not cell.serves
    assert fold(cell, "shadow", [True] * 50) == []  # answers that clients got before count no more
    fold(cell, "rules", [False] * 100, probation=True)
    assert cell.status is Status.PROBATION  # the reference has not been heard yet
    (restored,) = fold(cell, "shadow", [False] * 100, at=200.0, probation=True)[:1]
    assert restored.kind is EventKind.RESTORED
    assert cell.serves
    assert cell.failed == 0


def test_probation_is_failed_and_comes_later_next_time() -> None:
    cell = demoted_cell()
    cell.begin_probation(policy(), 160.0)
    (failed,) = fold(cell, "shadow", [True] * 10, at=170.0, probation=True)
    assert failed.kind is EventKind.FAILED_PROBATION
    assert cell.status is Status.DEMOTED
    assert cell.begin_probation(policy(), 170.0 + 119.0) is None
    assert cell.begin_probation(policy(), 170.0 + 120.0) is not None


def test_a_pinned_demotion_has_no_probation() -> None:
    cell = demoted_cell()
    cell.pin("demoted", "by hand", 101.0)
    assert cell.begin_probation(policy(), 1e9) is None
    cell.restore("by hand", 102.0)
    assert not cell.serves


@pytest.mark.parametrize("check", ["shadow", "signals"])
def test_a_cell_survives_being_stored(check: str) -> None:
    cell = Cell(key=KEY)
    for number in range(LEARNED + 5):
        list(
            cell.fold(
                Outcome(KEY, check, number % 2 == 0, 0.0, number if check == "signals" else None), policy()
            )
        )
    assert Cell.model_validate_json(cell.model_dump_json()) == cell


def test_what_is_tolerated_is_not_demoted() -> None:
    """At the tolerated rates themselves; ``benchmarks/watch`` does it for millions of answers."""
    rng = random.Random(7)
    cell = Cell(key=KEY)
    rules = policy()
    demotions = 0
    for _ in range(8_000):
        for check, (tolerated, _) in rules.rates.items():
            for event in cell.fold(Outcome(KEY, check, rng.random() < tolerated, 0.0), rules):
                demotions += event.kind is EventKind.DEMOTED
        if not cell.serves:
            cell = Cell(key=KEY)
    assert demotions == 0
